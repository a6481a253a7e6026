"""Streams and marks: what may run at once, and how the host learns that it is done. CUDA on a GPU, inline elsewhere."""

from __future__ import annotations

import gc
import time
from types import TracebackType
from typing import Protocol

import torch


class Mark(Protocol):
    """A place in a stream's order; reached once all work issued before it is done."""

    def reached(self) -> bool:
        """Never blocks."""

    def wait(self) -> None:
        """The host waits until it is reached."""

    def ms_until(self, later: Mark) -> float:
        """Milliseconds between two reached marks of one device."""


class Stream(Protocol):
    """Work issued inside `with stream:` runs in order, and beside that of other streams."""

    def __enter__(self) -> object: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None: ...

    def mark(self) -> Mark:
        """After what was issued so far."""

    def wait(self, mark: Mark) -> None:
        """What is issued from now on runs after `mark`; the host goes on at once."""


class HostMark:
    """A moment of the host's monotonic clock, reached when made."""

    def __init__(self) -> None:
        self.ns = time.perf_counter_ns()

    def reached(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def ms_until(self, later: Mark) -> float:
        assert isinstance(later, HostMark)
        return (later.ns - self.ns) * 1e-6


class InlineStream:
    """Without a GPU a call returns when its work is done."""

    def __enter__(self) -> InlineStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        pass

    def mark(self) -> Mark:
        return HostMark()

    def wait(self, mark: Mark) -> None:
        mark.wait()


class CudaMark:
    """An event; the waiting thread sleeps instead of spinning."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True, blocking=True)
        self.event.record(stream)

    def reached(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()

    def ms_until(self, later: Mark) -> float:
        assert isinstance(later, CudaMark)
        return self.event.elapsed_time(later.event)


class CudaStream:
    """`priority`: lower is served first, as in CUDA. Its work comes after all that the thread has issued so far."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self._stream = torch.cuda.Stream(device, priority=priority)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._context: torch.cuda.StreamContext | None = None

    def __enter__(self) -> CudaStream:
        self._context = torch.cuda.stream(self._stream)
        self._context.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        assert self._context is not None
        self._context.__exit__(kind, error, trace)

    def mark(self) -> Mark:
        return CudaMark(self._stream)

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, CudaMark)
        self._stream.wait_event(mark.event)


def new_stream(device: torch.device, priority: int = 0) -> Stream:
    return CudaStream(device, priority) if device.type == "cuda" else InlineStream()


def mark_here(device: torch.device) -> Mark:
    """A mark in the stream that is current on this thread."""
    return CudaMark(torch.cuda.current_stream(device)) if device.type == "cuda" else HostMark()


def release_memory() -> None:
    """Return what nobody uses to the GPU, so that a model can be loaded again or by another program."""
    if torch.cuda.is_initialized():
        gc.collect()  # graphs and their buffers may stand in cycles
        torch.cuda.empty_cache()
