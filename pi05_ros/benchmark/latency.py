"""One observation to actions: time of each stage and of all, beside the floor, the memory and the error."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi05_ros.backends import base
from pi05_ros.benchmark.ceiling import Ceiling, measure_ceiling, stage_work
from pi05_ros.benchmark.clock import Times, milliseconds
from pi05_ros.benchmark.inputs import BenchmarkInputs, random_inputs
from pi05_ros.model.weights import Progress, WeightSource, parse_dtype


@dataclass(frozen=True)
class LatencyResult:
    """times per stage and `total`; floors in ms; error: relative, to float32 eager on the same inputs."""

    times: dict[str, Times]
    floors_ms: dict[str, float]
    ceiling: Ceiling
    memory_gb: float | None
    error: float
    environment: dict[str, Any]


def run_stages(stages: base.StageSet, inputs: BenchmarkInputs, num_steps: int) -> Tensor:
    """All four stages, from uint8 frames to actions."""
    tokens = stages.vision.encode_images(stages.images.prepare_images(inputs.frames))
    cache = stages.prefix.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
    return stages.expert.denoise(cache, inputs.noise, num_steps, inputs.state)


def measure(source: WeightSource, backend: str, device: str, dtype: str, cameras: int, tokens: int | None,
            num_steps: int, runs: int, seed: int, on_progress: Progress | None = None) -> LatencyResult:
    """Load, warm up, time, then compare with float32 eager."""
    config, where = source.config, base.check_device(device)
    tokens = config.max_token_len if tokens is None else tokens
    ceiling = measure_ceiling(where, parse_dtype(dtype))
    inputs = random_inputs(config, where, cameras, tokens, seed)
    if where.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stages = base.build(backend, source, where, dtype, on_progress=on_progress)
    actions = run_stages(stages, inputs, num_steps)
    if not torch.equal(actions, run_stages(stages, inputs, num_steps)):
        raise RuntimeError("two runs on the same inputs gave different actions")
    times = time_stages(stages, inputs, num_steps, runs)
    memory = torch.cuda.max_memory_allocated() / 1e9 if where.type == "cuda" else None
    del stages
    reference = base.build("eager", source, where, "float32", on_progress=on_progress)
    error = relative_error(actions, run_stages(reference, inputs, num_steps))
    work = stage_work(config, cameras, tokens, num_steps, torch.finfo(parse_dtype(dtype)).bits // 8)
    floors = {stage: w.floor_ms(ceiling) for stage, w in work.items()}
    return LatencyResult(times, {**floors, "total": sum(floors.values())}, ceiling, memory, error, environment(where))


def time_stages(stages: base.StageSet, inputs: BenchmarkInputs, num_steps: int, runs: int) -> dict[str, Times]:
    """Each stage alone on the real output of the one before, then all after `images` together as `total`."""
    device = stages.device
    pixels = stages.images.prepare_images(inputs.frames)
    tokens = stages.vision.encode_images(pixels)
    prefix = (inputs.image_mask, inputs.tokens, inputs.token_mask)
    cache = stages.prefix.prefill(tokens, *prefix)
    parts = {
        "images": lambda: stages.images.prepare_images(inputs.frames),
        "vision": lambda: stages.vision.encode_images(pixels),
        "prefix": lambda: stages.prefix.prefill(tokens, *prefix),
        "expert": lambda: stages.expert.denoise(cache, inputs.noise, num_steps, inputs.state),
        "total": lambda: stages.expert.denoise(
            stages.prefix.prefill(stages.vision.encode_images(pixels), *prefix), inputs.noise, num_steps, inputs.state),
    }
    return {name: milliseconds(part, device, runs) for name, part in parts.items()}


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {"device": name, "cores": os.cpu_count(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "python": platform.python_version(), "numpy": np.__version__}
