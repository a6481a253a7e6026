"""Milliseconds per stage: CUDA events on a GPU, the monotonic clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageTimer:
    """Times named parts of one inference; `milliseconds()` waits for the device once, at the end."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: dict[str, tuple] = {}
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._marks[name] = (begin, self._now())

    def milliseconds(self) -> dict[str, float]:
        """Every stage, and `total`: wall time since construction, the wait for the device included."""
        if self._cuda:
            torch.cuda.synchronize()
            times = {name: begin.elapsed_time(end) for name, (begin, end) in self._marks.items()}
        else:
            times = {name: 1e3 * (end - begin) for name, (begin, end) in self._marks.items()}
        return {**times, "total": 1e3 * (time.perf_counter() - self._start)}

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
