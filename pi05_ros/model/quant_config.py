"""quant_config.json: which layers of a checkpoint are in low precision, how they came to it, and what their scales are.

    {"format": 1, "recipe": "fp8", "quantiser": "nvidia-modelopt 0.47.0", "calibration": {...}, "layers": {
      "language_model.layers.0.mlp.gate_proj":
        {"precision": "fp8", "shape": [16384, 2048], "weight_scale": 1e-4, "input_scale": 2e-3}, ...}}

Layers have the names of model/pi05.py's modules. The scales lie in the file of the weights, beside the tensor they
belong to; here is the largest of each, so that the files of two models are told apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pi05_ros.errors import CheckpointError
from pi05_ros.model.json_fields import JsonFields
from pi05_ros.model.low_precision import PRECISIONS, Precision
from pi05_ros.model.quantised_linear import QuantisedLinear
from pi05_ros.model.stored_tensors import LOW_DTYPES, StoredTensor
from pi05_ros.model.weights import openpi_name

QUANT_CONFIG = "quant_config.json"
FORMAT = 1
WAY_OUT = "Keep the files of one `pi05 quantize` together, or quantise again."


@dataclass(frozen=True)
class QuantisedLayer:
    """shape: [out, in] before packing. input_scale: None where tokens scale themselves (fp8_token), and where nobody
    reads what the layer gives."""

    precision: Precision
    shape: tuple[int, int]
    weight_scale: float
    input_scale: float | None

    @property
    def stored(self) -> dict[str, tuple[str, float | None]]:
        """Tensor in the file -> its dtype, and the largest number in it where that is known here."""
        top = {"weight_scale": ("float32", self.weight_scale), "weight": ("float8_e4m3", None)}
        if self.precision == "nvfp4":
            top = {"weight_scale_2": ("float32", self.weight_scale), "weight_scale": ("float8_e4m3", None),
                   "weight": ("uint8", None)}
        return top | ({} if self.input_scale is None else {"input_scale": ("float32", self.input_scale)})


@dataclass(frozen=True)
class Quantisation:
    """What quant_config.json says; `layers` by module name."""

    recipe: str
    layers: Mapping[str, QuantisedLayer]
    quantiser: str = ""
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return tuple(p for p in PRECISIONS if any(layer.precision == p for layer in self.layers.values()))

    def summary(self) -> str:
        """For logs and reports: says what is only simulated."""
        simulated = {"nvfp4": "simulated"}
        return f"recipe {self.recipe}: " + ", ".join(
            f"{sum(layer.precision == p for layer in self.layers.values())} layers {p} "
            f"({simulated.get(p, 'simulated where no FP8 tensor core multiplies')})" for p in self.precisions)

    def write(self, directory: Path) -> None:
        (directory / QUANT_CONFIG).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    def install(self, model: nn.Module) -> None:
        """Put quantised layers, without memory, in the place of those named here. Raises CheckpointError for what is no
        Linear."""
        modules = dict(model.named_modules())
        for name, layer in self.layers.items():
            parent, _, leaf = name.rpartition(".")
            linear = modules.get(name)
            if not isinstance(linear, nn.Linear):
                raise CheckpointError(f"layer '{name}' of {QUANT_CONFIG}", expected="a Linear of the model",
                                      received=type(linear).__name__, way_out=WAY_OUT)
            with torch.device("meta"):
                made = QuantisedLinear(layer.shape[1], layer.shape[0], linear.bias is not None, layer.precision,
                                       layer.input_scale is not None)
            setattr(model.get_submodule(parent), leaf, made)

    def full_size(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """`tensors` (by openpi's names) as they were before quantisation: without scales, packed ones unpacked.

        Raises:
            CheckpointError: a tensor of a layer is missing or of another dtype, or one is in low precision that no
                layer here explains.
        """
        plain = dict(tensors)
        for name, layer in self.layers.items():
            for leaf, (dtype, _) in layer.stored.items():
                key = f"{openpi_name(name)}.{leaf}"
                found = plain.pop(key, None)
                if found is None or found.dtype != dtype:
                    raise CheckpointError(f"tensor '{key}'", expected=f"{dtype}, as {QUANT_CONFIG} says",
                                          received=found.dtype if found else "no such tensor", way_out=WAY_OUT)
            key = f"{openpi_name(name)}.weight"
            plain[key] = replace(tensors[key], shape=layer.shape, dtype="bfloat16")
        if stray := [name for name, tensor in plain.items() if tensor.dtype in LOW_DTYPES.values()]:
            raise CheckpointError(f"tensor '{stray[0]}'", expected="16 or 32 bits: no layer of this name is in "
                                  + QUANT_CONFIG, received=plain[stray[0]].dtype, way_out=WAY_OUT)
        return plain

    def check_scale(self, theirs: str, tensor: Tensor) -> None:
        """A tensor of openpi's name `theirs`, if it is a scale, is above 0 and what this file says."""
        path, _, leaf = theirs.rpartition(".")
        layer = {openpi_name(name): layer for name, layer in self.layers.items()}.get(path)
        said = layer.stored.get(leaf, ("", None))[1] if layer else None
        if said is None:
            return
        if not (tensor > 0).all():
            raise CheckpointError(f"tensor '{theirs}'", expected="scales above 0", received=str(float(tensor.min())),
                                  way_out=WAY_OUT)
        if said != float(tensor.max()):
            raise CheckpointError(f"tensor '{theirs}'", expected=f"{said}, as {QUANT_CONFIG} says", way_out=WAY_OUT,
                                  received=f"{float(tensor.max())}, a scale of another model or calibration")


def read_quantisation(directory: Path) -> Quantisation | None:
    """None where the directory has no quant_config.json. Raises CheckpointError for one that is broken."""
    if not (directory / QUANT_CONFIG).exists():
        return None
    fields = JsonFields.read(directory / QUANT_CONFIG)
    if fields.integer("format", FORMAT, FORMAT) is None:
        raise fields.error("format", str(FORMAT))
    layers = fields.fields("layers")
    if layers is None or not layers.values:
        raise fields.error("layers", "at least one layer")
    calibration = fields.fields("calibration")
    return Quantisation(fields.text("recipe") or "", {name: _layer(entry) for name, entry in layers.each()},
                        fields.text("quantiser") or "", calibration.values if calibration else {})


def _layer(entry: JsonFields) -> QuantisedLayer:
    precision, shape, scale = entry.text("precision"), entry.numbers("shape"), entry.number("weight_scale")
    if precision not in PRECISIONS:
        raise entry.error("precision", " or ".join(PRECISIONS))
    if shape is None or len(shape) != 2 or not all(1 <= size <= 2**24 and size == int(size) for size in shape):
        raise entry.error("shape", "two whole numbers, [out, in]")
    if scale is None:
        raise entry.error("weight_scale", "a number")
    return QuantisedLayer(precision, (int(shape[0]), int(shape[1])), scale,  # type: ignore[arg-type]
                          entry.number("input_scale"))
