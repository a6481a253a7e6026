"""`profile`: where the remaining time goes, stage by stage: every kernel, the idle time between them, the floors.

A stage's time is measured without the profiler; kernel times are the GPU's own (CUPTI), of replays of the same stage.
`idle` is the time less the time in which any kernel ran; the profiler slows kernels a little, so it may come out below
zero. Products are what the model needs by shape, each with the floor of one call; a kernel may do several of them.

JSON: stages {name: {median_ms, busy_ms, idle_ms, floor_ms, gap, kernels [{name, calls, us_per_call, us, share}],
products [{name, shape, calls, flop, bytes, bound, floor_us_per_call, floor_us}]}} (calls and us per inference);
backend, shape, runs, horizon, seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pi05_ros.benchmark.clock import in_turns
from pi05_ros.benchmark.findings import Findings, Table, gap
from pi05_ros.benchmark.inputs import Shape, random_inputs
from pi05_ros.benchmark.measure import TIMED_STAGES, parts
from pi05_ros.benchmark.setting import Setting
from pi05_ros.benchmark.work import stage_products
from pi05_ros.errors import BackendError

SHOWN = 15  # kernels a table; the JSON has all
NAME_CHARACTERS = 70


@dataclass(frozen=True)
class Kernel:
    """One run of one kernel (or copy) on the GPU."""

    name: str
    start_us: float
    end_us: float


def run(setting: Setting, backend: str, shape: Shape, runs: int, seed: int) -> Findings:
    inputs = random_inputs(setting.config, setting.device, shape.cameras, shape.tokens, seed)
    works = parts(setting.build(backend), inputs, shape.steps)
    with setting.watch("measuring") as update:
        times = in_turns({stage: works[stage] for stage in TIMED_STAGES}, setting.device, runs, update)
    products = stage_products(setting.config, shape, setting.bytes_per_weight, setting.source_of(backend).quantisation)
    stages: dict[str, Any] = {}
    with setting.watch("profiling") as update:
        for done, stage in enumerate(TIMED_STAGES):
            kernels = record(works[stage], setting.device, runs)
            median, busy = times[stage].median, busy_us(kernels) / runs / 1e3
            floor = setting.work(shape, backend)[stage].floor_ms(setting.ceiling)
            stages[stage] = {"median_ms": median, "busy_ms": busy, "idle_ms": median - busy, "floor_ms": floor,
                             "gap": median / floor, "kernels": by_name(kernels, runs),
                             "products": [_product(p, setting) for p in products[stage]]}
            update(done + 1, len(TIMED_STAGES))
    horizon = setting.config.action_horizon
    title = f"{backend} {setting.dtype}, {shape} (cameras/tokens/steps), horizon {horizon}, {runs} runs"
    return Findings([_overview(title, stages), *(table for stage, data in stages.items()
                                                 for table in (_kernels(stage, data), _products(stage, data)))],
                    {"stages": stages, "backend": backend, "shape": asdict(shape), "runs": runs, "horizon": horizon,
                     "seed": seed})


def require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise BackendError("benchmark profile", expected="a GPU, whose kernels it shows", received=f"device '{device}'",
                           way_out="Use --device cuda on a machine with an NVIDIA GPU; `stages` runs anywhere.")


def record(work: Callable[[], object], device: torch.device, runs: int) -> list[Kernel]:
    """All that ran on the GPU during `runs` runs of `work`."""
    work()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            work()
        torch.cuda.synchronize(device)
    found = [Kernel(event.name, event.time_range.start, event.time_range.end) for event in profiler.events() or ()
             if event.device_type == torch.autograd.DeviceType.CUDA]
    if not found:
        raise BackendError("benchmark profile", expected="kernel times from the GPU", received="none",
                           way_out="PyTorch's profiler needs CUPTI; another profiler on this GPU may hold it.")
    return found


def by_name(kernels: Sequence[Kernel], runs: int) -> list[dict[str, Any]]:
    """Kernels of one name together, the longest first; calls and microseconds per run."""
    sums: dict[str, tuple[int, float]] = {}
    for kernel in kernels:
        calls, us = sums.get(kernel.name, (0, 0.0))
        sums[kernel.name] = calls + 1, us + kernel.end_us - kernel.start_us
    all_us = sum(us for _, us in sums.values())
    return [{"name": name, "calls": calls / runs, "us_per_call": us / calls, "us": us / runs, "share": us / all_us}
            for name, (calls, us) in sorted(sums.items(), key=lambda item: -item[1][1])]


def busy_us(kernels: Iterable[Kernel]) -> float:
    """Time in which at least one kernel ran."""
    busy, reached = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda k: k.start_us):
        busy += max(0.0, kernel.end_us - max(kernel.start_us, reached))
        reached = max(reached, kernel.end_us)
    return busy


def _product(product, setting: Setting) -> dict[str, Any]:
    floor_us = 1e3 * product.work.floor_ms(setting.ceiling)
    flop = product.work.flop + product.work.flop_fp8
    return {"name": product.name, "shape": product.shape, "calls": product.calls, "flop": flop,
            "bytes": product.work.bytes, "bound": product.work.bound(setting.ceiling), "floor_us_per_call": floor_us,
            "floor_us": product.calls * floor_us}


def _overview(title: str, stages: dict[str, Any]) -> Table:
    rows = [(name, f"{s['median_ms']:.3f}", f"{s['busy_ms']:.3f}", f"{s['idle_ms']:.3f}", f"{s['floor_ms']:.3f}",
             gap(s["median_ms"], s["floor_ms"]), f"{sum(k['calls'] for k in s['kernels']):.0f}")
            for name, s in stages.items()]
    return Table(title, ("stage", "median ms", "kernels ms", "idle ms", "floor ms", "gap", "kernels"), rows)


def _kernels(stage: str, data: dict[str, Any]) -> Table:
    shown, rest = data["kernels"][:SHOWN], data["kernels"][SHOWN:]
    rows = [(_short(k["name"]), f"{k['calls']:.4g}", f"{k['us_per_call']:.2f}", f"{k['us']:.1f}", f"{k['share']:.1%}")
            for k in shown]
    if rest:
        rows.append((f"{len(rest)} more", f"{sum(k['calls'] for k in rest):.4g}", "-",
                     f"{sum(k['us'] for k in rest):.1f}", f"{sum(k['share'] for k in rest):.1%}"))
    return Table(f"{stage}: kernels", ("kernel", "calls", "us a call", "us", "share"), rows)


def _products(stage: str, data: dict[str, Any]) -> Table:
    rows = [(p["name"], p["shape"], str(p["calls"]), f"{p['flop'] / 1e9:.2f}", f"{p['bytes'] / 1e6:.2f}", p["bound"],
             f"{p['floor_us_per_call']:.2f}", f"{p['floor_us']:.1f}") for p in data["products"]]
    columns = ("product", "rows x inner x columns", "calls", "GFLOP", "MB", "bound by", "floor us a call", "floor us")
    return Table(f"{stage}: products and their floors", columns, rows)


def _short(name: str) -> str:
    return name if len(name) <= NAME_CHARACTERS else name[: NAME_CHARACTERS - 1] + "…"
