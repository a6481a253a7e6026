"""Random weights drawn on the device: the recipe's moments in seconds instead of a minute, for speed and error."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pi05_ros.config import Pi05Config
from pi05_ros.model.recipe import moments


@dataclass(frozen=True)
class DeviceSource:
    """A `WeightSource` whose tensor of name K depends on (seed, K, shape) and the device's generator."""

    config: Pi05Config
    seed: int = 0

    def get(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))
        z = torch.empty(shape, dtype=torch.float32, device=device).normal_(generator=generator)
        mean, std = moments(name, shape)
        return z.mul_(std).add_(torch.as_tensor(mean, device=device)).bfloat16()
