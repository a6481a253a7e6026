"""From an ONNX graph to a serialized engine: parse, set the profile, build, look at what came out.

The network is strongly typed: the types of the graph are kept. TensorRT 8.6 has no such mode; float16 graphs are built
there with the FP16 flag and the graph's types obeyed. No PyTorch; Python 3.10 on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pi05_ros.backends.tensorrt.api import Api
from pi05_ros.backends.tensorrt.build_log import BuildLog, PhaseProgress, Progress
from pi05_ros.backends.tensorrt.names import GraphSpec, TensorSpec
from pi05_ros.backends.tensorrt.precision import (
    EngineLayer,
    Fallback,
    engine_layers,
    fell_back,
    kept_wider,
    seen,
    wanted_products,
)
from pi05_ros.backends.tensorrt.weak_types import obey_types
from pi05_ros.errors import BackendError


@dataclass(frozen=True)
class BuildOptions:
    """workspace_bytes: the most memory a kernel may use beside its inputs and outputs; None: all of the GPU's.
    level: TensorRT's optimisation level 0..5, more is slower to build; None: its own. target: "8.9", the compute
    capability to build for (RTX only; None: this machine's GPU). allow_fallback: keep an engine in which layers fell
    back. settings: torch_tensorrt's."""

    workspace_bytes: int | None = None
    level: int | None = None
    target: str | None = None
    allow_fallback: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """plan: the serialized engine, a buffer. inspected: the inspector's JSON, "" where no GPU could load the engine.
    fallbacks: layers of higher precision; judged: how many of the `products` the inspector told the types of."""

    plan: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    products: Mapping[str, str]
    inspected: str
    layers: tuple[EngineLayer, ...]
    fallbacks: tuple[Fallback, ...]
    judged: int
    memory_bytes: int | None
    messages: tuple[str, ...]
    seconds: float
    timing_cache: Any = field(default=None, repr=False)
    bindings: Mapping[str, str] = field(default_factory=dict)  # as in PlanEntry


def build_engine(api: Api, onnx_file: Path, graph: GraphSpec, options: BuildOptions = BuildOptions(),  # noqa: B008
                 timing_cache: bytes = b"", inspect: bool = True,
                 progress: Progress = lambda fraction, phase: None) -> Built:
    """One engine.

    Args:
        inspect: load the engine and ask it for its layers; needs the GPU that it was built for.

    Raises:
        BackendError: the graph is not read, its bindings are not those of `graph`, TensorRT builds no engine (with its
            own words: memory, an unsupported type, no kernel), or layers fell back and that is not allowed.
    """
    began, log = time.monotonic(), BuildLog()
    trt, logger = api.module, api.logger(log)
    builder = api.made("Builder", logger, log)
    network = builder.create_network(api.network_flags())
    parse(trt, network, logger, log, onnx_file)
    inputs, outputs = check_bindings(api, network, graph)
    config = builder.create_builder_config()
    configure(api, config, options)
    types = {} if api.strongly_typed else obey_types(api, config, graph, network)
    config.add_optimization_profile(make_profile(builder, network, graph))
    if api.release < (10, 0):  # 8.6 refuses what it wrote, in the build, which then measures every layer anew
        timing_cache = b""
    cache = None if api.just_in_time else config.create_timing_cache(timing_cache)  # RTX measures nothing here
    if cache is not None and not config.set_timing_cache(cache, False):  # of another GPU or release: begin a new one
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    phases = PhaseProgress(progress)
    monitor = api.progress_monitor(phases.start, phases.step, phases.finish)
    if monitor is not None:
        config.progress_monitor = monitor
    wanted = wanted_products(api, network, types)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"engine of '{onnx_file.name}'", expected="an engine from TensorRT " + api.version,
                           received=log.reason, way_out=way_out(log.reason))
    inspected, memory = look(api, logger, plan, log, onnx_file.name, largest(graph)) if inspect else ("", None)
    layers = engine_layers(inspected)
    fallbacks = fell_back(wanted, layers) + kept_wider(memoryview(plan).nbytes, graph.bytes)
    refuse_fallbacks(fallbacks, options, onnx_file.name)
    return Built(plan, inputs, outputs, wanted, inspected, tuple(layers), tuple(fallbacks), seen(wanted, layers),
                 memory, tuple(log.lines), time.monotonic() - began, b"" if cache is None else cache.serialize())


def largest(graph: GraphSpec, bindings: Mapping[str, str] = MappingProxyType({})) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs by name, or by what `bindings` call it, at the end of the profile."""
    return {bindings.get(spec.name, spec.name): spec.max for spec in graph.inputs}


def refuse_fallbacks(fallbacks: Sequence[Fallback], options: BuildOptions, name: str) -> None:
    """BackendError unless there are none, or they are allowed."""
    if fallbacks and not options.allow_fallback:
        raise BackendError(f"engine of '{name}'", expected="the precision of the graph in every product",
                           received=f"{len(fallbacks)} of higher precision: " + "; ".join(map(str, fallbacks[:5])),
                           way_out="Take a newer TensorRT, another --dtype, or --allow-fallback to run it as it is.")


def parse(trt: Any, network: Any, logger: Any, log: BuildLog, onnx_file: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        words = "; ".join(f"node {error.node()}: {error.desc()}" for error in errors[:3]) or log.reason
        raise BackendError(f"'{onnx_file}'", expected="a graph that TensorRT's ONNX parser reads", received=words,
                           way_out="Export again with an opset that this TensorRT has, or take a newer one.")


def check_bindings(api: Api, network: Any, graph: GraphSpec) -> tuple[tuple[TensorSpec, ...], ...]:
    """Names, types and shapes that TensorRT read are those of the manifest; returns the manifest's."""
    for side, specs in (("input", graph.inputs), ("output", graph.outputs)):
        count = getattr(network, f"num_{side}s")
        found = {tensor.name: tensor for tensor in (getattr(network, f"get_{side}")(i) for i in range(count))}
        for spec in specs:
            tensor = found.pop(spec.name, None)
            received = "none" if tensor is None else f"{api.dtype(tensor.dtype)} {list(tensor.shape)}"
            if tensor is None or api.dtype(tensor.dtype) != spec.dtype or not _agree(tensor.shape, spec):
                raise BackendError(f"{side} '{spec.name}' of '{graph.file}'", received=received,
                                   expected=f"{spec.dtype} {list(spec.shape)}", way_out="Export again.")
        if found:
            raise BackendError(f"{side}s of '{graph.file}'", expected=", ".join(spec.name for spec in specs),
                               received=f"also {', '.join(found)}", way_out="Export again.")
    return graph.inputs, graph.outputs


def _agree(shape: Any, spec: TensorSpec) -> bool:
    """A dynamic axis is -1, as is one of an output that is computed; TensorRT may also know more than we said."""
    return len(shape) == len(spec.shape) and all(
        found == -1 or not isinstance(wanted, int) or found == wanted
        for found, wanted in zip(shape, spec.shape, strict=True))


def configure(api: Api, config: Any, options: BuildOptions) -> None:
    """Workspace, level, target, and all work on the caller's stream: overlap is ours to decide."""
    trt = api.module
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.level is not None:
        config.builder_optimization_level = options.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.max_aux_streams = 0
    api.share_profile(config)
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    if options.target is not None:
        set_target(api, config, options.target)


def set_target(api: Api, config: Any, target: str) -> None:
    name = "SM" + target.replace(".", "")
    known = getattr(api.module, "ComputeCapability", None)
    if known is None or not hasattr(known, name):
        names = [each for each in getattr(known, "__members__", {}) if each.startswith("SM")]
        raise BackendError("--gpu", expected=", ".join(names) if names else "no target: 'tensorrt' builds for the GPU "
                           "of this machine", received=target, way_out="Choose one of them, or build on the machine.")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(known, name), 0)


def make_profile(builder: Any, network: Any, graph: GraphSpec) -> Any:
    """One profile: the shapes of the manifest."""
    profile = builder.create_optimization_profile()
    for spec in graph.inputs:
        if any(isinstance(axis, str) for axis in spec.shape):
            profile.set_shape(spec.name, spec.min, spec.opt, spec.max)
    return profile


def look(api: Api, logger: Any, plan: Any, log: BuildLog, name: str,
         shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int]:
    """The inspector's JSON of a plan, its inputs of these shapes, and the memory that a context needs; BackendError if
    it cannot be loaded."""
    runtime = api.made("Runtime", logger, log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(f"engine of '{name}'", expected="to be loaded by the TensorRT that built it",
                           received=log.reason, way_out=way_out(log.reason))
    return api.inspect(engine, shapes), api.memory_bytes(engine)


def way_out(reason: str) -> str:
    """What to do, by TensorRT's own words."""
    words = reason.lower()
    if "hw-specific datatypes" in words or "fp8" in words and "support" in words:
        return "This GPU has no such type: export without --scales, or take a GPU with it (FP8: 8.9 and later)."
    if "out of memory" in words or "outofmemory" in words or "memory" in words and "insufficient" in words:
        return "Close other programs on the GPU, give --workspace a smaller number, or build one graph at a time."
    if "cuda driver version" in words or "cuda initialization failure" in words or "no cuda-capable device" in words:
        return "Build on the machine with the GPU, or with --flavour tensorrt_rtx --gpu 8.9 without one."
    return "Read the build log above; try --level 2, or another release of TensorRT, and report the log."
