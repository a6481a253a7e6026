"""One program to one engine, by torch_tensorrt.dynamo.compile; then it is an engine like any other.

compile() gives a PyTorch module with engines inside. Here it has to be one engine and nothing else: its bytes go to the
cache of engines, and `backends/tensorrt/runner.py` runs them, with static addresses and without torch_tensorrt.
"""

from __future__ import annotations

import operator
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from pi05_ros.backends.tensorrt.api import BITS, Api
from pi05_ros.backends.tensorrt.build import BuildOptions, Built, largest, look, refuse_fallbacks, way_out
from pi05_ros.backends.tensorrt.build_log import BuildLog, Progress
from pi05_ros.backends.tensorrt.names import GraphSpec, TensorSpec
from pi05_ros.backends.tensorrt.precision import engine_layers, kept_wider
from pi05_ros.backends.torch_tensorrt.program_files import module_of_node, open_program
from pi05_ros.backends.torch_tensorrt.settings import arguments
from pi05_ros.errors import BackendError

ELSEWHERE = ("Run this stage elsewhere (for example expert=cuda), take a newer torch_tensorrt, or --flavour tensorrt "
             "with an ONNX export.")
PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "conv2d", "convolution", "scaled_dot_product_attention")
NOT_JUDGED = "torch_tensorrt builds engines without details: whether a layer fell back to float32 is not told"
SHOWN = 8


def installed() -> Any:
    """The module `torch_tensorrt`; import it before TensorRT, which it wants to load itself.

    Raises:
        BackendError: not there, not for this PyTorch, or its variant for TensorRT-RTX.
    """
    try:
        import torch_tensorrt
    except Exception as error:  # it raises bare exceptions where a library of its is missing or of another release
        raise BackendError("flavour 'torch_tensorrt'", received=f"{type(error).__name__}: {str(error)[:300]}",
                           expected=f"torch_tensorrt for PyTorch {torch.__version__}", way_out="Install it: pip "
                           "install 'pi05_ros[torch_tensorrt]' (its minor version is PyTorch's), or use --flavour "
                           "tensorrt with an ONNX export.") from error
    if getattr(torch_tensorrt, "tensorrt_package_name", "tensorrt") != "tensorrt":
        raise BackendError("flavour 'torch_tensorrt'", expected="torch_tensorrt on TensorRT",
                           received=f"torch_tensorrt on {torch_tensorrt.tensorrt_package_name}",
                           way_out="Use --flavour tensorrt_rtx with an ONNX export, or the package torch-tensorrt.")
    return torch_tensorrt


def all_settings(library: Any, settings: Mapping[str, Any], workspace_bytes: int | None = None,
                 level: int | None = None) -> dict[str, Any]:
    """What compile() is called with, and the release: an engine's key has both. Raises as `settings.arguments`."""
    given = dict(settings)
    given |= {} if workspace_bytes is None else {"workspace_size": workspace_bytes}
    given |= {} if level is None else {"optimization_level": level}
    return {**arguments(library.dynamo.compile, given, library.__version__), "torch_tensorrt": library.__version__}


def build_engine(api: Api, file: Path, graph: GraphSpec, options: BuildOptions, timing_cache: bytes = b"",
                 inspect: bool = True, progress: Progress = lambda fraction, phase: None) -> Built:
    """As `backends/tensorrt/build.py: build_engine`, from a program; `options.settings` are `all_settings`.

    Raises:
        BackendError: operators that would stay in PyTorch (with their names), more engines than one, or no engine.
    """
    began, library, program = time.monotonic(), installed(), open_program(file, graph.precision)
    settings = {name: value for name, value in options.settings.items() if name != "torch_tensorrt"}
    inputs = [input_of(library, spec) for spec in graph.inputs]
    progress(0.0, "compiling")
    with tempfile.TemporaryDirectory(prefix="pi05_timing_") as directory:
        timing = Path(directory) / "timing.cache"
        timing.write_bytes(timing_cache)
        try:
            compiled = library.dynamo.compile(program, arg_inputs=inputs, device=f"cuda:{torch.cuda.current_device()}",
                                              timing_cache_path=str(timing), **settings)
        except Exception as error:  # of the converters, the partitioner, TensorRT: no common class
            left = left_by_dry_run(library, file, inputs, settings)
            raise failure(file, library, error, left) from error
        measured = timing.read_bytes() if timing.is_file() else b""
    engine = the_engine(compiled, file)
    bindings = bindings_of(compiled, engine, graph)
    plan, log = engine.serialized_engine, BuildLog()
    del compiled, engine  # it was loaded; the next line wants the memory
    inspected, memory = look(api, api.logger(log), plan, log, file.name, largest(graph, bindings)) if inspect else (
        "", None)
    fallbacks = kept_wider(memoryview(plan).nbytes, graph.bytes)
    refuse_fallbacks(fallbacks, options, file.name)
    progress(1.0, "compiled")
    return Built(plan, graph.inputs, graph.outputs, products(program), inspected, tuple(engine_layers(inspected)),
                 tuple(fallbacks), 0, memory, (NOT_JUDGED, *log.lines), time.monotonic() - began, measured, bindings)


def input_of(library: Any, spec: TensorSpec) -> Any:
    """torch_tensorrt's description of an input."""
    dtype = getattr(torch, spec.dtype)
    if spec.min == spec.max:
        return library.Input(shape=spec.max, dtype=dtype, name=spec.name)
    return library.Input(min_shape=spec.min, opt_shape=spec.opt, max_shape=spec.max, dtype=dtype, name=spec.name)


def the_engine(compiled: Any, file: Path) -> Any:
    """The one engine that `compiled` is; BackendError with what else there is."""
    left = left_to_pytorch(compiled)
    engines = [child for _, child in compiled.named_children() if getattr(child, "serialized_engine", None)]
    if left or len(engines) != 1 or getattr(engines[0], "requires_output_allocator", False):
        parts = f"{len(engines)} engines" + (f", and in PyTorch: {listed(left)}" if left else "")
        raise BackendError(f"engine of '{file.name}'", expected="one engine with outputs of known size", received=parts,
                           way_out=ELSEWHERE, cause="left_to_pytorch")
    return engines[0]


def left_to_pytorch(compiled: Any) -> Counter[str]:
    """Operators that no engine has, of a compiled or partitioned module; all of them where nothing was compiled."""
    left: Counter[str] = Counter()
    children = dict(compiled.named_children())
    for node in compiled.graph.nodes:
        child = children.get(str(node.target)) if node.op == "call_module" else None  # one may check lengths: no graph
        if node.op == "call_function" and node.target is not operator.getitem:
            left[str(node.target)] += 1
        elif hasattr(child, "graph") and "_run_on_acc" not in node.name:
            left += left_to_pytorch(child)
    return left


def left_by_dry_run(library: Any, file: Path, inputs: list[Any], settings: Mapping[str, Any]) -> Counter[str]:
    """Why a program is not fully compiled: compile() only says that it is not. Nothing is built."""
    try:
        return left_to_pytorch(library.dynamo.compile(open_program(file), arg_inputs=inputs, **{
            **settings, "require_full_compilation": False, "dryrun": True}))
    except Exception:  # what failed before fails again: then that is the reason
        return Counter()


def failure(file: Path, library: Any, error: Exception, left: Counter[str]) -> BackendError:
    if left:
        return BackendError(f"program '{file.name}'", received=f"no converter for {listed(left)}",
                            expected=f"operators that torch_tensorrt {library.__version__} converts",
                            way_out=ELSEWHERE, cause="left_to_pytorch")
    words = f"{type(error).__name__}: {str(error)[:500]}"
    return BackendError(f"engine of '{file.name}'", expected=f"an engine from torch_tensorrt {library.__version__}",
                        received=words, way_out=way_out(words))


def listed(left: Counter[str]) -> str:
    names = [f"{name} ({count})" for name, count in left.most_common(SHOWN)]
    return ", ".join(names) + (f" and {len(left) - SHOWN} more" if len(left) > SHOWN else "")


def bindings_of(compiled: Any, engine: Any, graph: GraphSpec) -> dict[str, str]:
    """Our names to the engine's, where they differ.

    The partitioner gives an engine its inputs in the order of their first use, not the program's, so both sides are
    followed through the graph around it.
    """
    nodes = list(compiled.graph.nodes)
    call = next(node for node in nodes if node.op == "call_module" and compiled.get_submodule(node.target) is engine)
    given = dict(zip(call.args, engine.input_binding_names, strict=True))
    made = {node: engine.output_binding_names[node.args[1]] for node in call.users if node.target is operator.getitem}
    made[call] = engine.output_binding_names[0]
    placeholders = [node for node in nodes if node.op == "placeholder"]
    (returned,) = nodes[-1].args
    named: dict[str, str] = {}
    for side, specs, ends, theirs in (("input", graph.inputs, placeholders, given),
                                      ("output", graph.outputs, tuple(returned), made)):
        for spec, end in zip(specs, ends, strict=True):
            if end not in theirs:
                raise BackendError(f"{side} '{spec.name}' of '{graph.file}'", expected="a binding of the engine",
                                   received="none", way_out="Export again, and report this.")
            named[spec.name] = theirs[end]
    return {ours: name for ours, name in named.items() if ours != name}


def products(program: ExportedProgram) -> dict[str, str]:
    """Every matrix product of the program by module and operator, with the type of its narrowest operand."""
    found = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and _operator(node) in PRODUCTS:
            types = [_type(arg) for arg in node.args if isinstance(arg, torch.fx.Node)]
            found[f"{module_of_node(node)} ({node.name})"] = min(types, key=lambda dtype: BITS.get(dtype, 64))
    return found


def _operator(node: torch.fx.Node) -> str:
    """`linear` of aten.linear.default."""
    return getattr(node.target, "__name__", "").partition(".")[0]


def _type(node: torch.fx.Node) -> str:
    """Of the numbers that `node` gives; what ModelOpt's operator rounded is in float8."""
    value = node.meta.get("val")
    if _operator(node) == "quantize_op":
        return "float8"
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else "none"
