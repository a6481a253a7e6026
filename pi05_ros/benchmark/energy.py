"""What a run costs in joules, and whether the GPU's power limit holds it: by NVML's counter of energy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pi05_ros.runtime.gpu_sensors import open_nvml

SECONDS = 2.0  # of runs: the counter moves in steps


@dataclass(frozen=True)
class Energy:
    """Of a run among others, back to back: joules (the whole GPU's), watts meanwhile, and the watts it keeps to."""

    joules: float
    watts: float
    limit_watts: float

    @property
    def shortest_ms(self) -> float:
        """How long a run takes at the limit, as long as it costs so much: no schedule makes runs come faster."""
        return 1e3 * self.joules / self.limit_watts

    def __str__(self) -> str:
        return (f"{self.joules:.2f} J a run, {self.watts:.0f} of {self.limit_watts:.0f} W back to back: "
                f"at the limit one every {self.shortest_ms:.2f} ms")


def measure_energy(work: Callable[[], object], device: torch.device, run_ms: float) -> Energy | str:
    """`run_ms`: about how long a run takes. Where it cannot be measured, why."""
    if device.type != "cuda":
        return "energy is measured on a GPU only"
    opened = open_nvml(device)
    if isinstance(opened, str):
        return f"energy: {opened}"
    nvml, handle = opened
    runs = max(1, round(1e3 * SECONDS / run_ms))
    work()
    torch.cuda.synchronize(device)
    try:
        before_mj, began_s = nvml.nvmlDeviceGetTotalEnergyConsumption(handle), time.perf_counter()
        for _ in range(runs):
            work()
        torch.cuda.synchronize(device)
        joules = 1e-3 * (nvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before_mj)
        seconds = time.perf_counter() - began_s
        return Energy(joules / runs, joules / seconds, 1e-3 * nvml.nvmlDeviceGetPowerManagementLimit(handle))
    except nvml.NVMLError as error:
        return f"energy: not readable: {error}"
