"""Backends side by side: memory of each built alone, then times in turns, error and repeatability."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi05_ros.backends import base
from pi05_ros.benchmark import error
from pi05_ros.benchmark.clock import Times, in_turns
from pi05_ros.benchmark.energy import Energy, measure_energy
from pi05_ros.benchmark.error import relative_error, run_stages
from pi05_ros.benchmark.findings import Gate
from pi05_ros.benchmark.inputs import BenchmarkInputs, Shape, random_inputs
from pi05_ros.benchmark.recipes import split_choice
from pi05_ros.benchmark.setting import Memory, Setting, read_memory, release, start_memory
from pi05_ros.errors import ConfigError
from pi05_ros.model.images import to_unit

OVER_EAGER = 1.2  # a backend's error over eager's with the same quantised weights
TIMED_STAGES = ("vision", "prefix", "expert")  # what `total` is made of, and its floor


@dataclass(frozen=True)
class Row:
    """One backend at one shape. error: of the actions, relative to float32 eager, and error_limit (None: eager with
    quantised weights, which says what a recipe costs); repeats: bit for bit; ran: how many quantised layers run how."""

    backend: str
    shape: Shape
    times: dict[str, Times]
    floors_ms: dict[str, float]
    memory: Memory | None
    error: float
    error_limit: float | None
    repeats: bool
    ran: dict[str, int] = field(default_factory=dict)
    energy: Energy | str = "not measured"  # of the total, or why there is none

    @property
    def p99_ratio(self) -> float:
        return self.times["total"].p99 / self.times["total"].median

    def as_data(self) -> dict[str, Any]:
        return {"backend": self.backend, "shape": {**asdict(self.shape)},
                "median_ms": {name: t.median for name, t in self.times.items()},
                "p99_ms": {name: t.p99 for name, t in self.times.items()}, "floor_ms": self.floors_ms,
                "gap": {name: t.median / self.floors_ms[name] for name, t in self.times.items()},
                "p99_ratio": self.p99_ratio, "error": self.error, "error_limit": self.error_limit,
                "repeats": self.repeats, "ran": self.ran,
                "memory": None if self.memory is None else asdict(self.memory),
                "energy": self.energy if isinstance(self.energy, str) else asdict(self.energy)}


@dataclass(frozen=True)
class Targets:
    """Limits a user sets: total in ms (one, or one a shape), p99 over median, peak of reserved memory in GB."""

    max_ms: Sequence[float] = ()
    max_p99: float | None = None
    max_memory_gb: float | None = None

    def check(self, shapes: Sequence[Shape]) -> None:
        """Raises ConfigError where there are neither as many times as shapes, nor one for all, nor none."""
        if len(self.max_ms) not in (0, 1, len(shapes)):
            raise ConfigError("--max-ms", expected=f"one number, or one for each of {len(shapes)} shapes",
                              received=str(len(self.max_ms)), way_out="Give them in the order of --cases.")

    def gates(self, row: Row, index: int) -> list[Gate]:
        """`index`: of the row's shape."""
        where, found = f"{row.backend} {row.shape}", []
        if self.max_ms:
            limit = self.max_ms[index if len(self.max_ms) > 1 else 0]
            found.append(Gate(f"{where}: total ms", row.times["total"].median, limit))
        if self.max_p99 is not None:
            found.append(Gate(f"{where}: p99 / median", row.p99_ratio, self.max_p99))
        if self.max_memory_gb is not None:
            found.append(Gate(f"{where}: reserved GB", row.memory.reserved_gb if row.memory else float("nan"),
                              self.max_memory_gb))
        return found


def sound(row: Row) -> list[Gate]:
    """What must hold of every backend: small error, bit-identical repeats."""
    where = f"{row.backend} {row.shape}"
    small = [] if row.error_limit is None else [Gate(f"{where}: relative error", row.error, row.error_limit)]
    return [*small, Gate(f"{where}: repeats that differ", float(not row.repeats), 0.0)]


def parts(stages: base.StageSet, inputs: BenchmarkInputs, num_steps: int) -> dict[str, Callable[[], object]]:
    """What is timed: each stage on the real output of the one before, and `total`.

    `images` starts from raw camera frames on the host, for a GPU in pinned memory as the node keeps them. `total`
    starts from 224x224 uint8 images, tokens and noise on the device, and ends with actions on the device.
    """
    prefix = (inputs.image_mask, inputs.tokens, inputs.token_mask)
    uint8 = torch.from_numpy(np.concatenate(inputs.frames)).to(stages.device)
    pixels = stages.images.prepare_images(inputs.frames)
    tokens = stages.vision.encode_images(pixels)
    cache = stages.prefix.prefill(tokens, *prefix)

    def total() -> object:
        image_tokens = stages.vision.encode_images((to_unit(uint8) * 2.0 - 1.0).contiguous()[None])
        return stages.expert.denoise(stages.prefix.prefill(image_tokens, *prefix), inputs.noise, num_steps,
                                     inputs.state)

    return {
        "images": lambda: stages.images.prepare_images(inputs.camera_frames),
        "vision": lambda: stages.vision.encode_images(pixels),
        "prefix": lambda: stages.prefix.prefill(tokens, *prefix),
        "expert": lambda: stages.expert.denoise(cache, inputs.noise, num_steps, inputs.state),
        "total": total,
    }


def measure(setting: Setting, choices: Sequence[str], shapes: Sequence[Shape], runs: int, seed: int,
            rate_hz: float = 0.0) -> list[Row]:
    """Rows of every shape and backend. At most one model is on the device until the timing, then all of `choices`.
    `rate_hz`: of the timed runs, 0 is back to back."""
    inputs = {shape: random_inputs(setting.config, setting.device, shape.cameras, shape.tokens, seed)
              for shape in shapes}
    with error.truth(setting) as right:
        actions = {shape: run_stages(right, inputs[shape], shape.steps) for shape in shapes}
        del right
    limits = _error_limits(setting, choices, inputs, actions)
    built: dict[str, base.StageSet] = {}
    memory: dict[str, Memory | None] = {}
    for choice in choices:
        built.clear()
        built[choice], memory[choice] = _alone(setting, choice, inputs)
    for choice in choices[:-1]:
        built[choice] = setting.build(choice)
    rows = []
    for shape in shapes:
        first = {choice: run_stages(built[choice], inputs[shape], shape.steps) for choice in choices}
        times = _times(setting, built, choices, inputs[shape], shape, runs, rate_hz)
        for choice in choices:
            total = parts(built[choice], inputs[shape], shape.steps)["total"]
            energy = measure_energy(total, setting.device, times[choice]["total"].median)
            floors = {stage: work.floor_ms(setting.ceiling) for stage, work in setting.work(shape, choice).items()}
            floors["total"] = sum(floors[stage] for stage in TIMED_STAGES)
            again = run_stages(built[choice], inputs[shape], shape.steps)
            rows.append(Row(choice, shape, times[choice], floors, memory[choice],
                            relative_error(first[choice], actions[shape]), limits[choice, shape],
                            torch.equal(first[choice], again), dict(Counter(built[choice].runs.values())), energy))
    return rows


def _error_limits(setting: Setting, choices: Sequence[str], inputs: Mapping[Shape, BenchmarkInputs],
                  actions: Mapping[Shape, Tensor]) -> dict[tuple[str, Shape], float | None]:
    """Of every backend at every shape: the dtype's limit, with quantised weights what eager makes of them times
    `OVER_EAGER`."""
    limits: dict[tuple[str, Shape], float | None] = {}
    for choice in choices:
        backend, recipe = split_choice(choice)
        if not recipe or backend == "eager":
            limits |= {(choice, shape): None if recipe else error.ERROR_LIMITS[setting.dtype] for shape in inputs}
            continue
        release()
        eager = setting.build(f"eager@{recipe}")
        limits |= {(choice, shape): OVER_EAGER * relative_error(run_stages(eager, given, shape.steps), actions[shape])
                   for shape, given in inputs.items()}
        del eager
    release()
    return limits


def _alone(setting: Setting, choice: str,
           inputs: Mapping[Shape, BenchmarkInputs]) -> tuple[base.StageSet, Memory | None]:
    """Build with nothing else on the device, run every shape once, read the peaks."""
    held = start_memory(setting.device)
    stages = setting.build(choice)
    for shape, given in inputs.items():
        run_stages(stages, given, shape.steps)
    memory = read_memory(setting.device, held)
    release()
    return stages, memory


def _times(setting: Setting, built: Mapping[str, base.StageSet], choices: Sequence[str], inputs: BenchmarkInputs,
           shape: Shape, runs: int, rate_hz: float) -> dict[str, dict[str, Times]]:
    works = {(choice, part): work for choice in choices
             for part, work in parts(built[choice], inputs, shape.steps).items()}
    with setting.watch(f"measuring {shape}") as update:
        times = in_turns(works, setting.device, runs, update, rate_hz)
    return {choice: {part: t for (name, part), t in times.items() if name == choice} for choice in choices}
