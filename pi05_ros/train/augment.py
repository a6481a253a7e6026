"""Small random changes of the images, one for each camera of each sample: what light and camera mounts do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CROP = 0.03  # of the side at most is cut away: no more than camera mounts move the picture
BRIGHTNESS, CONTRAST, SATURATION = 0.2, 0.2, 0.2


def draw_changes(batch: int, cameras: int, generator: torch.Generator) -> Tensor:
    """float32 [batch * cameras, 6], uniform in -1..1: crop size, across, down; brightness, contrast, saturation."""
    return torch.rand(batch * cameras, 6, generator=generator) * 2 - 1


def augment(pixels: Tensor, changes: Tensor) -> Tensor:
    """float32 [B, N, 3, s, s] in [-1, 1], cropped and coloured by `changes`; the same shape and range."""
    flat = pixels.flatten(0, 1)
    size, across, down, brightness, contrast, saturation = changes.unbind(-1)
    cut = CROP * (size + 1) / 2
    theta = torch.zeros(len(flat), 2, 3, device=flat.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 - cut
    theta[:, 0, 2], theta[:, 1, 2] = across * cut, down * cut  # the crop stays inside the picture
    grid = F.affine_grid(theta, list(flat.shape), align_corners=False)
    flat = F.grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def by(amount: Tensor, strength: float) -> Tensor:
        return (1 + strength * amount)[:, None, None, None]

    flat = (flat + 1) * by(brightness, BRIGHTNESS) - 1
    middle = flat.mean(dim=(1, 2, 3), keepdim=True)
    flat = middle + (flat - middle) * by(contrast, CONTRAST)
    grey = flat.mean(dim=1, keepdim=True)
    flat = grey + (flat - grey) * by(saturation, SATURATION)
    return flat.clamp(-1, 1).view_as(pixels)
