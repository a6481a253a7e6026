"""Quantised models for tests: described without numbers, and small ones with outlier channels."""

from dataclasses import replace

import torch

from pi05_ros.config import SiglipConfig, tiny_config
from pi05_ros.model.quant_config import Quantisation, QuantisedLayer
from pi05_ros.model.recipe import RecipeSource
from pi05_ros.model.weights import load, openpi_name
from pi05_ros.quantize.calibration import calibrate
from pi05_ros.quantize.outliers import OutlierSource
from pi05_ros.quantize.recipes import RECIPES, assign, linear_names, skeleton
from pi05_ros.quantize.samples import synthetic
from pi05_ros.quantize.source import QuantisedSource

# Every size a multiple of 16, as FP8 products want it (tiny_config's vision tower is not).
SMALL = replace(tiny_config(action_horizon=8),
                vision=SiglipConfig(image_size=28, patch_size=14, width=96, depth=2, mlp_dim=208, num_heads=4))


def described(config, recipe):
    """The quantisation of a recipe, every scale 0.5."""
    model = skeleton(config)
    return Quantisation(recipe, {
        name: QuantisedLayer(precision, tuple(model.get_submodule(name).weight.shape), 0.5,
                             None if precision == "fp8_token" else 0.5)
        for name, precision in assign(RECIPES[recipe], linear_names(model)).items()})


class MetaSource:
    """A quantised model without numbers."""

    def __init__(self, config, recipe):
        self.config, self.quantisation = config, described(config, recipe)
        self._low = {openpi_name(layer) for layer in self.quantisation.layers}

    def get(self, name, shape, device):
        if name.endswith("_scale"):
            return torch.full((1,), 0.5, device=device)
        low = name.endswith(".weight") and name.removesuffix(".weight") in self._low
        return torch.empty(shape, dtype=torch.float8_e4m3fn if low else torch.bfloat16, device=device)


def small_source(recipe, config=SMALL):
    """Random weights with outlier channels, calibrated on two observations, quantised in memory."""
    source = OutlierSource(RecipeSource(config), 32.0)
    model = load(source)
    return QuantisedSource.calibrated(source, model, RECIPES[recipe], calibrate(model, synthetic(config, 2, 1), {}, 1))
