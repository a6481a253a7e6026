"""What the hardware can do, and the least an inference must: the floor every measured time is held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pi05_ros.benchmark.clock import milliseconds
from pi05_ros.config import GemmaConfig, Pi05Config


@dataclass(frozen=True)
class Ceiling:
    """Measured here and now: copy in bytes read and written a second, matrix product in FLOP a second."""

    bytes_per_s: float
    flop_per_s: float


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """A copy far larger than the caches, and a large matrix product in `dtype` on random numbers."""
    gpu = device.type == "cuda"
    numel, side = (2**30, 8192) if gpu else (2**25, 1024)
    source = torch.empty(numel, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source), device, runs=10).median
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product_ms = milliseconds(lambda: a @ b, device, runs=10).median
    return Ceiling(2 * source.nbytes / copy_ms * 1e3, 2 * side**3 / product_ms * 1e3)


@dataclass(frozen=True)
class Work:
    """What a stage cannot avoid: floating-point operations of its matrix products, bytes of its weights."""

    flop: float
    bytes: float

    def floor_ms(self, ceiling: Ceiling) -> float:
        return 1e3 * max(self.flop / ceiling.flop_per_s, self.bytes / ceiling.bytes_per_s)


def stage_work(config: Pi05Config, cameras: int, tokens: int, num_steps: int, bytes_per_weight: int) -> dict[str, Work]:
    """Least work of each stage for one observation; attention counted, the last prefix layer stops after K and V."""
    v, p, e = config.vision, config.prefix, config.expert
    rows = cameras * v.num_patches
    prefix = rows + tokens
    vision_weights = v.depth * (4 * v.width**2 + 2 * v.width * v.mlp_dim) + v.width * p.width
    vision_flop = 2 * rows * vision_weights + v.depth * 4 * rows * v.num_patches * v.width
    layer, kv = _layer_weights(p), 2 * p.width * p.num_kv_heads * p.head_dim
    prefix_weights = (p.depth - 1) * layer + kv
    attention = 4 * prefix * prefix * p.num_heads * p.head_dim
    expert_weights = e.depth * _layer_weights(e)
    suffix = config.action_horizon
    expert_attention = e.depth * 4 * suffix * (prefix + suffix) * e.num_heads * e.head_dim
    cache = 2 * e.depth * prefix * e.num_kv_heads * e.head_dim
    return {
        "vision": Work(vision_flop, vision_weights * bytes_per_weight),
        "prefix": Work(2 * prefix * prefix_weights + (p.depth - 1) * attention, prefix_weights * bytes_per_weight),
        "expert": Work(num_steps * (2 * suffix * expert_weights + expert_attention),
                       num_steps * (expert_weights + cache) * bytes_per_weight),
    }


def _layer_weights(config: GemmaConfig) -> int:
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return config.width * heads + 3 * config.width * config.mlp_dim
