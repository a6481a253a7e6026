"""Memory, temperature and load of the GPU for diagnostics, read through NVML where nvidia-ml-py is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Sensors = Callable[[], Mapping[str, object]]


def gpu_sensors(device: torch.device) -> Sensors:
    """What to call once a second; {} on a CPU. NVML makes no CUDA call, so any thread may read.

    Made on the thread that makes the CUDA calls, to learn which of the machine's GPUs this is.
    """
    if device.type != "cuda":
        return dict
    properties = torch.cuda.get_device_properties(device)
    plain = {"gpu": properties.name}
    opened = open_nvml(device)
    if isinstance(opened, str):
        return lambda: {**plain, **reserved(device), "gpu_temperature_c": opened}
    pynvml, handle = opened

    def read() -> Mapping[str, object]:
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            celsius = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
            load = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
        except pynvml.NVMLError as error:
            return {**plain, **reserved(device), "gpu_temperature_c": f"not readable: {error}"}
        return {**plain, **reserved(device), "gpu_used_gb": f"{memory.used / 1e9:.2f}",
                "gpu_total_gb": f"{memory.total / 1e9:.2f}", "gpu_temperature_c": celsius, "gpu_load_percent": load}

    return read


def open_nvml(device: torch.device) -> tuple[Any, Any] | str:
    """The module and the GPU's handle, or why there are none."""
    try:
        import pynvml
    except ImportError:
        return "not readable: install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError as error:
        return f"not readable: {error}"


def reserved(device: torch.device) -> dict[str, object]:
    """What PyTorch holds in this process: the allocator's own count, no CUDA call."""
    return {"gpu_reserved_gb": f"{torch.cuda.memory_reserved(device) / 1e9:.2f}"}
