"""Repeated timing: CUDA events on a GPU, the monotonic clock elsewhere; medians and p99, never a mean.

Back to back, or on a beat, as a robot's cameras ask for chunks: a GPU that works all the time grows hot and slow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Key = TypeVar("Key")
ROUNDS = 10
HOLD_CYCLES = 4_000_000  # of the GPU's clock: 2 ms at 2 GHz
ORDER = (f"up to {ROUNDS} rounds; in each round every work in turn runs its share after an untimed run; every other "
         "round goes backwards")


def pace(rate_hz: float) -> str:
    """How runs follow each other, in words."""
    return f"a run every {1e3 / rate_hz:.1f} ms" if rate_hz else "back to back"


@dataclass(frozen=True)
class Times:
    """Milliseconds of each run."""

    runs: np.ndarray

    @property
    def median(self) -> float:
        return float(np.median(self.runs))

    @property
    def p99(self) -> float:
        return float(np.percentile(self.runs, 99))


def milliseconds(work: Callable[[], object], device: torch.device, runs: int, warmup: int = 3) -> Times:
    """Time `work` `runs` times after `warmup` untimed ones."""
    for _ in range(warmup):
        work()
    if device.type != "cuda":
        edges = [time.perf_counter()]
        for _ in range(runs):
            work()
            edges.append(time.perf_counter())
        return Times(1e3 * np.diff(edges))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()  # behind the warm-up: the GPU is busy from here to the last event, unless the host is slower
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize(device)
    return Times(np.array([a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]))


def on_a_beat(work: Callable[[], object], device: torch.device, runs: int, rate_hz: float, warmup: int = 3,
              now: Callable[[], float] = time.perf_counter, wait: Callable[[float], None] = time.sleep) -> Times:
    """The same, and a run begins every 1 / `rate_hz` seconds; one that takes longer leaves beats out. A GPU is held
    meanwhile for `HOLD_CYCLES`: what the host takes to issue the run, if not longer, is not the device's time."""
    found, began_s, beat = [], now(), -1
    for _ in range(warmup + runs):
        beat = max(beat + 1, math.ceil((now() - began_s) * rate_hz))
        while (left_s := began_s + beat / rate_hz - now()) > 0:
            wait(left_s)
        if device.type == "cuda":
            torch.cuda._sleep(HOLD_CYCLES)
        found.append(milliseconds(work, device, runs=1, warmup=0).runs)
    return Times(np.concatenate(found[warmup:]))


def in_turns(works: Mapping[Key, Callable[[], object]], device: torch.device, runs: int,
             on_progress: Callable[[int, int], None] | None = None, rate_hz: float = 0.0) -> dict[Key, Times]:
    """Time every work `runs` times, in the order `ORDER` describes: what drifts (clocks, heat) meets all alike.
    `rate_hz`: on that beat, instead of back to back."""
    found: dict[Key, list[np.ndarray]] = {key: [] for key in works}
    shares = [len(part) for part in np.array_split(np.arange(runs), min(ROUNDS, runs))]
    keys = list(works)
    for number, share in enumerate(shares):
        for done, key in enumerate(reversed(keys) if number % 2 else keys):
            warmup = 1 if number else 3
            found[key].append((on_a_beat(works[key], device, share, rate_hz, warmup) if rate_hz else
                               milliseconds(works[key], device, share, warmup)).runs)
            if on_progress:
                on_progress(number * len(keys) + done + 1, len(shares) * len(keys))
    return {key: Times(np.concatenate(parts)) for key, parts in found.items()}
