"""`pipeline`: chunks in overlap against chunks one after the other, at the same shape, with the same noise.

Both run the node's own loop on its worker thread with an observation always at hand. Period: between two results.
Latency: from taking the observation to the result, host work and waiting included. Ideal period: that of the busier of
the two sides, as timed one after the other. Efficiency: ideal over achieved period. Hidden: share of the shorter side
that costs no time.

JSON: rows [{steps, sequential, pipelined {period_ms, period_p99_ms, latency_ms, latency_p99_ms}, front_ms, back_ms,
images_ms, ideal_ms, efficiency, hidden, latency_ratio, identical}], boundary, side_by_side, chunks, seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np

from pi05_ros.backends.base import StageSet
from pi05_ros.benchmark.findings import Findings, Gate, Table
from pi05_ros.benchmark.setting import Setting
from pi05_ros.benchmark.timeline import Recorder, Span, last_chunks, write_picture, write_trace
from pi05_ros.benchmark.workload import NOTHING, Workload
from pi05_ros.runtime.inference_loop import Delivery, InferenceLoop
from pi05_ros.runtime.mailbox import InputLimits, Mailbox, Stamped
from pi05_ros.runtime.pipelined import SPLIT, Boundary, Pipeline, check_overlap
from pi05_ros.runtime.sequential import ChunkPipeline, Sequential
from pi05_ros.runtime.trigger import LoopSettings
from pi05_ros.runtime.worker import Worker

COLUMNS = ("steps", "period one by one, ms", "in overlap", "its p99", "latency one by one, ms", "in overlap", "ratio",
           "front ms", "back ms", "efficiency", "hidden", "same bits")
WARM_UP = 5  # chunks of each run that are not counted
DRAWN = 4  # chunks in a drawing


@dataclass(frozen=True)
class Targets:
    """Limits of the last row; None where there is none."""

    period_ms: float | None = None
    latency_ratio: float | None = None


@dataclass(frozen=True)
class Flow:
    """Medians and p99 of one run, ms."""

    period_ms: float
    period_p99_ms: float
    latency_ms: float
    latency_p99_ms: float


@dataclass(frozen=True)
class Row:
    """One number of denoising steps. front_ms, back_ms: the stages on either side of the boundary, one after the other;
    images_ms: stage 0, host work included, which belongs to the front."""

    steps: int
    sequential: Flow
    pipelined: Flow
    images_ms: float
    front_ms: float
    back_ms: float
    identical: bool

    @property
    def ideal_ms(self) -> float:
        return max(self.front_ms, self.back_ms)

    @property
    def efficiency(self) -> float:
        return self.ideal_ms / self.pipelined.period_ms

    @property
    def hidden(self) -> float:
        return (self.sequential.period_ms - self.pipelined.period_ms) / min(self.front_ms, self.back_ms)

    @property
    def latency_ratio(self) -> float:
        return self.pipelined.latency_ms / self.sequential.latency_ms

    def cells(self) -> tuple[str, ...]:
        """A table's row, in the order of COLUMNS."""
        return (str(self.steps), f"{self.sequential.period_ms:.2f}", f"{self.pipelined.period_ms:.2f}",
                f"{self.pipelined.period_p99_ms:.2f}", f"{self.sequential.latency_ms:.2f}",
                f"{self.pipelined.latency_ms:.2f}", f"{self.latency_ratio:.2f} x", f"{self.front_ms:.2f}",
                f"{self.back_ms:.2f}", f"{100 * self.efficiency:.0f} %", f"{100 * self.hidden:.0f} %",
                "yes" if self.identical else "NO")

    def as_data(self) -> dict[str, Any]:
        return {**asdict(self), "ideal_ms": self.ideal_ms, "efficiency": self.efficiency, "hidden": self.hidden,
                "latency_ratio": self.latency_ratio}


class Plenty(Mailbox):
    """Always complete: every take is an observation of this moment."""

    def complete(self) -> bool:
        return True

    def take(self, now_ns: int) -> Mapping[str, Stamped]:
        return {self.STATE: Stamped(None, now_ns, now_ns)}


def run_chunks(make: Callable[[], ChunkPipeline], steps: int, count: int) -> list[tuple[Delivery, int]]:
    """The first `count` chunks of the node's loop and when each was handed over, ns; all on one worker thread."""
    done: Queue[tuple[Delivery, int] | tuple[int, Exception]] = Queue()
    worker = Worker()
    try:
        loop = InferenceLoop(
            worker.call(make).result(), 0.02, Plenty((), limits=InputLimits(max_age_s=60.0)),
            lambda taken, prompt: NOTHING, lambda: LoopSettings(steps), time.perf_counter_ns,
            lambda delivery: done.put((delivery, time.perf_counter_ns())), done.put)
        worker.repeat(loop.due, loop.step)
        loop.open(1)
        worker.wake()
        found: list[tuple[Delivery, int]] = []
        while len(found) < count:
            first, second = done.get()
            if isinstance(second, Exception):
                raise second
            assert isinstance(first, Delivery)
            found.append((first, second))
        worker.call(loop.forget_policy).result()
        return found
    finally:
        worker.stop()


def measure(stages: StageSet, cameras: int, tokens: int, step_counts: Iterable[int], chunks: int, seed: int,
            boundary: Boundary = "prefix", side_by_side: bool = False, frame: tuple[int, int] = (480, 640),
            on_progress: Callable[[int, int], None] = lambda done, total: None) -> list[Row]:
    """A row for each number of steps: `chunks` chunks one after the other, then as many in overlap."""
    workload, rows, counts = Workload(stages, cameras, tokens, seed, frame), [], list(step_counts)
    check_overlap(workload, boundary)
    for done, steps in enumerate(counts):
        sequential = run_chunks(partial(Sequential, workload), steps, chunks + WARM_UP)
        overlap = partial(Pipeline, workload, boundary, side_by_side=side_by_side)
        pipelined = run_chunks(overlap, steps, chunks + WARM_UP)
        front, back = SPLIT[boundary]
        rows.append(Row(
            steps, flow(sequential), flow(pipelined), side(sequential, ("images",)), side(sequential, front),
            side(sequential, back), same(sequential, pipelined)))
        on_progress(done + 1, len(counts))
    return rows


def run(setting: Setting, backend: str, cameras: int, tokens: int, step_counts: Sequence[int], chunks: int, seed: int,
        boundary: Boundary, side_by_side: bool, targets: Targets, trace: Path | None = None,
        picture: Path | None = None) -> Findings:
    """Rows for each number of steps; the drawing, where asked for, is of the last one. Targets are for it, too."""
    stages = setting.build(backend)
    with setting.watch("chunks") as update:
        rows = measure(stages, cameras, tokens, step_counts, chunks, seed, boundary, side_by_side,
                       on_progress=update)
    notes = []
    if trace or picture:
        spans = last_chunks(record(stages, cameras, tokens, step_counts[-1], DRAWN + WARM_UP, seed, boundary,
                                   side_by_side), DRAWN)
        if trace:
            write_trace(spans, trace)
        if picture:
            write_picture(spans, picture, f"{backend} {setting.dtype}, {cameras} cameras, {tokens} tokens, "
                                          f"{step_counts[-1]} steps: {DRAWN} chunks in overlap")
        notes = [f"drawn: {', '.join(str(path) for path in (trace, picture) if path)}"]
    gates = [Gate(f"{row.steps} steps: chunks that differ", float(not row.identical), 0.0) for row in rows]
    last = rows[-1]
    if targets.period_ms is not None:
        gates.append(Gate(f"{last.steps} steps: period, ms", last.pipelined.period_ms, targets.period_ms))
    if targets.latency_ratio is not None:
        gates.append(Gate(f"{last.steps} steps: latency ratio", last.latency_ratio, targets.latency_ratio))
    title = f"{backend} {setting.dtype}, {cameras} cameras, {tokens} tokens, {chunks} chunks, boundary {boundary}" + (
        ", side by side" if side_by_side else "")
    return Findings([Table(title, COLUMNS, [row.cells() for row in rows])],
                    {"rows": [row.as_data() for row in rows], "boundary": boundary,
                     "side_by_side": side_by_side, "chunks": chunks, "seed": seed},
                    gates, notes)


def record(stages: StageSet, cameras: int, tokens: int, steps: int, chunks: int, seed: int,
           boundary: Boundary = "prefix", side_by_side: bool = False,
           frame: tuple[int, int] = (480, 640)) -> list[Span]:
    """The stages of `chunks` chunks in overlap, for timeline.py."""
    workload, recorders = Workload(stages, cameras, tokens, seed, frame), []

    def make() -> Pipeline:
        recorders.append(Recorder(stages.device))
        return Pipeline(workload, boundary, observe=recorders[0], side_by_side=side_by_side)

    run_chunks(make, steps, chunks)
    return recorders[0].spans


def flow(run: list[tuple[Delivery, int]]) -> Flow:
    handed_over = np.array([at_ns for _, at_ns in run][WARM_UP - 1:])
    latencies = 1e-6 * np.array([at_ns - delivery.started_ns for delivery, at_ns in run][WARM_UP:])
    periods = 1e-6 * np.diff(handed_over)
    return Flow(float(np.median(periods)), float(np.percentile(periods, 99)), float(np.median(latencies)),
                float(np.percentile(latencies, 99)))


def side(run: list[tuple[Delivery, int]], stages: Iterable[str]) -> float:
    """Median of the sum of some stages, ms."""
    times = [sum(delivery.chunk.stage_times_ms[stage] for stage in stages) for delivery, _ in run[WARM_UP:]]
    return float(np.median(times))


def same(one: list[tuple[Delivery, int]], other: list[tuple[Delivery, int]]) -> bool:
    """Whether chunk k has the same bits in both, for every k."""
    return all(a.chunk.chunk_index == b.chunk.chunk_index and np.array_equal(a.chunk.normalised, b.chunk.normalised)
               for (a, _), (b, _) in zip(one, other, strict=True))
