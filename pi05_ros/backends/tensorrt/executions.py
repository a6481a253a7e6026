"""One engine with its static tensors: work goes to the current stream, as a CUDA graph where its shapes come again."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from pi05_ros.backends.cuda.graphs import StageGraphs
from pi05_ros.backends.tensorrt.runner import ALIGNMENT, Engine, Execution, Shape
from pi05_ros.errors import BackendError

MOST_GRAPHS = 16  # sets of shapes of one engine that get a graph: the first ones that come a second time
log = logging.getLogger(__name__)


def graphs_wanted() -> bool:
    """$PI05_TENSORRT_GRAPHS: 0 enqueues every time."""
    return os.environ.get("PI05_TENSORRT_GRAPHS", "1") != "0"


class StageEngine:
    """Tensors for every binding, each as large as the profile allows, and memory for one context at a time.

    Raises:
        BackendError: no room on the device.
    """

    def __init__(self, engine: Engine, device: torch.device, capture: bool) -> None:
        self.engine, self.device, self._capture = engine, device, capture
        specs = (*engine.entry.inputs, *engine.entry.outputs)
        try:
            self._flat = {spec.name: torch.zeros(math.prod(spec.max), dtype=getattr(torch, spec.dtype), device=device)
                          for spec in specs}
            self._memory = torch.empty(engine.memory_bytes + ALIGNMENT, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise BackendError(f"engine '{engine.entry.path}'", received="less", cause="out_of_memory",
                               expected=f"{engine.memory_bytes / 1e9:.2f} GB of GPU memory beside its weights",
                               way_out="Close other programs on the GPU, or run some stages elsewhere (vision=...)."
                               ) from error
        self._max = {spec.name: tuple(spec.max) for spec in specs}
        self._roaming: Execution | None = None  # for shapes without a graph
        self._graphs: dict[object, StageGraphs] = {}
        self._seen: set[object] = set()

    def view(self, name: str, shape: Shape | None = None) -> Tensor:
        """The static tensor of a binding, contiguous in `shape` (its largest if not given)."""
        shape = self._max[name] if shape is None else shape
        if len(shape) != len(self._max[name]) or any(n > most for n, most in zip(shape, self._max[name], strict=True)):
            raise BackendError(f"'{name}' of engine '{self.engine.entry.key.graph}'", received=str(list(shape)),
                               expected=f"at most {list(self._max[name])}", way_out="Trim the inputs, or export with "
                               "--cameras and --tokens as they are here and build again.")
        return self._flat[name][:math.prod(shape)].view(shape)

    def output(self, name: str) -> Tensor:
        """As the last run without a graph left it, in the shape that TensorRT says."""
        assert self._roaming is not None, "nothing was run"
        return self.view(name, self._roaming.output_shape(name))

    def run(self, shapes: Mapping[str, Shape]) -> None:
        """From the static inputs, which have these shapes, to the static outputs."""
        key = tuple(sorted(shapes.items()))
        if key in self._graphs:
            self._graphs[key].replay(key)
        elif self._capture and key in self._seen and len(self._graphs) < MOST_GRAPHS:
            self.prepare(shapes)
            self.run(shapes)
        else:
            self._seen.add(key)
            self._enqueue(shapes)

    def prepare(self, shapes: Mapping[str, Shape]) -> None:
        """Capture a graph for these shapes, where it is allowed; otherwise they go on being enqueued."""
        if not self._capture:
            return
        key, execution = tuple(sorted(shapes.items())), self._execution(shapes)
        if not execution.capturable(torch.cuda.Stream(self.device).cuda_stream):
            log.info("%s: TensorRT does not let itself be captured; it is enqueued", self.engine.entry.key.graph)
            self._capture = False
            return
        try:
            self._graphs[key] = StageGraphs([(key, lambda: execution.enqueue(self._stream()))], self.device)
        except RuntimeError as error:
            raise BackendError(f"engine '{self.engine.entry.path}'", expected="to be captured as a CUDA graph",
                               received=str(error), way_out="Set PI05_TENSORRT_GRAPHS=0.") from error

    def _enqueue(self, shapes: Mapping[str, Shape]) -> None:
        if self._roaming is None:
            self._roaming = self._execution(shapes)
        elif self._roaming.shapes != shapes:
            self._roaming.set_shapes(shapes)
        if self.device.type != "cuda" or self._stream():
            self._roaming.enqueue(self._stream())
            return
        current, beside = torch.cuda.current_stream(self.device), self._beside()  # TensorRT shuns the default stream
        beside.wait_stream(current)
        self._roaming.enqueue(beside.cuda_stream)
        current.wait_stream(beside)

    def _beside(self) -> torch.cuda.Stream:
        if not hasattr(self, "_own_stream"):
            self._own_stream = torch.cuda.Stream(self.device)
        return self._own_stream

    def _execution(self, shapes: Mapping[str, Shape]) -> Execution:
        start = self._memory.data_ptr()
        return Execution(self.engine, {name: tensor.data_ptr() for name, tensor in self._flat.items()}, shapes,
                         start + -start % ALIGNMENT, self._stream())

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
