"""What the hardware can do, measured here and now: every time is held against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pi05_ros.benchmark.clock import milliseconds
from pi05_ros.model.low_precision import FP8
from pi05_ros.model.quantised_linear import FP8_CAPABILITY


@dataclass(frozen=True)
class Ceiling:
    """Copy in bytes read and written a second, matrix product in FLOP a second, pinned host memory to the GPU;
    fp8_flop_per_s: of FP8 numbers, by PyTorch's library call with its fast sums; None where there is no FP8."""

    bytes_per_s: float
    flop_per_s: float
    upload_bytes_per_s: float | None = None  # None without a GPU
    fp8_flop_per_s: float | None = None


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """A copy far larger than the caches, and a large matrix product in `dtype` on random numbers."""
    gpu = device.type == "cuda"
    numel, side = (2**30, 8192) if gpu else (2**25, 1024)
    source = torch.empty(numel, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source), device, runs=10).median
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product_ms = milliseconds(lambda: a @ b, device, runs=10).median
    return Ceiling(2 * source.nbytes / copy_ms * 1e3, 2 * side**3 / product_ms * 1e3,
                   _upload_bytes_per_s(device) if gpu else None, _fp8_flop_per_s(device, side) if gpu else None)


def _fp8_flop_per_s(device: torch.device, side: int) -> float | None:
    if torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        return None
    a, b = (torch.randn(side, side, device=device).to(FP8) for _ in range(2))
    one = torch.ones((), device=device)
    ms = milliseconds(lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16,
                                               use_fast_accum=True), device, runs=10).median
    return 2 * side**3 / ms * 1e3


def _upload_bytes_per_s(device: torch.device) -> float:
    host = torch.ones(2**26, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    return host.nbytes / milliseconds(lambda: target.copy_(host, non_blocking=True), device, runs=10).median * 1e3
