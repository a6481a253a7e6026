"""Tables that recipes follow from: each group of layers alone in low precision, and what the calibration changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pi05_ros.model.low_precision import BITS, PRECISIONS, Precision
from pi05_ros.model.pi05 import Pi05
from pi05_ros.quantize.calibration import Statistics
from pi05_ros.quantize.layer_errors import relative
from pi05_ros.quantize.ptq import maxima, quantise, quantised_model, with_layers
from pi05_ros.quantize.recipes import GROUPS, LARGE, Recipe, assign, linear_names
from pi05_ros.quantize.samples import OnDevice, Sample

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Effect:
    """Relative error of the actions over the observations, and bytes that 16-bit weights take more."""

    median: float
    worst: float
    saved_bytes: int


@torch.no_grad()
def actions(model: Pi05, samples: Sequence[Sample], num_steps: int, resize: str = "pil") -> list[Tensor]:
    """x_0 of each sample, from its noise."""
    device, made = next(model.parameters()).device, []
    for sample in samples:
        batch = OnDevice.of([sample], device)
        tokens = model.encode_images(model.prepare_images(batch.frames, device, resize))
        cache = model.prefill(tokens, batch.image_mask, batch.tokens, batch.token_mask)
        made.append(model.denoise(cache, batch.noise, num_steps, batch.state))
    return made


def group_effects(model: Pi05, statistics: Statistics, samples: Sequence[Sample], num_steps: int,
                  precisions: Sequence[Precision] = PRECISIONS, resize: str = "pil",
                  on_progress: Progress | None = None) -> dict[str, dict[str, Effect]]:
    """Group -> precision -> effect of this group alone."""
    right, found = actions(model, samples, num_steps, resize), dict[str, dict[str, Effect]]()
    for group in LARGE:
        found[group] = {}
        for precision in precisions:
            alone = Recipe(f"{group} alone", "", dict.fromkeys(GROUPS[group], precision), 0.0, 0.0)
            chosen = assign(alone, linear_names(model))
            layers = quantise(model, chosen, maxima(model, chosen, statistics))
            weights = sum(layer.in_features * layer.out_features for layer in layers.values())
            found[group][precision] = effect(with_layers(model, layers), samples, right, num_steps, resize,
                                             int(weights * (16 - BITS[precision]) / 8))
            if on_progress:
                on_progress(sum(map(len, found.values())), len(LARGE) * len(precisions))
    return found


def calibration_effects(model: Pi05, recipe: Recipe, statistics: Mapping[str, Statistics], counts: Sequence[int],
                        samples: Sequence[Sample], num_steps: int, resize: str = "pil",
                        on_progress: Progress | None = None) -> dict[tuple[str, int], tuple[Effect, float]]:
    """(source, first samples of it) -> the recipe's effect, and the share of layers whose input scale is below that of
    the whole calibration of this source by more than 1 %."""
    right, found = actions(model, samples, num_steps, resize), dict[tuple[str, int], tuple[Effect, float]]()
    todo = [(source, count) for source, seen in statistics.items() for count in counts if count <= seen.samples]
    for source, count in todo:
        all_of_it = statistics[source]
        names = [name for name, layer in all_of_it.layers.items() if layer.count]
        part, whole = (np.array([float(all_of_it.input_amax(name, first)) for name in names])  # type: ignore[arg-type]
                       for first in (count, None))
        quantised = quantised_model(model, recipe, all_of_it, count)
        found[source, count] = (effect(quantised, samples, right, num_steps, resize, 0),
                                float((part < 0.99 * whole).mean()))
        if on_progress:
            on_progress(len(found), len(todo))
    return found


def effect(quantised: Pi05, samples: Sequence[Sample], right: Sequence[Tensor], num_steps: int, resize: str,
           saved_bytes: int) -> Effect:
    made = actions(quantised, samples, num_steps, resize)
    errors = [relative(value, expected) for value, expected in zip(made, right, strict=True)]
    return Effect(float(np.median(errors)), float(np.max(errors)), saved_bytes)
