"""Repeated timing: CUDA events on a GPU, the monotonic clock elsewhere; medians and p99, never a mean."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


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
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return Times(np.array([a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]))
