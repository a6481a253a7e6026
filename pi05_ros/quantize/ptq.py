"""Post-training quantisation: largest absolute values to scales, scales to layers, layers into a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pi05_ros.errors import CheckpointError, ConfigError
from pi05_ros.model.low_precision import Precision
from pi05_ros.model.pi05 import Pi05
from pi05_ros.model.quant_config import Quantisation, QuantisedLayer
from pi05_ros.model.quantised_linear import QuantisedLinear
from pi05_ros.quantize.calibration import Statistics
from pi05_ros.quantize.recipes import Recipe, assign, linear_names, skeleton, unread_layers


@dataclass(frozen=True)
class Amax:
    """weight: float32 [1], or [out, 1] for fp8_token. input: float32 [1]; None where none is needed."""

    weight: Tensor
    input: Tensor | None


Quantised = dict[str, QuantisedLinear]
QKV = ("q_proj", "k_proj", "v_proj")


def maxima(model: Pi05, chosen: Mapping[str, Precision], statistics: Statistics,
           first: int | None = None) -> dict[str, Amax]:
    """The largest absolute values, as ModelOpt's algorithm `max` takes them; of the `first` samples alone, if given.

    Raises:
        ConfigError: no calibration has run a layer, or it saw NaN.
    """
    return {name: Amax(weight_amax(model.get_submodule(name), precision),  # type: ignore[arg-type]
                       input_amax(model, name, precision, statistics, first)) for name, precision in chosen.items()}


def weight_amax(linear: nn.Linear, precision: Precision) -> Tensor:
    magnitude = linear.weight.detach().abs().float()
    return magnitude.amax(dim=1, keepdim=True) if precision == "fp8_token" else magnitude.amax().reshape(1)


def input_amax(model: Pi05, name: str, precision: Precision, statistics: Statistics,
               first: int | None = None) -> Tensor | None:
    if precision == "fp8_token":
        return None
    found = statistics.input_amax(name, first)
    if found is None and name not in unread_layers(model.config):
        raise ConfigError(f"calibration of {name}", expected="at least one forward pass through it", received="none",
                          way_out="Calibrate with observations: `pi05 quantize --calibration ...`.")
    return found


def quantise(model: Pi05, chosen: Mapping[str, Precision], found: Mapping[str, Amax],
             on_progress: Callable[[int, int], None] | None = None) -> Quantised:
    """The layers in low precision, beside the model. In fp8, q, k and v of an attention have one weight scale, the
    largest: who merges them multiplies with one number, and rounding to floating point hardly asks for the scale.

    Raises:
        CheckpointError: a scale is NaN or not above 0.
    """
    made: Quantised = {}
    for name, precision in chosen.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        amax = torch.stack([found[one].weight for one in _merged_with(name, chosen)]).amax(0)
        layer = QuantisedLinear.of(linear, precision, amax, found[name].input)
        for leaf, scale in layer.scales().items():
            if not (torch.isfinite(scale) & (scale > 0)).all():
                raise CheckpointError(f"{leaf} of {name}", expected="finite numbers above 0", received="others",
                                      way_out="The weights or the calibration hold NaN: `pi05 inspect --check`.")
        made[name] = layer
        if on_progress:
            on_progress(len(made), len(chosen))
    return made


def _merged_with(name: str, chosen: Mapping[str, Precision]) -> list[str]:
    """The layers whose weights share a scale with `name`, itself among them."""
    path, _, leaf = name.rpartition(".")
    if leaf not in QKV or chosen[name] != "fp8":
        return [name]
    return [one for one in (f"{path}.{leaf}" for leaf in QKV) if chosen.get(one) == "fp8"]


def with_layers(model: Pi05, layers: Mapping[str, nn.Module]) -> Pi05:
    """The same model with `layers` in place of its own; parameters are shared, modules are not."""
    copy = skeleton(model.config)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(copy.get_submodule(parent), leaf, layer)
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if path not in layers:
            setattr(copy.get_submodule(path), leaf, parameter)
    return copy.eval().requires_grad_(False)


def quantised_model(model: Pi05, recipe: Recipe, statistics: Statistics, first: int | None = None) -> Pi05:
    """In one step, in memory."""
    chosen = assign(recipe, linear_names(model))
    return with_layers(model, quantise(model, chosen, maxima(model, chosen, statistics, first)))


def described(recipe: Recipe, layers: Quantised, quantiser: str, calibration: Mapping[str, object]) -> Quantisation:
    """The quant_config.json of these layers."""
    def entry(layer: QuantisedLinear) -> QuantisedLayer:
        scales = layer.scales()
        top = scales["weight_scale_2" if layer.precision == "nvfp4" else "weight_scale"]
        return QuantisedLayer(layer.precision, (layer.out_features, layer.in_features), float(top.max()),
                              float(scales["input_scale"]) if "input_scale" in scales else None)

    found = {name: entry(layer) for name, layer in layers.items()}
    return Quantisation(recipe.name, found, quantiser, dict(calibration))
