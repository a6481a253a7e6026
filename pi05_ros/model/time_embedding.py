"""Sine and cosine features of the flow time (PI05_SPEC section 5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pi05_ros.model.schedule import MAX_PERIOD, MIN_PERIOD


def time_embedding(t: Tensor, width: int) -> Tensor:
    """t of shape [...] to [..., width]: sines first, then cosines; computed in float64, returned in t's dtype."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=t.device)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angle = t[..., None].double() * (2.0 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(t.dtype)
