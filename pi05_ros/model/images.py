"""Stage 0 in the reference: uint8 camera frames to float32 images in [-1, 1] (PI05_SPEC section 8)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pi05_ros.errors import ConfigError
from pi05_ros.transforms.images import letterbox, resize_with_pad


def prepare(frames: Sequence[np.ndarray | None], size: int, resize: str, device: torch.device) -> Tensor:
    """N frames, each uint8 [B, h, w, 3] or None (no camera: black), to [B, N, 3, size, size].

    `resize`: `pil` resizes as openpi's server does, `bilinear` as lerobot does inside its model.
    """
    check_resize(resize)
    one = pil if resize == "pil" else bilinear
    batch = next((len(f) for f in frames if f is not None), 1)
    black = np.zeros((batch, size, size, 3), np.uint8)
    return torch.stack([one(black if f is None else f, size, device) for f in frames], dim=1)


def check_resize(resize: str) -> None:
    if resize not in ("pil", "bilinear"):
        raise ConfigError("resize", expected="'pil' or 'bilinear'", received=repr(resize),
                          way_out="Take the one of the checkpoint's trainer.")


def pil(frame: np.ndarray, size: int, device: torch.device) -> Tensor:
    """Antialiased, rounded to uint8, then /255*2-1."""
    resized = np.stack([resize_with_pad(f, size) for f in frame])
    return to_unit(torch.from_numpy(resized).to(device)) * 2.0 - 1.0


def bilinear(frame: np.ndarray, size: int, device: torch.device) -> Tensor:
    """Not antialiased, in float32 on [0, 1], padded with 0, then *2-1."""
    pixels = to_unit(torch.from_numpy(np.ascontiguousarray(frame)).to(device))
    if pixels.shape[-2:] != (size, size):
        box = letterbox(pixels.shape[-2], pixels.shape[-1], size)
        pixels = F.interpolate(pixels, (box.height, box.width), mode="bilinear", align_corners=False).clamp(0.0, 1.0)
        right, bottom = size - box.width - box.left, size - box.height - box.top
        pixels = F.pad(pixels, (box.left, right, box.top, bottom))
    return pixels * 2.0 - 1.0


def to_unit(frame: Tensor) -> Tensor:
    """uint8 [B, h, w, 3] to float32 [B, 3, h, w] in [0, 1]."""
    return frame.permute(0, 3, 1, 2).float() / 255.0
