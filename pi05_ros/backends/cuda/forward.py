"""The whole fast forward on one screen: what each CUDA graph holds. Buffers `b` as in the shape table (shapes.py).

Vision and expert keep their residual in float32 (in bfloat16 it is most of the error); in the prefix a product that
ends in the residual adds itself to it, and the others read it as it is: RMSNorm is a factor a row, applied
by what comes after the product. Its scales are in the weights (packing.py), flow times in tables (modulation.py). Rows
beyond the valid ones are computed and never attended to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pi05_ros.backends.cuda.kernels import flow_step, guidance
from pi05_ros.backends.cuda.kernels.gated_product import gated_product
from pi05_ros.backends.cuda.kernels.image_attention import image_attention
from pi05_ros.backends.cuda.kernels.norm import layer_norm, row_sums
from pi05_ros.backends.cuda.kernels.pair_product import glu_product, qkv_product
from pi05_ros.backends.cuda.kernels.prefix_added import add_product
from pi05_ros.backends.cuda.kernels.prefix_attention import prefix_attention
from pi05_ros.backends.cuda.kernels.prefix_input import fill
from pi05_ros.backends.cuda.kernels.residual_product import residual_product
from pi05_ros.backends.cuda.kernels.rope import rope_into_cache
from pi05_ros.backends.cuda.kernels.suffix_attention import suffix_attention
from pi05_ros.backends.cuda.kernels.vision_product import added_product, fits_hopper, normed_product
from pi05_ros.backends.cuda.packing import ExpertWeights, PrefixWeights, VisionWeights
from pi05_ros.backends.cuda.shapes import Buffers
from pi05_ros.backends.cuda.tilings import Tilings
from pi05_ros.config import Pi05Config


def vision(w: VisionWeights, b: Buffers, config: Pi05Config, cameras: int) -> None:
    """b.pixels [cameras] to b.image_tokens: SigLIP and the projector."""
    c, x = config.vision, embedded_patches(w.patch, b, config, cameras)
    rows, tokens = len(x), b.image_tokens[:len(x)]
    normed, qkv, attended = b.vision_normed[:rows], b.vision_qkv[:rows], b.vision_attended[:rows]
    if fits_hopper(c.width, c.mlp_dim, x.device):
        return _vision_in_products(w, b, config, x, tokens)
    delta, bias = None, w.position  # what the next norm adds to the float32 residual x
    for layer in w.layers:
        layer_norm(x, delta, bias, layer.qkv.scale, out=normed)
        torch.addmm(layer.qkv.bias, normed, layer.qkv.weight.T, out=qkv)
        image_attention(qkv, c.num_patches, c.num_heads, attended)
        delta = torch.mm(attended, layer.out.weight.T, out=b.vision_delta[:rows])
        layer_norm(x, delta, layer.out.bias, layer.fc1.scale, out=normed)
        hidden = torch._addmm_activation(layer.fc1.bias, normed, layer.fc1.weight.T, use_gelu=True)
        delta, bias = torch.mm(hidden, layer.fc2.weight.T, out=b.vision_delta[:rows]), layer.fc2.bias
    layer_norm(x, delta, bias, w.projector.scale, out=normed)
    torch.addmm(w.projector.bias, normed, w.projector.weight.T, out=tokens)


def embedded_patches(weight: Tensor, b: Buffers, config: Pi05Config, cameras: int) -> Tensor:
    """b.pixels [cameras] to the float32 residual [rows, W], without positions."""
    c, rows = config.vision, cameras * config.vision.num_patches
    side = c.image_size // c.patch_size
    patches = b.pixels[:cameras].unflatten(3, (side, -1)).unflatten(2, (side, -1)).permute(0, 2, 4, 1, 3, 5)
    b.patches[:rows, :patches[0, 0, 0].numel()].unflatten(1, patches.shape[3:]).view(patches.shape).copy_(patches)
    return torch.mm(b.patches[:rows], weight, out_dtype=torch.float32, out=b.vision_x[:rows])


def _vision_in_products(w: VisionWeights, b: Buffers, config: Pi05Config, x: Tensor, tokens: Tensor) -> None:
    """The same where products norm what they read and add to x: `rounded` is x times the
    next norm's scale, in bfloat16, `sums` that norm's."""
    c, rows, sums = config.vision, len(x), b.vision_sums
    rounded, qkv, attended = b.vision_normed[:rows], b.vision_qkv[:rows], b.vision_attended[:rows]
    hidden = b.vision_hidden[:rows, :c.mlp_dim]
    row_sums(x, w.position, w.layers[0].qkv.scale, rounded, sums[0])
    parts = 1
    for layer in w.layers:
        normed_product(rounded, layer.qkv, sums, parts, qkv)
        image_attention(qkv, c.num_patches, c.num_heads, attended)
        parts = added_product(attended, layer.out, x, rounded, sums)
        normed_product(rounded, layer.fc1, sums, parts, hidden, gelu=True)
        parts = added_product(hidden, layer.fc2, x, rounded, sums)
    normed_product(rounded, w.projector, sums, parts, tokens)


def prefix(w: PrefixWeights, b: Buffers, tilings: Tilings, config: Pi05Config, rows: int) -> None:
    """b.source, b.valid, b.positions, b.prefix_images to b.prefix_keys and values: Gemma less its last attention."""
    x, qkv, inverse = b.prefix_x[:rows], b.prefix_qkv[:rows], b.prefix_inverse_rms
    attended, gate_up, hidden = b.prefix_attended[:rows], b.prefix_gate_up[:rows], b.prefix_hidden[:rows]
    fill(b.source[:rows], b.prefix_images, w.embedding, x)
    for layer, keys, values in zip(w.layers, b.prefix_keys, b.prefix_values, strict=True):
        if layer.out is None or layer.gate_up is None or layer.down is None:  # the last layer: nobody reads more
            kv = torch.mm(x, layer.qkv.T)
            return rope_into_cache(x, kv, b.positions, b.cos, b.sin, keys, values, inverse, queries=False)
        torch.mm(x, layer.qkv.T, out=qkv)
        prefix_attention(x, qkv, b.positions, b.cos, b.sin, keys, values, inverse, b.prefix_counters, b.valid,
                         attended, config.prefix.num_heads, tilings.prefix_attention)
        add_product(x, attended, layer.out)
        gated_product(x, inverse, layer.gate_up, gate_up, hidden, b.prefix_counters)
        add_product(x, hidden, layer.down)


def denoising_step(w: ExpertWeights, b: Buffers, tilings: Tilings, step: int) -> None:
    """b.x_t one step on, with row `step` of the modulation tables; the suffix's keys stand behind the prefix's."""
    scale, gate = b.scales[step], b.gates[step]
    x, summing = (b.expert_x, b.expert_scaled, b.squares), (b.split_sums, b.arrivals)
    flow_step.enter(b.x_t, w.action_in, w.action_in_b, scale[0], *x)
    assert isinstance(w.layers, list)  # not packed for the persistent kernel
    for i, (layer, keys, values) in enumerate(zip(w.layers, b.keys, b.values, strict=True)):
        assert layer.out is not None and layer.gate_up is not None and layer.down is not None
        qkv_product(b.expert_scaled, layer.qkv, b.qkv_bias[step, i], b.squares, b.counters, b.cos, b.sin, b.expert_q,
                    keys, values, tilings.qkv_product)
        suffix_attention(b.expert_q, keys, values, b.expert_valid, b.counters, b.split_attended, b.split_stats,
                         b.expert_attended, tilings.suffix_attention)
        residual_product(b.expert_attended, layer.out, gate[2 * i], scale[2 * i + 1], *x, *summing,
                         tilings.attention_out)
        glu_product(b.expert_scaled, layer.gate_up, b.gate_up_bias[step, i], b.squares, b.expert_hidden,
                    tilings.glu_product)
        residual_product(b.expert_hidden, layer.down, gate[2 * i + 1], scale[2 * i + 2], *x, *summing,
                         tilings.mlp_down)
    flow_step.leave(b.expert_scaled, w.action_out, b.out_bias[step], b.squares, b.dt, b.x_t)


def guide(b: Buffers, step: int) -> None:
    """After denoising step `step`, where the chunk is guided: b.x_t pulled to b.previous."""
    guidance.guide(b.x_t, b.x_before, b.previous, b.reach[step:step + 1], b.pull[step])
