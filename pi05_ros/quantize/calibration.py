"""Calibration: what every Linear of the model sees as input, kept per layer, channel and observation.

The statistics are of all Linears, so that one calibration serves every recipe. They can be written as they grow, and
the same calibration goes on from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pi05_ros.errors import CheckpointError, ConfigError
from pi05_ros.model.pi05 import Pi05
from pi05_ros.quantize.recipes import linear_names
from pi05_ros.quantize.samples import Sample, batches, forward

STATISTICS = "calibration.safetensors"
SAVE_EVERY = 8  # batches
AGAIN = "Calibrate this model, with another --output or without the old file."


@dataclass
class LayerStatistics:
    """Of a Linear's input: largest absolute value of each sample, float32 [samples] (0: not run yet), and of each
    channel, float32 [in]; sum of squares and count of all numbers. weight_amax tells models apart."""

    sample_amax: Tensor
    channel_amax: Tensor
    square_sum: float
    count: int
    weight_amax: float

    @property
    def root_mean_square(self) -> float:
        return (self.square_sum / self.count) ** 0.5 if self.count else 0.0


@dataclass
class Statistics:
    """Layer name -> its statistics; `made` is what they depend on: source, samples, seed; `done` the samples seen."""

    layers: dict[str, LayerStatistics]
    made: Mapping[str, Any]
    done: Tensor  # bool [samples]

    @classmethod
    def empty(cls, model: Pi05, made: Mapping[str, Any], samples: int) -> Statistics:
        layers = {}
        for name in linear_names(model):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            layers[name] = LayerStatistics(torch.zeros(samples), torch.zeros(linear.in_features), 0.0, 0,
                                           float(linear.weight.detach().abs().amax()))
        return cls(layers, made, torch.zeros(samples, dtype=torch.bool))

    @property
    def samples(self) -> int:
        return len(self.done)

    def input_amax(self, name: str, first: int | None = None) -> Tensor | None:
        """float32 [1], over the first samples or all; None where the layer never ran.

        Raises:
            ConfigError: something in it is not a number.
        """
        seen = self.layers[name].sample_amax[:first]
        if not torch.isfinite(seen).all():
            raise ConfigError(f"calibration of {name}", expected="finite activations", received="NaN or infinity",
                              way_out="Check the checkpoint and the observations: `pi05 inspect --check`.")
        return seen.amax().reshape(1) if self.layers[name].count else None

    def check_model(self, model: Pi05) -> None:
        """Raises CheckpointError for statistics of another model."""
        mine = Statistics.empty(model, {}, 0).layers
        if mine.keys() != self.layers.keys():
            missing = sorted(mine.keys() ^ self.layers.keys())[0]
            raise CheckpointError("calibration", expected=f"statistics of the {len(mine)} Linears of this model",
                                  received=f"{len(self.layers)}; only one of the two has '{missing}'", way_out=AGAIN)
        for name, layer in mine.items():
            if layer.weight_amax != self.layers[name].weight_amax:
                raise CheckpointError(f"calibration of {name}", received=f"{self.layers[name].weight_amax:.8g}: it was "
                                      "made with another model", expected=f"largest weight {layer.weight_amax:.8g}",
                                      way_out=AGAIN)

    def save(self, file: Path) -> None:
        tensors = {"done": self.done.to(torch.uint8)}
        for name, layer in self.layers.items():
            tensors |= {f"{name}.sample_amax": layer.sample_amax, f"{name}.channel_amax": layer.channel_amax}
        numbers = {name: [layer.square_sum, layer.count, layer.weight_amax] for name, layer in self.layers.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, f"{file}.part", {"made": json.dumps(self.made), "numbers": json.dumps(numbers)})
        os.replace(f"{file}.part", file)

    @classmethod
    def read(cls, file: Path) -> Statistics:
        """Raises CheckpointError for a file that is no calibration."""
        try:
            with safe_open(file, framework="pt") as opened:
                about = opened.metadata()
                numbers, made = json.loads(about["numbers"]), json.loads(about["made"])
                done = opened.get_tensor("done").bool()
                layers = {name: LayerStatistics(opened.get_tensor(f"{name}.sample_amax"),
                                                opened.get_tensor(f"{name}.channel_amax"), *values)
                          for name, values in numbers.items()}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"calibration {file}", expected="a file of `pi05 quantize`", received=str(error),
                                  way_out="Give a calibration.safetensors, or calibrate again.") from error
        return cls(layers, made, done)


@contextmanager
def watching(model: Pi05, statistics: Statistics, indices: Sequence[int]) -> Iterator[None]:
    """While open, inputs of every Linear go into `statistics` as those of the samples `indices`."""
    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        layer = statistics.layers[name]

        def seen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            magnitude = x.abs().reshape(len(indices), -1, x.shape[-1]).float()
            mine = magnitude.amax(dim=(1, 2)).cpu()
            layer.sample_amax[list(indices)] = torch.maximum(layer.sample_amax[list(indices)], mine)
            layer.channel_amax = torch.maximum(layer.channel_amax, magnitude.amax(dim=(0, 1)).cpu())
            layer.square_sum += float(magnitude.square().sum(dtype=torch.float64))
            layer.count += x.numel()
        return seen

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in statistics.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def calibrate(model: Pi05, samples: Sequence[Sample], made: Mapping[str, Any], batch: int, resize: str = "pil",
              file: Path | None = None, on_progress: Callable[[int, int], None] | None = None) -> Statistics:
    """Run every sample once; with `file`, go on from what it holds and write it now and then.

    Raises:
        ConfigError: no samples, or `file` is of other settings.
        CheckpointError: `file` is of another model, or no calibration.
    """
    if not samples:
        raise ConfigError("calibration", expected="at least one observation", received="none",
                          way_out="Give --samples, or a source that has observations.")
    made = {**made, "samples": len(samples)}
    statistics = Statistics.empty(model, made, len(samples))
    if file is not None and file.exists():
        statistics = Statistics.read(file)
        statistics.check_model(model)
        if statistics.made != made:
            raise ConfigError(f"calibration {file}", expected=str(made), received=str(statistics.made), way_out=AGAIN)
    for number, (indices, part) in enumerate(batches(samples, batch)):
        todo = [(index, sample) for index, sample in zip(indices, part, strict=True) if not statistics.done[index]]
        if todo:
            indices, part = [index for index, _ in todo], [sample for _, sample in todo]
            with watching(model, statistics, indices):
                forward(model, part, resize)
            statistics.done[indices] = True
            if file is not None and number % SAVE_EVERY == SAVE_EVERY - 1:
                statistics.save(file)
        if on_progress:
            on_progress(int(statistics.done.sum()), len(samples))
    if file is not None:
        statistics.save(file)
    return statistics
