"""What is measured and where: the weights, the device with its ceiling, and how a backend is built alone on it."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi05_ros import __version__
from pi05_ros.backends import base
from pi05_ros.benchmark.ceiling import Ceiling, measure_ceiling
from pi05_ros.benchmark.inputs import Shape
from pi05_ros.benchmark.recipes import split_choice
from pi05_ros.benchmark.work import Work, stage_work
from pi05_ros.config import Pi05Config
from pi05_ros.model.quant_config import Quantisation
from pi05_ros.model.recipe import DeviceSource, RecipeSource
from pi05_ros.model.weights import WeightSource, parse_dtype

Watch = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]  # label -> a bar: `update(done, total)`


@dataclass(frozen=True)
class Setting:
    """Everything a measurement needs, beside the backend and the shape."""

    source: WeightSource
    device: torch.device
    dtype: str
    ceiling: Ceiling
    watch: Watch
    quantised: Mapping[str, WeightSource] = field(default_factory=dict)  # by recipe (recipes.py)

    @property
    def config(self) -> Pi05Config:
        return self.source.config

    def build(self, choice: str, dtype: str | None = None) -> base.StageSet:
        """The backend with the weights loaded, in this setting's dtype unless another is given."""
        backend, _ = split_choice(choice)
        with self.watch(f"loading {choice} {dtype or self.dtype}") as update:
            return base.build(backend, self.source_of(choice), self.device, dtype or self.dtype, on_progress=update)

    def source_of(self, choice: str) -> WeightSource:
        """The weights, or for `cuda@fp8` those quantised by that recipe."""
        _, recipe = split_choice(choice)
        return self.quantised[recipe] if recipe else self.source

    def work(self, shape: Shape, choice: str) -> dict[str, Work]:
        return stage_work(self.config, shape, self.bytes_per_weight, self.source_of(choice).quantisation)

    @property
    def bytes_per_weight(self) -> int:
        return torch.finfo(parse_dtype(self.dtype)).bits // 8

    def at_horizon(self, horizon: int) -> Setting:
        return replace(self, source=AtHorizon(self.source, horizon))

    def summary(self) -> dict[str, Any]:
        """For the JSON object: what the numbers depend on, and the ceiling."""
        return {"environment": {**environment(self.device), "weights": _origin(self.source),
                                "dtype": self.dtype}, "ceiling": asdict(self.ceiling)}

    def headline(self) -> str:
        """The ceiling, in words."""
        upload = self.ceiling.upload_bytes_per_s
        return (f"{environment(self.device)['device']}: copy {self.ceiling.bytes_per_s / 1e12:.2f} TB/s, {self.dtype} "
                f"product {self.ceiling.flop_per_s / 1e12:.1f} TFLOP/s"
                + (f", upload {upload / 1e9:.0f} GB/s" if upload else ""))


@dataclass(frozen=True)
class AtHorizon:
    """A `WeightSource`: the same weights for another action horizon, on which none of them depends."""

    source: WeightSource
    horizon: int

    @property
    def config(self) -> Pi05Config:
        return replace(self.source.config, action_horizon=self.horizon)

    @property
    def quantisation(self) -> Quantisation | None:
        return self.source.quantisation

    def get(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        return self.source.get(name, shape, device)


def random_source(config: Pi05Config, device: torch.device) -> WeightSource:
    """Random weights: drawn on a GPU in seconds; elsewhere by the recipe, the same on every machine."""
    return DeviceSource(config) if device.type == "cuda" else RecipeSource(config)


def make_setting(source: WeightSource, device: torch.device, dtype: str, watch: Watch) -> Setting:
    """Measures the ceiling."""
    with watch("measuring the hardware"):
        ceiling = measure_ceiling(device, parse_dtype(dtype))
    release()
    return Setting(source, device, dtype, ceiling, watch)


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    found: dict[str, Any] = {"device": f"{platform.machine()} CPU", "cores": os.cpu_count()}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found.update(device=gpu.name, device_memory_gb=round(gpu.total_memory / 1e9, 1),
                     multiprocessors=gpu.multi_processor_count, capability=f"{gpu.major}.{gpu.minor}")
    choices = {name: os.environ[name] for name in ("PI05_EXPERT", "PI05_TUNE") if name in os.environ}
    return {**found, **choices, "pi05_ros": __version__, "torch": torch.__version__, "cuda": torch.version.cuda,
            "triton": _version("triton"), "tensorrt": _version("tensorrt"), "python": platform.python_version(),
            "numpy": np.__version__}


def _origin(source: WeightSource) -> str:
    return {DeviceSource: "random, drawn on the GPU", RecipeSource: "random, by recipe"}.get(type(source), "checkpoint")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Memory:
    """Peaks of PyTorch's allocator since `start_memory`, and all that is in use on the device now (other programs too).

    held_gb: what was allocated at the start, and so belongs to somebody else.
    """

    allocated_gb: float
    reserved_gb: float
    device_gb: float
    held_gb: float


def release() -> None:
    """Give back what deleted models held: to be called before the next one is built alone."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def start_memory(device: torch.device) -> float | None:
    """Begin a peak; gives `held_gb` for `read_memory`."""
    release()
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 1e9


def read_memory(device: torch.device, held_gb: float | None) -> Memory | None:
    """None on a CPU, whose memory is not measured."""
    if held_gb is None:
        return None
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return Memory(torch.cuda.max_memory_allocated(device) / 1e9, torch.cuda.max_memory_reserved(device) / 1e9,
                  (total - free) / 1e9, held_gb)
