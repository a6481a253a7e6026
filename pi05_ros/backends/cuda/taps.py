"""Tap tables of the two resizes: which source pixels make an output pixel, with which weights (PI05_SPEC section 8).

An output pixel is the sum over k of weights[k] times source pixel first + k, along the rows and then along the columns.
A source pixel past the last one stands for the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PRECISION_BITS = 22  # Pillow's fixed point, 32 bits less 8 of the pixel and 2 to spare


@dataclass(frozen=True)
class Taps:
    """One axis: `first` int32 [length]; `weights` [taps, length], int32 in units of 2^-22 or float32."""

    first: np.ndarray
    weights: np.ndarray


def axis_taps(extent: int, length: int, resize: str) -> Taps:
    """Of `extent` source pixels to `length`; `resize` is `pil` or `bilinear`."""
    return antialiased(extent, length) if resize == "pil" else two_nearest(extent, length)


def antialiased(extent: int, length: int) -> Taps:
    """Pillow's triangle filter, as wide as a downscaled pixel, in its order of operations: the same integers."""
    scale = extent / length
    support = max(scale, 1.0)
    centre = (np.arange(length) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), extent)
    source = first + np.arange((end - first).max())[:, None]
    weights = np.maximum(1.0 - np.abs((source - centre + 0.5) * (1.0 / support)), 0.0) * (source < end)
    weights /= weights.cumsum(axis=0)[-1]  # summed one by one, as Pillow does
    return Taps(first.astype(np.int32), (0.5 + weights * 2**PRECISION_BITS).astype(np.int32))


def two_nearest(extent: int, length: int) -> Taps:
    """PyTorch's bilinear with align_corners=False: two pixels, in float32.

    The position is rounded once, as its GPU and AVX2 kernels do (a fused multiply-add); float64 holds it exactly.
    """
    scale = np.float64(np.float32(extent) / np.float32(length))
    position = np.maximum(((np.arange(length) + 0.5) * scale - 0.5).astype(np.float32), np.float32(0))
    first = position.astype(np.int32)
    second = position - first.astype(np.float32)
    return Taps(first, np.stack([np.float32(1) - second, second]))
