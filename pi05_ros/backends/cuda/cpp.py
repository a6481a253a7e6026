"""CUDA C++ kernels: compiled for the GPU at hand with NVRTC, kept on disk, launched on PyTorch's current stream.

NVRTC and its Python bindings come with PyTorch's CUDA build: no CUDA toolkit is needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pi05_ros.backends.cuda.cache import cache_directory
from pi05_ros.errors import BackendError

SOURCES = Path(__file__).with_name("csrc")


class Kernel:
    """One function of a loaded program."""

    def __init__(self, function: Any, shared_bytes: int) -> None:
        self.function, self.shared_bytes = function, shared_bytes

    def launch(self, grid: Sequence[int], block: int, args: Sequence[Any], cluster: int = 1,
               cooperative: bool = False, dependent: bool = False) -> None:
        """`args`: tensors (their addresses; None is null), ints and floats (32 bits), or tensor maps (`getPtr`).

        `dependent`: starts while the kernel before still runs, and itself waits for its end (griddepcontrol.wait).
        """
        config, attributes = _launch_config(tuple(grid), block, self.shared_bytes, cluster, cooperative, dependent)
        config.hStream = torch.cuda.current_stream().cuda_stream
        values, kinds = zip(*map(_argument, args), strict=True)
        _check(_driver().cuLaunchKernelEx(config, self.function, (values, kinds), 0), "launching a kernel")

    def max_clusters(self, grid: Sequence[int], block: int, cluster: int) -> int:
        """How many clusters of that many blocks the GPU runs at once."""
        config, attributes = _launch_config(tuple(grid), block, self.shared_bytes, cluster, False)
        return _check(_driver().cuOccupancyMaxActiveClusters(self.function, config), "asking for cluster occupancy")


class Program:
    """csrc/{name}.cu compiled with `defines`; raises BackendError with the compiler's log."""

    def __init__(self, name: str, defines: Mapping[str, int | float | str], device: torch.device) -> None:
        torch.cuda.current_stream(device)  # PyTorch's context is there
        image = _compiled(name, defines, torch.cuda.get_device_capability(device))
        self._module = _check(_driver().cuModuleLoadData(image), f"loading csrc/{name}.cu")

    def kernel(self, function: str, shared_bytes: int = 0) -> Kernel:
        driver = _driver()
        handle = _check(driver.cuModuleGetFunction(self._module, function.encode()), f"looking up '{function}'")
        kind = driver.CUfunction_attribute
        _check(driver.cuFuncSetAttribute(handle, kind.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes),
               f"reserving {shared_bytes} bytes of shared memory for '{function}'")
        return Kernel(handle, shared_bytes)


def _launch_config(grid: tuple[int, ...], block: int, shared_bytes: int, cluster: int, cooperative: bool,
                   dependent: bool = False) -> tuple:
    driver = _driver()
    config, attributes = driver.CUlaunchConfig(), []
    config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes = shared_bytes
    ids = driver.CUlaunchAttributeID
    if cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
        attributes.append(attribute)
    if cooperative:
        attribute = driver.CUlaunchAttribute()
        attribute.id = ids.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attribute.value.cooperative = 1
        attributes.append(attribute)
    if dependent:
        attribute = driver.CUlaunchAttribute()
        attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config, attributes


def _argument(value: Any) -> tuple[Any, Any]:
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), ctypes.c_void_p
    if value is None:
        return 0, ctypes.c_void_p
    if isinstance(value, int):
        return value, ctypes.c_int
    if isinstance(value, float):
        return value, ctypes.c_float
    return value, None


def _compiled(name: str, defines: Mapping[str, int | float | str], capability: tuple[int, int]) -> bytes:
    """The machine code, from the cache where the same sources, defines, GPU and compiler were there before."""
    nvrtc = _bindings("nvrtc")
    headers = {path.name: path.read_bytes() for path in sorted(SOURCES.glob("*.cuh"))}
    source = (SOURCES / f"{name}.cu").read_bytes()
    major, minor = capability
    own = "a" if major >= 9 else ""  # the instructions of exactly this architecture
    options = [f"--gpu-architecture=sm_{major}{minor}{own}", "--std=c++17", "--use_fast_math", "-default-device",
               *(f"-D{key}={value}" for key, value in sorted(defines.items()))]
    version = _check(nvrtc.nvrtcVersion(), "asking for NVRTC's version")
    key = hashlib.sha256(repr((source, headers, options, version)).encode()).hexdigest()[:24]
    path = cache_directory() / f"{name}-{key}.cubin"
    if path.is_file():
        return path.read_bytes()
    image = _compile(nvrtc, name, source, headers, [option.encode() for option in options])
    _keep(path, image)
    return image


def _compile(nvrtc: Any, name: str, source: bytes, headers: Mapping[str, bytes], options: list[bytes]) -> bytes:
    program = _check(nvrtc.nvrtcCreateProgram(source, f"{name}.cu".encode(), len(headers), list(headers.values()),
                                              [key.encode() for key in headers]), f"reading csrc/{name}.cu")
    outcome = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    if int(outcome):
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program), "asking for the compiler's log")
        _check(nvrtc.nvrtcGetProgramLog(program, log), "reading the compiler's log")
        raise BackendError(f"csrc/{name}.cu", expected="to compile with NVRTC",
                           received=log.decode(errors="replace").strip("\0 \n"),
                           way_out="Report this with the GPU's name, or use backend 'eager'.")
    image = b" " * _check(nvrtc.nvrtcGetCUBINSize(program), "asking for the machine code")
    _check(nvrtc.nvrtcGetCUBIN(program, image), "reading the machine code")
    _check(nvrtc.nvrtcDestroyProgram(program), "freeing the compiler")
    return image


def _keep(path: Path, image: bytes) -> None:
    """Atomically; a cache that cannot be written costs time, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(image)
        Path(file.name).replace(path)
    except OSError:
        return


def _bindings(name: str) -> Any:
    try:
        import cuda.bindings.driver
        import cuda.bindings.nvrtc
    except ImportError as error:
        raise BackendError(
            "backend 'cuda'", expected="the Python package cuda-bindings", received=str(error),
            way_out="Install PyTorch's CUDA build, which brings it, or pip install cuda-bindings.") from error
    return {"driver": cuda.bindings.driver, "nvrtc": cuda.bindings.nvrtc}[name]


def _driver() -> Any:
    return _bindings("driver")


def _check(result: tuple, doing: str) -> Any:
    """The value of a binding's (status, value...) answer."""
    status, *values = result
    if int(status):
        raise BackendError(f"CUDA, {doing}", expected="success", received=f"{status.name} ({int(status)})",
                           way_out="Clean up and configure again; if it persists, use backend 'eager'.")
    return values[0] if len(values) == 1 else tuple(values) or None
