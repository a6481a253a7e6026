"""`latency`: one backend at one shape, stage by stage and in all, beside the floor, the memory and the error.

`total` is device time from 224x224 uint8 images, tokens and noise on the device to actions on the device; `images` is
stage 0 from 640x480 camera frames on the host, reported beside it.

JSON: backend, shape, median_ms, p99_ms, floor_ms, gap (each by stage and `total`), p99_ratio (of the total, over its
median), error, error_limit, repeats, memory {allocated_gb, reserved_gb: PyTorch's peaks, loading included; device_gb:
in use on the device; held_gb: allocated before}, energy {joules: a run among others back to back, the GPU's whole
draw; watts; limit_watts: of the GPU} or why there is none, runs, rate_hz (0: back to back), order, horizon, seed.
"""

from __future__ import annotations

from pi05_ros.benchmark.clock import ORDER, pace
from pi05_ros.benchmark.findings import Findings, Table, gap
from pi05_ros.benchmark.inputs import Shape
from pi05_ros.benchmark.measure import Row, Targets, measure, sound
from pi05_ros.benchmark.setting import Memory, Setting


def run(setting: Setting, backend: str, shape: Shape, runs: int, seed: int, targets: Targets,
        rate_hz: float = 0.0) -> Findings:
    (row,) = measure(setting, [backend], [shape], runs, seed, rate_hz)
    horizon = setting.config.action_horizon
    title = (f"{backend} {setting.dtype}, {shape.cameras} cameras, {shape.tokens} tokens, horizon {horizon}, "
             f"{shape.steps} steps, {runs} runs, {pace(rate_hz)}")
    rows = [(name, f"{t.median:.3f}", f"{t.p99:.3f}", f"{row.floors_ms[name]:.3f}",
             gap(t.median, row.floors_ms[name])) for name, t in row.times.items()]
    return Findings([Table(title, ("stage", "median ms", "p99 ms", "floor ms", "gap"), rows)],
                    {**row.as_data(), "runs": runs, "rate_hz": rate_hz, "order": ORDER, "horizon": horizon,
                     "seed": seed},
                    [*sound(row), *targets.gates(row, 0)], [describe(row)])


def describe(row: Row) -> str:
    """Error, repeatability and memory in a sentence."""
    return (f"relative error to float32 eager {row.error:.2e}; p99 {row.p99_ratio:.3f} x the median; repeats "
            f"{'bit for bit' if row.repeats else 'DIFFER'}; {describe_memory(row.memory)}; {row.energy}")


def describe_memory(memory: Memory | None) -> str:
    if memory is None:
        return "memory is measured on a GPU only"
    return (f"memory {memory.allocated_gb:.2f} GB allocated, {memory.reserved_gb:.2f} GB reserved at most, "
            f"{memory.device_gb:.2f} GB in use on the device")
