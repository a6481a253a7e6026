"""Weights from names alone: the same random model anywhere, without a file (PI05_SPEC section 14)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pi05_ros.config import Pi05Config
from pi05_ros.model.weights import OPENPI


@dataclass(frozen=True)
class RecipeSource:
    """A `WeightSource` whose tensor of name K depends on (seed, K, shape) only; values are rounded to bfloat16."""

    config: Pi05Config
    seed: int = 0
    quantisation: ClassVar[None] = None

    def get(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
        z = torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32)).to(device)
        mean, std = moments(name, shape)
        return z.mul_(std).add_(torch.as_tensor(mean, device=device)).bfloat16()


@dataclass(frozen=True)
class DeviceSource:
    """The recipe's moments, drawn on the device in seconds instead of a minute, for speed and error: the tensor of name
    K depends on (seed, K, shape) and the device's generator."""

    config: Pi05Config
    seed: int = 0
    quantisation: ClassVar[None] = None

    def get(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))
        z = torch.empty(shape, dtype=torch.float32, device=device).normal_(generator=generator)
        mean, std = moments(name, shape)
        return z.mul_(std).add_(torch.as_tensor(mean, device=device)).bfloat16()


def moments(name: str, shape: torch.Size) -> tuple[np.float32 | np.ndarray, float]:
    """Mean (a number, or one per row) and standard deviation of the tensor called `name`; first match wins."""
    width = shape[-1]
    fan_in = int(np.prod(shape[1:]))
    zero, one = np.float32(0.0), np.float32(1.0)
    if name.endswith(".dense.bias"):  # scale and shift near 0, gate near 0.6
        third = width // 3
        return np.repeat(np.array([0.0, 0.0, 0.6], np.float32), third), 0.1
    if name.endswith(".dense.weight"):
        return zero, 0.6 / fan_in**0.5
    if name.endswith(("layer_norm1.weight", "layer_norm2.weight", "post_layernorm.weight")):
        return one, 0.1
    if name.endswith("norm.weight") and len(shape) == 1:
        return zero, 0.1
    if name.endswith(".bias"):
        return zero, 0.02
    if name.endswith("position_embedding.weight"):
        return zero, 0.1
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return zero, 1.0 / width**0.5
    if name.endswith(("q_proj.weight", "k_proj.weight")) and name.startswith(OPENPI):
        return zero, 1.5 / fan_in**0.5
    return zero, 1.0 / fan_in**0.5
