"""Layers in FP8 as forward_fp8.py reads them: stored numbers and scales, merged where layers see the same input.

What a norm scales and adds stays beside the weights: folded in, the weights would be others than those quantised.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pi05_ros.backends.cuda.packing import Affine, Take, affine, patch_embedding, rms_scale, stacked, take_pair
from pi05_ros.config import Pi05Config
from pi05_ros.errors import CheckpointError
from pi05_ros.model.low_precision import FP8
from pi05_ros.model.quant_config import WAY_OUT

PREFIX, VISION, EXPERT = "language_model.layers.", "vision_tower.encoder.layers.", "action_expert.layers."
Pair = tuple[Tensor, Tensor]  # a weight and what is added
Norm = tuple[Tensor, Tensor | None]  # float32 [in]: what is multiplied with, what is added


@dataclass(frozen=True)
class Fp8Linear:
    """weight e4m3 [out, in]. input_scale float32 [1]. scale float32 [1, 1], or [1, out] of merged layers that do not
    share one: the weight's times the input's. bias bfloat16 [out] or None. norm: of the norm before it, None where
    there is none."""

    weight: Tensor
    input_scale: Tensor
    scale: Tensor
    bias: Tensor | None = None
    norm: Norm | None = None


@dataclass(frozen=True)
class Fp8GateUp:
    """weight e4m3 [2F, in], gate over up. input_scale float32 [1]. factors float32 [3]: what gate's product is
    multiplied with, and up's, and the input_scale of `down`. norm: as in Fp8Linear."""

    weight: Tensor
    input_scale: Tensor
    factors: Tensor
    norm: Norm


@dataclass(frozen=True)
class Fp8GemmaLayer:
    """Each in FP8, or in bfloat16 with its norm folded in. The last prefix layer is k and v alone, the rest None."""

    qkv: Tensor | Fp8Linear
    out: Tensor | Fp8Linear | None = None
    gate_up: Tensor | Fp8GateUp | None = None
    down: Tensor | Fp8Linear | None = None


@dataclass(frozen=True)
class Fp8PrefixWeights:
    embedding: Tensor
    layers: list[Fp8GemmaLayer]


@dataclass(frozen=True)
class Fp8VisionLayer:
    qkv: Fp8Linear
    out: Fp8Linear
    fc1: Fp8Linear
    fc2: Fp8Linear


@dataclass(frozen=True)
class Fp8VisionWeights:
    """patch, position, projector as in packing.py, the projector with the scale of its norm in the weight: they stay in
    16 and 32 bits."""

    patch: Tensor
    position: Tensor
    layers: list[Fp8VisionLayer]
    projector: Affine


@dataclass(frozen=True)
class Fp8ExpertLayer:
    """For the persistent kernel: `out` bfloat16, the others e4m3, merged as in GemmaLayerWeights. scales float32 [7]:
    of the weights q, k, v, gate, up; 1 / input_scale of `down`; what its product is multiplied with. What adaRMS gives
    has a scale a token, which the kernel finds: the recipe's is of what the shift was added to, there a bias."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Fp8Affine:
    """For csrc/product.cu. weight e4m3 [F, K]; table, scale as in packing.Affine, of the weight it stands for. factor:
    what the product is multiplied by, the weight's scale, and the input's where that is static. over: 1 / input scale
    of the layer that reads the result, if it does so in FP8."""

    weight: Tensor
    table: Tensor
    scale: Tensor
    factor: float
    over: float = 1.0


@dataclass(frozen=True)
class Fp8ProductLayer:
    """fc2's rows are padded to whole cache lines."""

    qkv: Fp8Affine
    out: Affine
    fc1: Fp8Affine
    fc2: Fp8Affine


@dataclass(frozen=True)
class Fp8ProductVision:
    """The vision tower where products norm what they read; patch, position, projector as in packing.VisionWeights."""

    patch: Tensor
    position: Tensor
    layers: list[Fp8ProductLayer]
    projector: Affine


def has_expert(low: Collection[str]) -> bool:
    return any(name.startswith(EXPERT) for name in low)


def has_prefix(low: Collection[str]) -> bool:
    return any(name.startswith(PREFIX) for name in low)


def has_vision(low: Collection[str]) -> bool:
    return any(name.startswith(VISION) for name in low)


def has_vision_products(low: Collection[str]) -> bool:
    """The attention's last projection is in bfloat16 there (quantised.py)."""
    return has_vision(low) and f"{VISION}0.self_attn.out_proj" not in low


def pack_prefix(take: Take, config: Pi05Config, embedding: Tensor, low: Collection[str]) -> Fp8PrefixWeights:
    """`low`: the layers that run in FP8; of gate, up and down, and of q, k and v, all or none."""
    last = config.prefix.depth - 1

    def layer(i: int) -> Fp8GemmaLayer:
        at = f"{PREFIX}{i}."
        attention = [f"{at}self_attn.{name}_proj" for name in ("kv" if i == last else "qkv")]
        before = at + "input_layernorm"
        qkv = (fp8_linear(take, attention, (rms_scale(take, before), None)) if attention[0] in low
               else stacked(take, attention, before))
        if i == last:
            return Fp8GemmaLayer(qkv)
        o = [at + "self_attn.o_proj"]
        out = fp8_linear(take, o) if o[0] in low else stacked(take, o, None)
        gate, up, down = (f"{at}mlp.{name}_proj" for name in ("gate", "up", "down"))
        before = at + "post_attention_layernorm"
        if gate not in low:
            return Fp8GemmaLayer(qkv, out, stacked(take, [gate, up], before), stacked(take, [down], None))
        return Fp8GemmaLayer(qkv, out, *fp8_mlp(take, gate, up, down, rms_scale(take, before)))

    return Fp8PrefixWeights(embedding, [layer(i) for i in range(last + 1)])


def pack_vision(take: Take, config: Pi05Config) -> Fp8VisionWeights:
    def layer(i: int) -> Fp8VisionLayer:
        at = f"{VISION}{i}."
        norm1, norm2 = (take_pair(take, at + name) for name in ("layer_norm1", "layer_norm2"))
        attention = [f"{at}self_attn.{name}_proj" for name in "qkv"]
        return Fp8VisionLayer(fp8_linear(take, attention, (norm1[0].float(), norm1[1].float()), biased=True),
                              fp8_linear(take, [at + "self_attn.out_proj"], biased=True),
                              fp8_linear(take, [at + "mlp.fc1"], (norm2[0].float(), norm2[1].float()), biased=True),
                              fp8_linear(take, [at + "mlp.fc2"], biased=True))

    patch, position = patch_embedding(take)
    return Fp8VisionWeights(patch, position, [layer(i) for i in range(config.vision.depth)], projector(take))


def projector(take: Take) -> Affine:
    (scale, shift), (weight, bias) = (take_pair(take, name) for name in ("vision_tower.post_layernorm", "projector"))
    return affine(weight.float() * scale.float(), bias.float() + weight.float() @ shift.float())


def pack_vision_products(take: Take, config: Pi05Config) -> Fp8ProductVision:
    depth, pair = config.vision.depth, partial(take_pair, take)
    norms = [pair(f"{VISION}{i}.layer_norm1") for i in range(depth)] + [pair("vision_tower.post_layernorm")]

    def product(names: list[str], norm: Pair | None, after: Tensor | None = None, over: float = 1.0) -> Fp8Affine:
        low = fp8_linear(take, names, biased=True)
        assert low.bias is not None
        scale = low.scale / low.input_scale  # the weight's
        plain = affine(low.weight.float() * scale, low.bias, norm, after)
        width = low.weight.shape[1]
        room = torch.zeros(len(low.weight), -(-width // 128) * 128, dtype=FP8, device=low.weight.device)
        room[:, :width] = low.weight
        factor = low.scale if norm is None else scale
        return Fp8Affine(room[:, :width], plain.table, plain.scale, float(factor), over)

    def layer(i: int) -> Fp8ProductLayer:
        at = f"{VISION}{i}."
        norm2, over = pair(at + "layer_norm2"), 1 / float(checked_scale(take, f"{at}mlp.fc2.input_scale"))
        return Fp8ProductLayer(product([f"{at}self_attn.{name}_proj" for name in "qkv"], norms[i]),
                               affine(*pair(at + "self_attn.out_proj"), after=norm2[0]),
                               product([at + "mlp.fc1"], norm2, over=over),
                               product([at + "mlp.fc2"], None, norms[i + 1][0]))

    patch, position = patch_embedding(take)
    return Fp8ProductVision(patch, position, [layer(i) for i in range(depth)], affine(*pair("projector"), norms[-1]))


def expert_layer(take: Take, at: str) -> Fp8ExpertLayer:
    attention, gated = ([f"{at}{name}_proj" for name in names] for names in (
        ("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")))
    parts = [stored(take, name) for name in attention + gated]
    down = fp8_linear(take, [at + "mlp.down_proj"])
    weights = [weight for weight, _ in parts]
    scales = torch.cat([*(scale for _, scale in parts), 1 / down.input_scale, down.scale[0]])
    return Fp8ExpertLayer(torch.cat(weights[:3]), take(f"{at}self_attn.o_proj.weight").bfloat16(),
                          torch.cat(weights[3:]), down.weight, scales)


def fp8_linear(take: Take, names: Sequence[str], norm: Norm | None = None, biased: bool = False) -> Fp8Linear:
    """Layers `names`, which see the same input, as one. With one scale the library's product is faster (11.5 us, not
    17, of the prefix's q, k and v at 968 rows)."""
    parts = [stored(take, name) for name in names]
    input_scale = common_input_scale(take, names)
    scales = [scale * input_scale for _, scale in parts]
    shared = all(scale.is_meta or torch.equal(scale, scales[0]) for scale in scales)
    merged = scales[0] if shared else torch.cat([scale.expand(len(weight)) for scale, (weight, _) in
                                                 zip(scales, parts, strict=True)])
    bias = torch.cat([take(f"{name}.bias") for name in names]).bfloat16() if biased else None
    return Fp8Linear(torch.cat([weight for weight, _ in parts]), input_scale, merged[None], bias, norm)


def fp8_mlp(take: Take, gate: str, up: str, down: str, norm: Tensor) -> tuple[Fp8GateUp, Fp8Linear]:
    (gate_weight, gate_scale), (up_weight, up_scale) = stored(take, gate), stored(take, up)
    input_scale, narrow = common_input_scale(take, [gate, up]), fp8_linear(take, [down])
    factors = torch.cat([gate_scale * input_scale, up_scale * input_scale, narrow.input_scale])
    return Fp8GateUp(torch.cat([gate_weight, up_weight]), input_scale, factors, (norm, None)), narrow


def stored(take: Take, name: str) -> tuple[Tensor, Tensor]:
    """Weight e4m3 [out, in] and its scale, float32 [1]."""
    weight = take(f"{name}.weight")
    if weight.dtype != FP8:
        raise CheckpointError(f"{name}.weight", expected=str(FP8), received=str(weight.dtype), way_out=WAY_OUT)
    return weight, checked_scale(take, f"{name}.weight_scale")


def common_input_scale(take: Take, names: Sequence[str]) -> Tensor:
    """float32 [1], the same of all: they see the same numbers, which are rounded once."""
    scales = [checked_scale(take, f"{name}.input_scale") for name in names]
    for name, scale in zip(names, scales, strict=True):
        if not scale.is_meta and not torch.equal(scale, scales[0]):
            raise CheckpointError(f"{name}.input_scale", expected=f"{float(scales[0]):.9g}, as of {names[0]}, which "
                                  "has the same input", received=f"{float(scale):.9g}", way_out=WAY_OUT)
    return scales[0]


def checked_scale(take: Take, name: str) -> Tensor:
    scale = take(name).float()
    if not scale.is_meta and not (torch.isfinite(scale) & (scale > 0)).all():
        raise CheckpointError(name, expected="a finite number above 0", received=str(float(scale.min())),
                              way_out=WAY_OUT)
    return scale
