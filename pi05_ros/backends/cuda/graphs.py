"""Capture once, replay for ever: a stage's work as CUDA graphs, one a shape."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch


class StageGraphs:
    """The graphs of one stage, with a stream and a memory pool of their own (shapes never run at once, so one pool)."""

    def __init__(self, works: Iterable[tuple[Hashable, Callable[[], None]]], device: torch.device) -> None:
        """`works`: shape and the work on static buffers; each runs once before it is captured."""
        stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        for shape, work in works:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                work()  # compiles kernels and lets cuBLAS choose, which capture does not allow
            stream.synchronize()
            self.graphs[shape] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[shape], pool=pool, stream=stream):
                work()

    def replay(self, shape: Hashable) -> None:
        """On the current stream."""
        self.graphs[shape].replay()
