"""What the hardware can do, measured here and now: every time is held against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pi05_ros.benchmark.clock import milliseconds


@dataclass(frozen=True)
class Ceiling:
    """Copy in bytes read and written a second, matrix product in FLOP a second, pinned host memory to the GPU."""

    bytes_per_s: float
    flop_per_s: float
    upload_bytes_per_s: float | None = None  # None without a GPU


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
                   _upload_bytes_per_s(device) if gpu else None)


def _upload_bytes_per_s(device: torch.device) -> float:
    host = torch.ones(2**26, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    return host.nbytes / milliseconds(lambda: target.copy_(host, non_blocking=True), device, runs=10).median * 1e3
