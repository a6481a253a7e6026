"""Which layers of a quantised checkpoint the CUDA backend multiplies in FP8, and how the others get to their kernels.

FP8 products: the prefix's MLPs (gate, up and down together), its attention's projections, the vision tower (all of it
together; on Hopper, where products have norm and residual inside, but for `out_proj`), the action expert's q, k, v,
gate, up and down (all layers together, where it is one kernel). Any other FP8 layer, as the expert's `o_proj`, is
multiplied in bfloat16: its weights are the FP8 values, its inputs are not rounded. Nothing
does so silently: `how_layers_run` says it of every layer, and so does `StageSet.runs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pi05_ros.backends.cuda.kernels import vision_product
from pi05_ros.config import Pi05Config
from pi05_ros.errors import BackendError
from pi05_ros.model.quant_config import Quantisation
from pi05_ros.model.quantised_linear import FP8_CAPABILITY, TILE
from pi05_ros.model.weights import STAGE_MODULES, WeightSource, openpi_name

VISION = "vision_tower.encoder.layers."
IN_FP8, IN_BF16 = "FP8", "bfloat16, weights from FP8"  # of `StageSet.runs`
Capability = tuple[int, int]


def expert_layers(config: Pi05Config) -> list[str]:
    """Those that the persistent kernel multiplies in FP8."""
    return [f"action_expert.layers.{i}.{name}_proj" for i in range(config.expert.depth) for name in
            ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up", "mlp.down")]


def expert_in_fp8(quantisation: Quantisation | None, config: Pi05Config) -> bool:
    """Whether the persistent kernel, if it is there, takes its layers in FP8."""
    return quantisation is not None and all(fits(quantisation, name) for name in expert_layers(config))


def fits(quantisation: Quantisation, name: str) -> bool:
    layer = quantisation.layers.get(name)
    return layer is not None and layer.precision == "fp8" and all(size % TILE == 0 for size in layer.shape)


def groups_of(config: Pi05Config, capability: Capability, one_kernel: bool) -> list[list[str]]:
    """Layers that are in FP8 together or not at all, as one product, or one kernel after another, takes them."""
    prefix = "language_model.layers."
    last = config.prefix.depth - 1
    groups = [[f"{prefix}{i}.mlp.{name}_proj" for name in ("gate", "up", "down")] for i in range(last)]
    groups += [[f"{prefix}{i}.self_attn.{name}_proj" for name in "qkv"] for i in range(last)]
    groups += [[f"{prefix}{i}.self_attn.o_proj"] for i in range(last)]
    groups.append([f"{prefix}{last}.self_attn.{name}_proj" for name in "kv"])
    if one_kernel:
        groups.append(expert_layers(config))
    projections = ("q", "k", "v") if vision_inside(config, capability) else ("q", "k", "v", "out")
    groups.append([f"{VISION}{i}.{name}" for i in range(config.vision.depth) for name in
                   (*(f"self_attn.{one}_proj" for one in projections), "mlp.fc1", "mlp.fc2")])
    return groups


def vision_inside(config: Pi05Config, capability: Capability) -> bool:
    """Whether vision's products have norm and residual inside."""
    return vision_product.fits(config.vision.width, config.vision.mlp_dim, capability)


def one_scale(quantisation: Quantisation, i: int) -> bool:
    """Whether q, k and v of vision layer i share a weight scale, as that product needs it."""
    found = {layer.weight_scale for name, layer in quantisation.layers.items() if name in
             [f"{VISION}{i}.self_attn.{one}_proj" for one in "qkv"]}
    return len(found) <= 1


def how_layers_run(quantisation: Quantisation | None, config: Pi05Config, stages: list[str],
                   capability: Capability, one_kernel: bool = False) -> dict[str, str]:
    """Layer -> IN_FP8 or IN_BF16, of the quantised layers that `stages` read on a GPU of this compute capability; the
    last prefix layer's unread ones are not among them. `one_kernel`: the expert is the persistent one."""
    if quantisation is None:
        return {}
    layers = quantisation.layers
    mine = tuple(module for stage in stages for module in STAGE_MODULES[stage])
    unread = f"language_model.layers.{config.prefix.depth - 1}."
    read = [name for name in layers if name.startswith(mine) and
            (not name.startswith(unread) or name.endswith(("k_proj", "v_proj")))] if mine else []

    together = {name for group in groups_of(config, capability, one_kernel)
                if all(fits(quantisation, name) for name in group) for name in group}
    if vision_inside(config, capability) and not all(one_scale(quantisation, i) for i in range(config.vision.depth)):
        together = {name for name in together if not name.startswith(VISION)}
    return {name: IN_FP8 if name in together else IN_BF16 for name in read}


def check_quantisation(quantisation: Quantisation | None, config: Pi05Config, stages: list[str],
                       capability: Capability) -> None:
    """Raises BackendError for a precision that no kernel here has, named with a layer, and for a GPU without FP8."""
    for name in how_layers_run(quantisation, config, stages, capability):
        assert quantisation is not None
        layer = quantisation.layers[name]
        if layer.precision != "fp8" or layer.input_scale is None:
            raise BackendError("backend 'cuda'", expected="layers in bfloat16, or in fp8 with scales from calibration",
                               received=f"{name} in {layer.precision} ({quantisation.summary()})",
                               way_out="Use backend 'eager', which runs it or simulates it, or recipe fp8 or fp8_mlp.")
        if capability < FP8_CAPABILITY:
            raise BackendError("backend 'cuda', a checkpoint in fp8", expected="compute capability 8.9 (Ada) or later",
                               received=".".join(map(str, capability)),
                               way_out="Use backend 'eager', which simulates it, or the checkpoint before it.")


@dataclass(frozen=True)
class Dequantised:
    """A `WeightSource` of ordinary numbers: weights of quantised layers times their scale, in float32; but those of
    `kept` as they are stored, with their scales."""

    source: WeightSource
    kept: frozenset[str]

    @property
    def config(self) -> Pi05Config:
        return self.source.config

    @property
    def quantisation(self) -> Quantisation | None:
        return self.source.quantisation

    def get(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        path, _, leaf = name.rpartition(".")
        tensor = self.source.get(name, shape, device)
        if leaf != "weight" or path not in self._widened:
            return tensor
        return tensor.float() * self.source.get(f"{path}.weight_scale", torch.Size([1]), device)

    @property
    def _widened(self) -> frozenset[str]:
        assert self.quantisation is not None
        return frozenset(openpi_name(layer) for layer in self.quantisation.layers if layer not in self.kept)


def plain_source(source: WeightSource, runs: Mapping[str, str]) -> WeightSource:
    """What the packers read: the source itself where nothing is quantised."""
    if source.quantisation is None:
        return source
    return Dequantised(source, frozenset(name for name, how in runs.items() if how == IN_FP8))
