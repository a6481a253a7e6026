"""Engines that run: addresses and streams are plain integers, so this file knows no framework. Python 3.10 on.

An `Engine` is one loaded plan. An `Execution` is one context with its shapes and addresses bound once; enqueueing it is
all that is left to do, or to capture as a CUDA graph. A captured graph remembers its context's state, so each set of
shapes that is captured gets an `Execution` of its own; those that never run at once may share one block of memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pi05_ros.backends.tensorrt.api import Api
from pi05_ros.backends.tensorrt.build import way_out
from pi05_ros.backends.tensorrt.build_log import BuildLog
from pi05_ros.backends.tensorrt.names import TensorSpec
from pi05_ros.backends.tensorrt.plan_cache import PlanEntry, read_plan
from pi05_ros.backends.tensorrt.select import same_gpu
from pi05_ros.errors import BackendError

ALIGNMENT = 256  # bytes, of memory and addresses
Shape = tuple[int, ...]


def check_entry(api: Api, entry: PlanEntry, gpu: str) -> None:
    """Refuse what TensorRT would refuse with fewer words: another flavour, release or GPU. gpu: `gpu_name()`'s."""
    key, again = entry.key, "Run `pi05 build` again on this machine."
    if key.flavour != api.flavour:
        raise BackendError(f"engine '{entry.path}'", expected=f"one of backend '{api.flavour}'",
                           received=f"one of '{key.flavour}'", way_out=f"Use backend '{key.flavour}', or build again.",
                           cause="engine_flavour")
    if key.version != api.version:
        raise BackendError(f"engine '{entry.path}'", expected=f"one built by the installed TensorRT {api.version}",
                           received=f"one built by {key.version}", way_out=again, cause="engine_version")
    if not same_gpu(key.gpu, gpu):
        raise BackendError(f"engine '{entry.path}'", expected=f"one built for this GPU ({gpu})",
                           received=f"one built for {key.gpu}", way_out=again, cause="engine_gpu")


class Engine:
    """One loaded plan.

    Raises:
        BackendError: flavour, release or GPU differ; the file is damaged; TensorRT does not load it; its bindings are
            not those of its description.
    """

    def __init__(self, api: Api, entry: PlanEntry, gpu: str) -> None:
        check_entry(api, entry, gpu)
        self.api, self.entry = api, entry
        self._log = BuildLog()
        self._logger = api.logger(self._log)
        self._runtime = api.made("Runtime", self._logger, self._log)
        self._engine = self._runtime.deserialize_cuda_engine(read_plan(entry))
        if self._engine is None:
            raise BackendError(f"engine '{entry.path}'", expected=f"to be loaded by TensorRT {api.version}",
                               received=self.reason, way_out=way_out(self.reason))
        self._check_bindings()
        self.memory_bytes: int = api.memory_bytes(self._engine)
        self._runtime_config = self._just_in_time() if api.just_in_time else None

    @property
    def reason(self) -> str:
        """TensorRT's own words on what failed last."""
        return self._log.reason

    def inspect(self) -> str:
        """The layers as JSON, for the largest inputs."""
        return self.api.inspect(self._engine, {self.entry.binding(spec.name): spec.max for spec in self.entry.inputs})

    def create_context(self, stream: int) -> Any:
        """A context without memory, with the engine's profile; BackendError if TensorRT has none to give."""
        context = self.api.create_context(self._engine, self._runtime_config)
        if context is None or not self.api.choose_profile(context, stream):
            raise BackendError(f"engine '{self.entry.path}'", expected="an execution context", received=self.reason,
                               way_out=way_out(self.reason))
        return context

    def _check_bindings(self) -> None:
        engine, modes = self._engine, self.api.module.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        for mode, specs in ((modes.INPUT, self.entry.inputs), (modes.OUTPUT, self.entry.outputs)):
            found = {name for name in names if engine.get_tensor_mode(name) == mode}
            for spec in specs:
                name = self.entry.binding(spec.name)
                shape = tuple(engine.get_tensor_shape(name)) if name in found else None
                if shape is None or not self._agrees(spec, shape):
                    dtype = self.api.dtype(engine.get_tensor_dtype(name)) if shape is not None else ""
                    raise BackendError(f"binding '{spec.name}' of engine '{self.entry.path}'",
                                       expected=f"{spec.dtype} {list(spec.shape)}", way_out="Run `pi05 build` again.",
                                       received=f"{dtype} {list(shape)}" if shape is not None else "none")
            if extra := found - {self.entry.binding(spec.name) for spec in specs}:
                raise BackendError(f"engine '{self.entry.path}'", way_out="Run `pi05 build` again.",
                                   expected=f"bindings {', '.join(spec.name for spec in specs)}",
                                   received=f"also {', '.join(sorted(extra))}")

    def _agrees(self, spec: TensorSpec, shape: Shape) -> bool:
        same = self.api.dtype(self._engine.get_tensor_dtype(self.entry.binding(spec.name))) == spec.dtype
        return same and len(shape) == len(spec.shape) and all(
            not isinstance(wanted, int) or found in (-1, wanted)
            for found, wanted in zip(shape, spec.shape, strict=True))

    def _just_in_time(self) -> Any:
        """TensorRT-RTX: whether kernels are compiled for each length of the prompt, which blocks (`eager`), goes on
        beside the first runs and changes their bits (`lazy`), or never happens; its own CUDA graphs stay off."""
        config, trt = self._engine.create_runtime_config(), self.api.module
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        wanted = os.environ.get("PI05_RTX_SPECIALISE", "none").upper()
        if wanted not in ("NONE", "LAZY", "EAGER"):
            raise BackendError("PI05_RTX_SPECIALISE", expected="none, lazy or eager", received=repr(wanted.lower()),
                               way_out="Choose one, or unset it.")
        config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, wanted)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        return config


class Execution:
    """One context with everything bound.

    Args:
        addresses: of device memory, one for every binding; they stay as long as this object.
        shapes: of every input.
        memory: address of `engine.memory_bytes` bytes, a multiple of 256; not shared with what runs at the same time.
        stream: what binding copies, in releases that copy something, is on it: run on it, or after it.

    Raises:
        BackendError: a binding without an address, a shape outside the profile, no context.
    """

    def __init__(self, engine: Engine, addresses: Mapping[str, int], shapes: Mapping[str, Shape], memory: int,
                 stream: int = 0) -> None:
        self.engine, self._addresses = engine, dict(addresses)
        if engine.memory_bytes and (memory == 0 or memory % ALIGNMENT):
            raise BackendError(f"memory of engine '{engine.entry.path}'", received=hex(memory),
                               expected=f"an address, a multiple of {ALIGNMENT}", way_out="Correct the caller.")
        self._context = engine.create_context(stream)
        if engine.memory_bytes:
            engine.api.give_memory(self._context, memory, engine.memory_bytes)
        self._bind()
        self.set_shapes(shapes)

    def _bind(self) -> None:
        specs = (*self.engine.entry.inputs, *self.engine.entry.outputs)
        for spec in specs:
            address = self._addresses.get(spec.name, 0)
            name = self.engine.entry.binding(spec.name)
            if address == 0 or not self._context.set_tensor_address(name, address):
                raise BackendError(f"binding '{spec.name}' of engine '{self.engine.entry.path}'",
                                   expected="a device address", received=hex(address), way_out="Correct the caller.")

    def set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Those of the inputs; TensorRT does its shape arithmetic here. Never on one that was captured."""
        self.shapes = dict(shapes)
        for spec in self.engine.entry.inputs:
            shape = tuple(self.shapes.get(spec.name, ()))
            inside = len(shape) == len(spec.min) and all(
                low <= extent <= high for low, extent, high in zip(spec.min, shape, spec.max, strict=True))
            if not inside:
                raise BackendError(f"shape of '{spec.name}'", expected=f"{list(spec.min)} to {list(spec.max)}",
                                   received=str(list(shape)), way_out="Trim the inputs, or export with --cameras and "
                                   "--tokens as they are here and build again.")
            if not self._context.set_input_shape(self.engine.entry.binding(spec.name), shape):
                raise BackendError(f"shape of '{spec.name}'", expected=f"TensorRT to take {list(shape)}",
                                   received=self.engine.reason, way_out="Run `pi05 build` again.")
        if missing := self._context.infer_shapes():
            raise BackendError(f"engine '{self.engine.entry.path}'", expected="every input's shape",
                               received=f"none for {', '.join(missing)}", way_out="Correct the caller.")

    def output_shape(self, name: str) -> Shape:
        return tuple(self._context.get_tensor_shape(self.engine.entry.binding(name)))

    def enqueue(self, stream: int) -> None:
        """On `stream`, which must not be the default one. The first time for a shape it may wait for the device."""
        if not self._context.execute_async_v3(stream):
            raise BackendError(f"engine '{self.engine.entry.path}'", expected="to run", received=self.engine.reason,
                               way_out=way_out(self.engine.reason), cause="engine_failed")

    def capturable(self, stream: int) -> bool:
        """Whether this context may be captured; releases without the question are asked by trying."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(stream))
