"""Quantised models among what is measured: `cuda@fp8` is backend `cuda` with the weights quantised by recipe `fp8`.

They are quantised in memory: calibrated on a few synthetic observations (quantize/ptq.py), and held on the host, so
that the memory of a backend is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pi05_ros.backends.base import parse_choice
from pi05_ros.errors import ConfigError
from pi05_ros.quantize.recipes import find_recipe

if TYPE_CHECKING:
    from pi05_ros.benchmark.setting import Setting
    from pi05_ros.model.weights import WeightSource

SAMPLES, BATCH = 8, 4


def split_choice(text: str) -> tuple[str, str]:
    """`cuda@fp8` to ("cuda", "fp8"); without a recipe the second is empty. Raises for unknown ones."""
    backend, _, recipe = text.partition("@")
    parse_choice(backend)
    if recipe or "@" in text:
        find_recipe(recipe)
    return backend, recipe


def with_recipes(setting: Setting, choices: Sequence[str]) -> Setting:
    """The setting with weights quantised by each recipe among `choices`; afterwards no model is on the device."""
    from pi05_ros.benchmark.setting import release

    made = replace(setting, quantised=_quantised_sources(setting, choices))
    release()
    return made


def _quantised_sources(setting: Setting, choices: Sequence[str]) -> Mapping[str, WeightSource]:
    from pi05_ros.model.weights import load
    from pi05_ros.quantize.calibration import calibrate
    from pi05_ros.quantize.samples import synthetic
    from pi05_ros.quantize.source import QuantisedSource

    names = list(dict.fromkeys(recipe for _, recipe in map(split_choice, choices) if recipe))
    if not names:
        return {}
    if setting.source.quantisation is not None:
        raise ConfigError("a recipe among the backends", expected="weights before quantisation",
                          received=setting.source.quantisation.summary(), way_out="Leave the @ and the recipe out.")
    with setting.watch("quantising") as update:
        model = load(setting.source, setting.device, setting.dtype)
        statistics = calibrate(model, synthetic(setting.config, SAMPLES, 0), {"observations": "synthetic"}, BATCH,
                               on_progress=update)
        return {name: QuantisedSource.calibrated(setting.source, model, find_recipe(name), statistics)
                for name in names}


def error_limit(choice: str, dtype: str) -> float:
    """Of the actions: the dtype's, or what the recipe declares."""
    from pi05_ros.benchmark.error import ERROR_LIMITS

    _, recipe = split_choice(choice)
    return find_recipe(recipe).max_error if recipe else ERROR_LIMITS[dtype]
