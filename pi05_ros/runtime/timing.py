"""Milliseconds per stage: CUDA events on a GPU, the monotonic clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pi05_ros.runtime.streams import HostMark, Mark, mark_here


class StageTimer:
    """Times named parts of one inference, each in the stream that is current there.

    `spans` holds the two marks of every part; nothing waits for the device before `milliseconds()`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.spans: dict[str, tuple[Mark, Mark]] = {}
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A part that runs on the device."""
        with self._between(name, lambda: mark_here(self._device)):
            yield

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """A part that runs on the host."""
        with self._between(name, HostMark):
            yield

    def milliseconds(self) -> dict[str, float]:
        """Every part, and `total`: wall time since construction. Waits for the last mark of each part."""
        for _, end in self.spans.values():
            end.wait()
        times = {name: begin.ms_until(end) for name, (begin, end) in self.spans.items()}
        return {**times, "total": 1e3 * (time.perf_counter() - self._start)}

    @contextmanager
    def _between(self, name: str, mark: Callable[[], Mark]) -> Iterator[None]:
        begin = mark()
        yield
        self.spans[name] = begin, mark()
