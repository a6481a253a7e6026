"""The way in: refuse what does not fit, load straight to the GPU, capture every graph. Needs no Triton to refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pi05_ros.backends.cuda import checks
from pi05_ros.backends.cuda.packing import pack
from pi05_ros.backends.cuda.persistent import chosen_expert
from pi05_ros.backends.cuda.quantised import (
    IN_FP8,
    check_quantisation,
    expert_in_fp8,
    how_layers_run,
    plain_source,
)
from pi05_ros.backends.cuda.shapes import allocate
from pi05_ros.backends.cuda.tuning import Gpu
from pi05_ros.model.weights import Progress, WeightSource

if TYPE_CHECKING:
    from pi05_ros.backends.cuda.stages import CudaStages


def build(stages: Sequence[str], source: WeightSource, device: torch.device, dtype: str, resize: str,
          on_progress: Progress | None) -> CudaStages:
    """Raises BackendError where the device, the precision, the model, a library or the memory is not fit for it."""
    config, wanted = source.config, list(stages)
    checks.check_request(config, wanted, device, dtype)
    capability = torch.cuda.get_device_capability(device)
    check_quantisation(source.quantisation, config, wanted, capability)
    checks.check_libraries()
    from pi05_ros.backends.cuda.stages import CudaStages
    from pi05_ros.backends.cuda.tilings import tilings_for

    with torch.cuda.device(device):
        low_expert = expert_in_fp8(source.quantisation, config)
        persistent = chosen_expert(config, device, low_expert) if "expert" in wanted else None
        runs = how_layers_run(source.quantisation, config, wanted, capability, persistent is not None)
        host_embedding = checks.check_memory(config, wanted, device, runs)
        low = [name for name, how in runs.items() if how == IN_FP8]
        weights = pack(plain_source(source, runs), device, wanted, on_progress,
                       persistent.clusters if persistent else 0, low, host_embedding)
        buffers = allocate(config, device, persistent is not None)
        tilings = tilings_for(config, weights, buffers, Gpu.of(device))
        built = CudaStages(config, weights, buffers, tilings, device, resize, persistent, runs)
        torch.cuda.empty_cache()  # what loading no longer needs; graphs have memory of their own
        built.capture()
        torch.cuda.empty_cache()
    return built
