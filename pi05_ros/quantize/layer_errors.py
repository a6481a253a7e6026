"""What quantisation does to each layer alone, on the inputs it has in the model before quantisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pi05_ros.model.pi05 import Pi05
from pi05_ros.model.quantised_linear import QuantisedLinear
from pi05_ros.quantize.samples import Sample, forward


@dataclass(frozen=True)
class LayerError:
    """Norm of the difference over the norm: of the weight, and of the output (None where the layer never runs)."""

    weight: float
    output: float | None


def relative(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over norm of the reference; 0 for nothing against nothing."""
    value, reference = value.double(), reference.double()
    difference = float((value - reference).norm())
    return difference / float(reference.norm()) if difference else 0.0


@torch.no_grad()
def layer_errors(model: Pi05, layers: Mapping[str, QuantisedLinear], samples: Sequence[Sample],
                 resize: str = "pil") -> dict[str, LayerError]:
    """Each sample runs once through `model`; every layer is asked for its output on what its twin there gets."""
    squares = {name: [0.0, 0.0] for name in layers}

    def compare(name: str, layer: QuantisedLinear):
        def seen(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            squares[name][0] += float((layer(inputs[0]).double() - output.double()).square().sum())
            squares[name][1] += float(output.double().square().sum())
        return seen

    handles = [model.get_submodule(name).register_forward_hook(compare(name, layer)) for name, layer in layers.items()]
    try:
        for sample in samples:
            forward(model, [sample], resize)
    finally:
        for handle in handles:
            handle.remove()
    return {name: LayerError(relative(layer.dequantised(), model.get_submodule(name).weight),  # type: ignore[arg-type]
                             (difference / norm) ** 0.5 if norm else None)
            for (name, layer), (difference, norm) in zip(layers.items(), squares.values(), strict=True)}


def worst(errors: Mapping[str, LayerError]) -> str:
    """The layer with the largest error of its output."""
    return max(errors, key=lambda name: errors[name].output or 0.0)
