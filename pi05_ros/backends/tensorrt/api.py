"""Which TensorRT is installed: `tensorrt` (Jetson, data centre) or `tensorrt_rtx` (RTX desktops), one Python API.

Releases differ in few names: 8.6 has no strong typing and an older way to give memory, 10 has both ways, 11 and RTX
dropped what was deprecated. All such differences are in this file. No PyTorch; Python 3.10 on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pi05_ros.errors import BackendError

# flavour -> names of its module; the second is what PyPI's `...-bindings` packages install. Engines that torch_tensorrt
# made are ordinary ones: `torch_tensorrt` is `tensorrt`, known by another name so that the two are not mixed up.
MODULES = {"tensorrt": ("tensorrt", "tensorrt_bindings"), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
           "torch_tensorrt": ("tensorrt", "tensorrt_bindings")}
OLDEST = {"tensorrt": (8, 6), "tensorrt_rtx": (1, 1), "torch_tensorrt": (10, 0)}
DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8", "INT8": "int8", "INT32": "int32",
          "INT64": "int64", "BOOL": "bool", "UINT8": "uint8", "INT4": "int4", "FP4": "float4", "E8M0": "float8_e8m0"}
BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "float8": 8, "int8": 8, "int4": 4, "float4": 4}
Log = Callable[[str, str], None]  # (severity: internal_error, error, warning, info, verbose; text)


@dataclass(frozen=True)
class Api:
    """module: TensorRT's Python module, or a stand-in in tests. version: as it says, "10.3.0"."""

    flavour: str
    module: Any
    version: str

    @property
    def release(self) -> tuple[int, ...]:
        """(10, 3) of "10.3.0"."""
        return _release(self.version)

    @property
    def just_in_time(self) -> bool:
        """Plans name a compute capability and are compiled for the GPU when they are loaded."""
        return self.flavour == "tensorrt_rtx"

    @property
    def strongly_typed(self) -> bool:
        return hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    def network_flags(self) -> int:
        """Strongly typed where there is such a thing; 8.6 must be told of explicit batches, 11 no longer knows them."""
        flags = self.module.NetworkDefinitionCreationFlag
        return 1 << int(flags.STRONGLY_TYPED if self.strongly_typed else flags.EXPLICIT_BATCH)

    def dtype(self, of: Any) -> str:
        """TensorRT's data type to the name that PyTorch and NumPy use."""
        return DTYPES.get(of.name, of.name.lower())

    def logger(self, log: Log) -> Any:
        """An ILogger that hands every message on; keep it as long as anything made with it."""
        base = self.module.ILogger

        class Logger(base):  # type: ignore[misc,valid-type]
            def __init__(self) -> None:
                super().__init__()

            def log(self, severity: Any, text: str) -> None:
                log(severity.name.lower(), text)

        return Logger()

    def made(self, kind: str, logger: Any, log: Any) -> Any:
        """A `Builder` or `Runtime`; BackendError with the words in `log`, a BuildLog, where there is no usable GPU."""
        try:
            return getattr(self.module, kind)(logger)
        except (TypeError, RuntimeError) as error:  # pybind11, for a constructor that gave nothing
            raise BackendError(f"TensorRT {self.version}", expected=f"a {kind.lower()}",
                               way_out="Check nvidia-smi: the driver must be there, as new as this TensorRT's CUDA.",
                               received="; ".join(log.lines) or str(error)) from error

    def progress_monitor(self, start: Callable[[str, str | None, int], None], step: Callable[[str, int], bool],
                         finish: Callable[[str], None]) -> Any:
        """An IProgressMonitor, or None in releases that have none (before 9). It is called from several threads."""
        base = getattr(self.module, "IProgressMonitor", None)
        if base is None:
            return None

        class Monitor(base):  # type: ignore[misc,valid-type]
            def __init__(self) -> None:
                super().__init__()

            def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
                start(phase, parent, steps)

            def step_complete(self, phase: str, done: int) -> bool:
                return step(phase, done)

            def phase_finish(self, phase: str) -> None:
                finish(phase)

        return Monitor()

    def memory_bytes(self, engine: Any) -> int:
        """Activation memory that one execution context of `engine` needs."""
        if hasattr(engine, "device_memory_size_v2"):
            return int(engine.device_memory_size_v2)
        return int(engine.device_memory_size)

    def create_context(self, engine: Any, runtime_config: Any = None) -> Any:
        """An execution context without memory of its own; None where TensorRT could not."""
        strategies = getattr(self.module, "ExecutionContextAllocationStrategy", None)
        if strategies is None:
            return engine.create_execution_context_without_device_memory()
        if runtime_config is None:
            return engine.create_execution_context(strategies.USER_MANAGED)
        runtime_config.set_execution_context_allocation_strategy(strategies.USER_MANAGED)
        return engine.create_execution_context(runtime_config)

    def inspect(self, engine: Any, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """The layers of `engine` as JSON, its inputs of these shapes: without them, one of dynamic shapes tells no
        types. 8.6 did not tell them with shapes either, on an H200."""
        inspector = engine.create_engine_inspector()
        context = self.create_context(engine)
        if context is not None and self.choose_profile(context, 0) and all(
                [context.set_input_shape(name, shape) for name, shape in shapes.items()]):
            inspector.execution_context = context
        return str(inspector.get_engine_information(self.module.LayerInformationFormat.JSON))

    def share_profile(self, config: Any) -> None:
        """Let every context of an engine have its only profile. 8.6 gives it to one, unless it is built so."""
        if self.release < (10, 0) and not self.just_in_time:
            config.set_preview_feature(self.module.PreviewFeature.PROFILE_SHARING_0806, True)

    def choose_profile(self, context: Any, stream: int) -> bool:
        """What this copies is on `stream`. 8.6 does it for the first context alone, and the process ends when a tensor
        of another is bound; 10 does it for all. False: the context still has none."""
        if self.release >= (10, 0) or self.just_in_time or context.active_optimization_profile == 0:
            return True
        return bool(context.set_optimization_profile_async(0, stream))

    def give_memory(self, context: Any, address: int, size: int) -> None:
        """address: of device memory, a multiple of 256."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(address, size)
        else:
            context.device_memory = address


def load_api(flavour: str) -> Api:
    """Import it.

    Raises:
        BackendError: no such flavour, not installed, or a release older than this package knows.
    """
    if flavour not in MODULES:
        raise BackendError("TensorRT flavour", expected=" or ".join(MODULES), received=f"'{flavour}'",
                           way_out="Choose one of them.")
    causes = []
    for name in MODULES[flavour]:
        try:
            module = importlib.import_module(name)
            break
        except ImportError as error:  # also a library that the module loads: its message says which
            causes.append(str(error))
    else:
        raise BackendError(f"backend '{flavour}'", expected=f"the Python module {MODULES[flavour][0]}",
                           received="; ".join(causes), way_out=_install(flavour))
    api = Api(flavour, module, str(module.__version__))
    if api.release < OLDEST[flavour]:
        raise BackendError(f"backend '{flavour}'", expected=f"release {'.'.join(map(str, OLDEST[flavour]))} or later",
                           received=api.version, way_out=_install(flavour))
    return api


def _install(flavour: str) -> str:
    if flavour != "tensorrt_rtx":
        return ("On a Jetson: sudo apt install python3-libnvinfer, and a virtual environment with system packages; "
                f"elsewhere: pip install 'pi05_ros[{flavour}]'. Or use backend 'eager'.")
    return "Install it: pip install 'pi05_ros[tensorrt_rtx]'. Or use backend 'eager'."


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
