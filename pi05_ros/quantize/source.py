"""A model quantised in memory, as a source of weights: what a backend loads where nobody wrote a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pi05_ros.config import Pi05Config
from pi05_ros.model.pi05 import Pi05
from pi05_ros.model.quant_config import Quantisation
from pi05_ros.model.quantised_linear import QuantisedLinear
from pi05_ros.model.weights import WeightSource, openpi_name
from pi05_ros.quantize import ptq
from pi05_ros.quantize.calibration import Statistics
from pi05_ros.quantize.recipes import Recipe, assign, linear_names


@dataclass(frozen=True)
class QuantisedSource:
    """A `WeightSource`: `source` but for `tensors`, by openpi's names: low weights and scales, held on the host."""

    source: WeightSource
    quantisation: Quantisation
    tensors: Mapping[str, Tensor]

    @classmethod
    def calibrated(cls, source: WeightSource, model: Pi05, recipe: Recipe, statistics: Statistics) -> QuantisedSource:
        """`model` has the weights of `source`; `statistics` are its calibration."""
        chosen = assign(recipe, linear_names(model))
        layers = ptq.quantise(model, chosen, ptq.maxima(model, chosen, statistics))
        return cls.of(source, layers, ptq.described(recipe, layers, "in memory", statistics.made))

    @classmethod
    def of(cls, source: WeightSource, layers: Mapping[str, QuantisedLinear],
           quantisation: Quantisation) -> QuantisedSource:
        tensors = {f"{openpi_name(name)}.{leaf}": parameter.detach().cpu() for name, layer in layers.items()
                   for leaf, parameter in layer.named_parameters() if leaf != "bias"}
        return cls(source, quantisation, tensors)

    @property
    def config(self) -> Pi05Config:
        return self.source.config

    def get(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        return self.tensors[name].to(device) if name in self.tensors else self.source.get(name, shape, device)
