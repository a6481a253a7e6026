"""Repeated timing: CUDA events on a GPU, the monotonic clock elsewhere; medians and p99, never a mean."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Key = TypeVar("Key")
ROUNDS = 10
ORDER = (f"up to {ROUNDS} rounds; in each round every work in turn runs its share back to back after an untimed one; "
         "every other round goes backwards")


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


def in_turns(works: Mapping[Key, Callable[[], object]], device: torch.device, runs: int,
             on_progress: Callable[[int, int], None] | None = None) -> dict[Key, Times]:
    """Time every work `runs` times, in the order `ORDER` describes: what drifts (clocks, heat) meets all alike."""
    found: dict[Key, list[np.ndarray]] = {key: [] for key in works}
    shares = [len(part) for part in np.array_split(np.arange(runs), min(ROUNDS, runs))]
    keys = list(works)
    for number, share in enumerate(shares):
        for done, key in enumerate(reversed(keys) if number % 2 else keys):
            found[key].append(milliseconds(works[key], device, share, warmup=1 if number else 3).runs)
            if on_progress:
                on_progress(number * len(keys) + done + 1, len(shares) * len(keys))
    return {key: Times(np.concatenate(parts)) for key, parts in found.items()}
