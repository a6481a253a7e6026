"""Weights as the fast forward reads them: projections merged, RMSNorm scales folded in, straight from the source.

qkv stacks q, k, v; gate_up stacks gate, up. A prefix RMSNorm multiplies by (1 + w) right before a projection, so the
projection carries it: W (1 + w), computed in float32, rounded once. A LayerNorm of the vision tower scales what the
projection reads instead: rounded weights err alike in all rows, which attention over many does not average away. The
last prefix layer keeps only k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pi05_ros.backends.cuda.layouts import PackedLayers
from pi05_ros.config import Pi05Config
from pi05_ros.model.weights import (
    STAGE_MODULES,
    Progress,
    WeightSource,
    check_shape,
    expected_shapes,
    openpi_name,
)

if TYPE_CHECKING:
    from pi05_ros.backends.cuda.packing_fp8 import Fp8PrefixWeights, Fp8ProductVision, Fp8VisionWeights

ONE = torch.Size([1])
Take = Callable[[str], Tensor]  # our parameter name to the tensor on the device, in the source's dtype


@dataclass(frozen=True)
class Affine:
    """weight [F, K] and bias [F] in bfloat16; what a LayerNorm before them adds is in the bias. scale float32 [K]: what
    it multiplies by, on the input; empty without one. table float32 [F, 2]: the bias, and scale W^T or,
    where the product ends in the residual, the scale of the next norm (kernels/vision_product.py)."""

    weight: Tensor
    bias: Tensor
    table: Tensor
    scale: Tensor
    factor: float = 1.0  # of FP8 (packing_fp8.Fp8Affine)
    over: float = 1.0


@dataclass(frozen=True)
class VisionLayer:
    """fc2's rows are padded to a multiple of 64 numbers, as the copies read them fastest."""

    qkv: Affine
    out: Affine
    fc1: Affine
    fc2: Affine


@dataclass(frozen=True)
class VisionWeights:
    """patch [3*14*14 and zeros to a multiple of 8, W]; position float32 [256, W], the patch bias added."""

    patch: Tensor
    position: Tensor
    layers: list[VisionLayer]
    projector: Affine


@dataclass(frozen=True)
class GemmaLayerWeights:
    """bfloat16. `qkv` of the last prefix layer is k and v alone, and the rest of it is None."""

    qkv: Tensor
    out: Tensor | None = None
    gate_up: Tensor | None = None
    down: Tensor | None = None


@dataclass(frozen=True)
class PrefixWeights:
    embedding: Tensor
    layers: list[GemmaLayerWeights]


@dataclass(frozen=True)
class ExpertWeights:
    """Layers bfloat16, `dense` in the source's dtype, the rest float32. dense, dense_b: the 2*depth + 1 adaRMS layers
    [3*E, E] and [3*E] in order of use."""

    layers: list[GemmaLayerWeights] | PackedLayers
    dense: list[Tensor]
    dense_b: list[Tensor]
    time_in: Tensor
    time_in_b: Tensor
    time_out: Tensor
    time_out_b: Tensor
    action_in: Tensor
    action_in_b: Tensor
    action_out: Tensor
    action_out_b: Tensor

    def rows(self, name: str, index: int) -> Tensor:
        """`qkv` or `gate_up` of one layer, [out, in]."""
        if isinstance(self.layers, PackedLayers):
            return self.layers.rows(name, index)
        return getattr(self.layers[index], name)


@dataclass(frozen=True)
class Packed:
    """Only the stages asked for."""

    vision: VisionWeights | Fp8VisionWeights | Fp8ProductVision | None
    prefix: PrefixWeights | Fp8PrefixWeights | None
    expert: ExpertWeights | None


def pack(source: WeightSource, device: torch.device, stages: Iterable[str], on_progress: Progress | None = None,
         clusters: int = 0, low: Collection[str] = (), host_embedding: bool = False) -> Packed:
    """Read each weight of `stages` once; at no time is there a second copy of more than one layer.

    `clusters`: the expert's layers for the persistent kernel on that many, 0 for the portable kernels. `low`: layers
    that run in FP8 (quantised.py). `host_embedding`: the token embedding stays in pinned host memory.
    """
    from pi05_ros.backends.cuda import packing_fp8  # which builds on this file

    shapes, stages, config = expected_shapes(source.config), set(stages), source.config
    starts = tuple(openpi_name(m) for stage in stages for m in STAGE_MODULES[stage])
    total, done = sum(s.numel() for name, s in shapes.items() if name.startswith(starts)) if starts else 0, 0

    def take(name: str) -> Tensor:
        nonlocal done
        theirs = openpi_name(name)
        shape = shapes.get(theirs, ONE)  # what the model does not have is a scale
        tensor = source.get(theirs, shape, device)
        check_shape(theirs, tensor.shape, shape)
        done += tensor.numel()
        if on_progress:
            on_progress(done, total)
        return tensor.to(device)

    vision = (packing_fp8.pack_vision_products if packing_fp8.has_vision_products(low) else
              packing_fp8.pack_vision if packing_fp8.has_vision(low) else pack_vision)
    prefix = partial(packing_fp8.pack_prefix, low=low) if packing_fp8.has_prefix(low) else pack_prefix
    return Packed(vision=vision(take, config) if "vision" in stages else None,
                  prefix=prefix(take, config, pack_embedding(take, host_embedding)) if "prefix" in stages else None,
                  expert=pack_expert(take, config, device, clusters, low) if "expert" in stages else None)


def pack_vision(take: Take, config: Pi05Config) -> VisionWeights:
    pair, encoder, depth = partial(take_pair, take), "vision_tower.encoder.layers.", config.vision.depth
    norms = [pair(f"{encoder}{i}.layer_norm1") for i in range(depth)] + [pair("vision_tower.post_layernorm")]

    def layer(i: int) -> VisionLayer:
        at = f"{encoder}{i}."
        q, k, v = (pair(f"{at}self_attn.{n}_proj") for n in "qkv")
        qkv = torch.cat([q[0], k[0], v[0]]), torch.cat([q[1], k[1], v[1]])
        out, norm2 = pair(at + "self_attn.out_proj"), pair(at + "layer_norm2")
        return VisionLayer(affine(*qkv, norms[i]), affine(*out, after=norm2[0]), affine(*pair(at + "mlp.fc1"), norm2),
                           affine(*pair(at + "mlp.fc2"), after=norms[i + 1][0], padded=True))

    patch, position = patch_embedding(take)
    layers = [layer(i) for i in range(depth)]
    return VisionWeights(patch, position, layers, affine(*pair("projector"), norms[-1]))


def patch_embedding(take: Take) -> tuple[Tensor, Tensor]:
    """`patch` and `position` of VisionWeights."""
    at = "vision_tower.embeddings."
    patch = take(at + "patch_embedding.weight").to(torch.bfloat16).flatten(1).T
    patch = F.pad(patch, (0, 0, 0, -len(patch) % 8)).contiguous()  # cuBLAS wants rows of whole 16 bytes
    return patch, take(at + "position_embedding.weight").float() + take(at + "patch_embedding.bias").float()


def take_pair(take: Take, name: str) -> tuple[Tensor, Tensor]:
    return take(f"{name}.weight"), take(f"{name}.bias")


def affine(weight: Tensor, bias: Tensor, norm: tuple[Tensor, Tensor] | None = None, after: Tensor | None = None,
           padded: bool = False) -> Affine:
    """(n scale + shift) W^T + b, n the normed input, is (n scale) W^T + (shift W^T + b). after: the scale of the norm
    that reads the residual next."""
    total, wide, width = bias.float(), weight.float(), weight.shape[1]
    scale, beside = wide.new_empty(0), wide.sum(1) if after is None else after.float()
    if norm:
        scale = norm[0].float()
        total, beside = total + wide @ norm[1].float(), wide @ scale
    room = wide.new_zeros(len(wide), -(-width // 64) * 64 if padded else width, dtype=torch.bfloat16)
    room[:, :width] = wide
    return Affine(room[:, :width], total.bfloat16(), torch.stack([total, beside], 1), scale)


def pack_embedding(take: Take, on_host: bool) -> Tensor:
    """bfloat16 [vocabulary, W]; on the host in pinned memory, which kernels read over the bus, a row a token."""
    embedding = take("language_model.embed_tokens.weight").bfloat16()  # first: its copies are larger than a layer's
    if not on_host:
        return embedding
    pinned = torch.empty(embedding.shape, dtype=embedding.dtype, pin_memory=torch.cuda.is_available())
    return pinned.copy_(embedding)


def pack_prefix(take: Take, config: Pi05Config, embedding: Tensor) -> PrefixWeights:
    last = config.prefix.depth - 1
    layers = [_gemma_layer(take, f"language_model.layers.{i}.", folded=True, only_kv=i == last)
              for i in range(last + 1)]
    return PrefixWeights(embedding, layers)


def pack_expert(take: Take, config: Pi05Config, device: torch.device, clusters: int,
                low: Collection[str] = ()) -> ExpertWeights:
    from pi05_ros.backends.cuda import packing_fp8

    at, in_fp8 = "action_expert.", packing_fp8.has_expert(low)
    norms = [f"{at}layers.{i}.{norm}" for i in range(config.expert.depth)
             for norm in ("input_layernorm", "post_attention_layernorm")] + [at + "norm"]
    dense, dense_b = ([take(f"{norm}.dense.{kind}") for norm in norms] for kind in ("weight", "bias"))
    heads = [take(f"{name}.{kind}").float().contiguous()
             for name in ("time_mlp_in", "time_mlp_out", "action_in_proj", "action_out_proj")
             for kind in ("weight", "bias")]
    each = [f"{at}layers.{i}." for i in range(config.expert.depth)]
    if not clusters:
        layers = [_gemma_layer(take, one, folded=False) for one in each]
        return ExpertWeights(layers, dense, dense_b, *heads)
    packed = PackedLayers(len(each), clusters, device, in_fp8)
    for one in each:
        packed.append(packing_fp8.expert_layer(take, one) if in_fp8 else _gemma_layer(take, one, folded=False))
    packed.enter_by(*heads[4:6])
    return ExpertWeights(packed, dense, dense_b, *heads)


def _gemma_layer(take: Take, at: str, folded: bool, only_kv: bool = False) -> GemmaLayerWeights:
    def stack(norm: str, *names: str) -> Tensor:
        return stacked(take, [at + name for name in names], at + norm if folded else None)

    attention = [f"self_attn.{n}_proj" for n in ("kv" if only_kv else "qkv")]
    qkv = stack("input_layernorm", *attention)
    if only_kv:
        return GemmaLayerWeights(qkv)
    return GemmaLayerWeights(
        qkv, take(f"{at}self_attn.o_proj.weight").bfloat16().contiguous(),
        stack("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj"),
        take(f"{at}mlp.down_proj.weight").bfloat16().contiguous())


def stacked(take: Take, names: Sequence[str], norm: str | None) -> Tensor:
    """Weights of `names` in one, bfloat16 [all outputs, in], with what the RMSNorm called `norm` multiplies with."""
    scale = rms_scale(take, norm) if norm else None

    def part(name: str) -> Tensor:
        weight = take(f"{name}.weight")
        return (weight if scale is None else weight * scale).bfloat16()

    return torch.cat([part(name) for name in names])


def rms_scale(take: Take, norm: str) -> Tensor:
    return 1.0 + take(f"{norm}.weight").float()
