"""`stages`: every stage alone, beside its floor, with its own error on float32 eager's inputs to that stage.

`images` is prepare_images from 640x480 camera frames on the host; its floor is the way up to the GPU.

JSON: stages {name: {median_ms, p99_ms, flop, bytes, upload_bytes, bound, floor_ms, gap, error}} where the error of
`prefix` is the larger of its keys' and values'; errors (of both), memory, backend, shape, runs, order, horizon, seed.
"""

from __future__ import annotations

from dataclasses import asdict

from pi05_ros.benchmark.clock import ORDER, in_turns
from pi05_ros.benchmark.error import StageTruth, stage_errors, truth
from pi05_ros.benchmark.findings import Findings, Gate, Table, gap
from pi05_ros.benchmark.inputs import Shape, random_inputs
from pi05_ros.benchmark.latency import describe_memory
from pi05_ros.benchmark.measure import parts
from pi05_ros.benchmark.recipes import error_limit
from pi05_ros.benchmark.setting import Setting, read_memory, start_memory

COLUMNS = ("stage", "GFLOP", "MB", "bound by", "floor ms", "median ms", "gap", "p99 ms", "error")


def run(setting: Setting, backend: str, shape: Shape, runs: int, seed: int) -> Findings:
    inputs = random_inputs(setting.config, setting.device, shape.cameras, shape.tokens, seed)
    with truth(setting) as right:
        expected = StageTruth.of(right, inputs, shape.steps)
        del right
    held = start_memory(setting.device)
    stages = setting.build(backend)
    errors = stage_errors(stages, inputs, shape.steps, expected, setting.dtype)
    works = {name: work for name, work in parts(stages, inputs, shape.steps).items() if name != "total"}
    with setting.watch("measuring") as update:
        times = in_turns(works, setting.device, runs, update)
    memory = read_memory(setting.device, held)
    by_stage = {**errors, "prefix": max(errors["keys"], errors["values"])}
    found, rows = {}, []
    for name, work in setting.work(shape, backend).items():
        t, floor = times[name], work.floor_ms(setting.ceiling)
        found[name] = {"median_ms": t.median, "p99_ms": t.p99, "flop": work.flop, "bytes": work.bytes,
                       "upload_bytes": work.upload, "bound": work.bound(setting.ceiling), "floor_ms": floor,
                       "gap": t.median / floor, "error": by_stage[name]}
        rows.append((name, f"{work.flop / 1e9:.1f}", f"{work.bytes / 1e6:.1f}", work.bound(setting.ceiling),
                     f"{floor:.3f}", f"{t.median:.3f}", gap(t.median, floor), f"{t.p99:.3f}", f"{by_stage[name]:.1e}"))
    horizon = setting.config.action_horizon
    title = f"{backend} {setting.dtype}, {shape} (cameras/tokens/steps), horizon {horizon}, {runs} runs"
    return Findings(
        [Table(title, COLUMNS, rows)],
        {"stages": found, "errors": errors, "memory": None if memory is None else asdict(memory), "backend": backend,
         "shape": asdict(shape), "runs": runs, "order": ORDER, "horizon": horizon, "seed": seed},
        [Gate(f"{name}: relative error", value, error_limit(backend, setting.dtype)) for name, value in errors.items()],
        ["errors: " + ", ".join(f"{name} {value:.1e}" for name, value in errors.items()), describe_memory(memory)])
