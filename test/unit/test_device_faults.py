"""GPU failures by name, and sensors that say plainly what they cannot read."""

import sys
import types

import pytest
import torch

from pi05_ros.errors import ObservationError, WorkerError
from pi05_ros.runtime import device_faults, gpu_sensors


@pytest.mark.parametrize(("error", "cause"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), device_faults.OUT_OF_MEMORY),
    (RuntimeError("CUDA error: out of memory\nsee the manual"), device_faults.OUT_OF_MEMORY),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), device_faults.CUDA_ERROR),
    (RuntimeError("cuBLAS error: CUBLAS_STATUS_EXECUTION_FAILED"), device_faults.CUDA_ERROR),
])
def test_failures_of_the_gpu_have_a_cause_and_keep_their_notes(error, cause):
    error.add_note("where it was")
    found = device_faults.named(error)
    assert isinstance(found, WorkerError) and found.cause == cause and found.__notes__ == ["where it was"]
    assert str(error).splitlines()[0].rstrip(".") in str(found) and "configure" in found.way_out


@pytest.mark.parametrize("error", [ValueError("CUDA is a word"), RuntimeError("shapes differ"), ObservationError(
    "x", expected="a", received="b", way_out="c")])
def test_other_errors_stay_as_they_are(error):
    assert device_faults.named(error) is error


def test_a_lost_context_asks_for_a_new_process(monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert not device_faults.context_lost()  # no CUDA here, none lost
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert "restart the process" in device_faults.named(RuntimeError("CUDA error: misaligned address")).way_out


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as PyTorch describes it."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(name="G", uuid="7-7"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8_300_000_000)
    return torch.device("cuda")


class NVMLError(Exception):
    pass


def nvml(handles):
    """The functions of pynvml that are used."""
    def handle(uuid):
        if uuid not in handles:
            raise NVMLError("Not Found")
        return uuid

    return types.SimpleNamespace(
        NVMLError=NVMLError, NVML_TEMPERATURE_GPU=0, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetMemoryInfo=lambda h: types.SimpleNamespace(used=9e9, total=140e9),
        nvmlDeviceGetTemperature=lambda h, kind: 51,
        nvmlDeviceGetUtilizationRates=lambda h: types.SimpleNamespace(gpu=88))


def test_a_cpu_has_no_sensors():
    assert gpu_sensors.gpu_sensors(torch.device("cpu"))() == {}


def test_nvml_gives_memory_temperature_and_load_of_this_gpu(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml({"GPU-7-7"}))
    assert gpu_sensors.gpu_sensors(gpu)() == {
        "gpu": "G", "gpu_reserved_gb": "8.30", "gpu_used_gb": "9.00", "gpu_total_gb": "140.00",
        "gpu_temperature_c": 51, "gpu_load_percent": 88}


@pytest.mark.parametrize(("module", "says"), [(None, "install nvidia-ml-py"), (nvml(()), "Not Found")])
def test_what_cannot_be_read_is_said(gpu, monkeypatch, module, says):
    monkeypatch.setitem(sys.modules, "pynvml", module)
    found = gpu_sensors.gpu_sensors(gpu)()
    assert says in found["gpu_temperature_c"] and found["gpu_reserved_gb"] == "8.30"


def test_a_sensor_that_fails_later_does_not_raise(gpu, monkeypatch):
    module = nvml({"GPU-7-7"})
    monkeypatch.setitem(sys.modules, "pynvml", module)
    read = gpu_sensors.gpu_sensors(gpu)

    def fail(handle, kind):
        raise NVMLError("GPU is lost")

    module.nvmlDeviceGetTemperature = fail
    assert "GPU is lost" in read()["gpu_temperature_c"]
