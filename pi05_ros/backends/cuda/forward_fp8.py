"""The stages of forward.py where layers are in FP8, on one screen. A product takes e4m3 or bfloat16, as its layer.

What writes a product's input rounds it: norm, activation, or a pass of its own behind attention. Attention, residual
and norms are as wide as in forward.py; the library's products end in bfloat16, and the next norm adds them to the
residual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pi05_ros.backends.cuda.forward import embedded_patches
from pi05_ros.backends.cuda.kernels.fp8_activation import activation_to_fp8
from pi05_ros.backends.cuda.kernels.fp8_gated_product import gated_product_fp8
from pi05_ros.backends.cuda.kernels.fp8_norm import norm_to_bf16, norm_to_fp8
from pi05_ros.backends.cuda.kernels.fp8_product import fp8_product
from pi05_ros.backends.cuda.kernels.gated_product import gated_product
from pi05_ros.backends.cuda.kernels.image_attention import image_attention
from pi05_ros.backends.cuda.kernels.norm import row_sums
from pi05_ros.backends.cuda.kernels.prefix_attention import prefix_attention
from pi05_ros.backends.cuda.kernels.prefix_input import fill
from pi05_ros.backends.cuda.kernels.rope import rope_into_cache
from pi05_ros.backends.cuda.kernels.vision_product import Sums, added_product, normed_product
from pi05_ros.backends.cuda.packing import Affine
from pi05_ros.backends.cuda.packing_fp8 import (
    Fp8Affine,
    Fp8GateUp,
    Fp8Linear,
    Fp8PrefixWeights,
    Fp8ProductVision,
    Fp8VisionWeights,
)
from pi05_ros.backends.cuda.shapes import Buffers
from pi05_ros.backends.cuda.tilings import Tilings
from pi05_ros.config import Pi05Config
from pi05_ros.model.low_precision import FP8


def vision(w: Fp8VisionWeights, b: Buffers, config: Pi05Config, cameras: int) -> None:
    """b.pixels [cameras] to b.image_tokens; the residual x in float32."""
    c, x, delta = config.vision, embedded_patches(w.patch, b, config, cameras), w.position
    rows = len(x)
    attended, normed = b.vision_attended[:rows], b.vision_normed[:rows]
    for layer in w.layers:
        qkv = product(norm(x, delta, layer.qkv, normed), layer.qkv)
        image_attention(qkv, c.num_patches, c.num_heads, attended)
        delta = product(rounded(attended, layer.out), layer.out)
        hidden = product(norm(x, delta, layer.fc1, normed), layer.fc1)
        delta = product(rounded(hidden, layer.fc2, gelu=True), layer.fc2)
    norm_to_bf16(x, delta, normed, centred=True)
    torch.addmm(w.projector.bias, normed, w.projector.weight.T, out=b.image_tokens[:rows])


def vision_in_products(w: Fp8ProductVision, b: Buffers, config: Pi05Config, cameras: int) -> None:
    """The same on Hopper, as forward.py's: products norm what they read, round what they leave and add to x. `low` is x
    times the next norm's scale in e4m3, in a unit a row: what its deviation was one product before."""
    c, x = config.vision, embedded_patches(w.patch, b, config, cameras)
    rows, both = len(x), (b.vision_sums, b.vision_sums_before)
    qkv, attended, rounded = b.vision_qkv[:rows], b.vision_attended[:rows], b.vision_normed[:rows]
    low, hidden = narrow(rounded), narrow(b.vision_hidden[:rows])[:, :c.mlp_dim]
    row_sums(x, w.position, w.layers[0].qkv.scale, low, both[0][0])
    before = now = Sums(both[0], 1)

    def add(y: Tensor, layer: Affine | Fp8Affine, out: Tensor) -> tuple[Sums, Sums]:
        left = both[now.at is both[0]]
        return now, Sums(left, added_product(y, layer, x, out, left, before=now))

    for i, layer in enumerate(w.layers):
        normed_product(low, layer.qkv, *now, qkv, before=before)
        image_attention(qkv, c.num_patches, c.num_heads, attended)
        before, now = add(attended, layer.out, low)
        normed_product(low, layer.fc1, *now, hidden, gelu=True, before=before)
        before, now = add(hidden, layer.fc2, rounded if i == c.depth - 1 else low)
    normed_product(rounded, w.projector, *now, b.image_tokens[:rows])


def prefix(w: Fp8PrefixWeights, b: Buffers, tilings: Tilings, config: Pi05Config, rows: int) -> None:
    """b.source, b.valid, b.positions, b.prefix_images to b.prefix_keys and values."""
    x, attended, normed, delta = b.prefix_x[:rows], b.prefix_attended[:rows], b.prefix_normed[:rows], None
    ones = b.prefix_inverse_rms  # attention makes them so: norms are before the products here
    fill(b.source[:rows], b.prefix_images, w.embedding, x)
    for layer, keys, values in zip(w.layers, b.prefix_keys, b.prefix_values, strict=True):
        qkv = product(norm(x, delta, layer.qkv, normed), layer.qkv)
        if layer.out is None or layer.gate_up is None or layer.down is None:  # the last layer: nobody reads more
            return rope_into_cache(None, qkv, b.positions, b.cos, b.sin, keys, values, ones, queries=False)
        prefix_attention(None, qkv, b.positions, b.cos, b.sin, keys, values, ones, b.prefix_counters, b.valid,
                         attended, config.prefix.num_heads, tilings.prefix_attention)
        delta = product(rounded(attended, layer.out), layer.out)
        low = norm(x, delta, layer.gate_up, normed)
        delta = product(gated(low, ones, layer.gate_up, b.prefix_gate_up[:rows], b.prefix_hidden[:rows]), layer.down)


def norm(x: Tensor, delta: Tensor | None, layer: Tensor | Fp8Linear | Fp8GateUp, out: Tensor) -> Tensor:
    """x += delta; x normed, as `layer` reads it, in the memory of `out`."""
    if isinstance(layer, Tensor):
        norm_to_bf16(x, delta, out, centred=False)
        return out
    assert layer.norm is not None
    norm_to_fp8(x, delta, *layer.norm, layer.input_scale, low := narrow(out))
    return low


def rounded(x: Tensor, layer: Tensor | Fp8Linear, gelu: bool = False) -> Tensor:
    """x as `layer` reads it."""
    if isinstance(layer, Tensor):
        return x
    activation_to_fp8(x, layer.input_scale, low := torch.empty_like(x, dtype=FP8), gelu)
    return low


def gated(x: Tensor, ones: Tensor, layer: Tensor | Fp8GateUp, gate_up: Tensor, hidden: Tensor) -> Tensor:
    """The gated linear unit, as `down` reads it: its layers are in one precision."""
    if isinstance(layer, Tensor):
        gated_product(x, ones, layer, gate_up, hidden)
        return hidden
    gated_product_fp8(x, layer, gate_up, low := narrow(hidden))
    return low


def product(x: Tensor, layer: Tensor | Fp8Linear) -> Tensor:
    """bfloat16 [rows, out]."""
    return torch.mm(x, layer.T) if isinstance(layer, Tensor) else fp8_product(x, layer)


def narrow(room: Tensor) -> Tensor:
    """e4m3 of the shape of `room`, bfloat16 contiguous, in the first half of its memory."""
    return room.flatten().view(FP8)[:room.numel()].view(room.shape)
