"""The products of the vision tower on Hopper, with norm, bias, activation and residual inside: csrc/product.cu.

One kernel for all four of a layer, launched dependent, so that no norm is a kernel and no product waits for the last to
drain. Floor at 768 rows: 23.5 GFLOP a layer, 22 us at the tensor cores' own rate. Other GPUs and models take PyTorch's
products and `norm.layer_norm`. Checked against torch in float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pi05_ros.backends.cuda.cpp import Kernel, Program
from pi05_ros.backends.cuda.packing import Affine
from pi05_ros.backends.cuda.shapes import NORM_PARTS
from pi05_ros.backends.cuda.tma import TensorMap
from pi05_ros.errors import BackendError
from pi05_ros.model.low_precision import FP8
from pi05_ros.model.siglip import LAYER_NORM_EPS

if TYPE_CHECKING:
    from pi05_ros.backends.cuda.packing_fp8 import Fp8Affine

ROWS, MOST_SHARED, MOST_STAGES = 128, 227 * 1024, 8


@dataclass(frozen=True)
class Tiling:
    """A block's columns; how many blocks share weights, and how many a tile; stages of the ring (0: all that fit)."""

    columns: int
    sharing: int
    split: int
    stages: int = 0


class Sums(NamedTuple):
    """float32 [most parts, n, 2], as many parts as hold: row by row of the residual and of its squares."""

    at: Tensor
    parts: int


def fits_hopper(width: int, hidden: int, device: torch.device) -> bool:
    return device.type == "cuda" and fits(width, hidden, torch.cuda.get_device_capability(device))


def fits(width: int, hidden: int, capability: tuple[int, int]) -> bool:
    return capability == (9, 0) and width % 64 == 0 and hidden % 8 == 0 and min(width, hidden) >= 256


def tiling(rows: int, features: int, inner: int, residual: bool, processors: int) -> Tiling:
    """One wave: the narrowest tiles that the processors take at once; a long sum into few features is split."""
    heights, split = -(-rows // ROWS), 2 if residual and inner > 2 * features else 1
    sharing = 2 if split == 2 and heights % 2 == 0 else 1
    room = processors if split == 1 else processors * 7 // 8  # clusters leave some out
    tiles, unit = max(1, min(room // heights, NORM_PARTS) // split), 8 * split
    return Tiling(min(256 if not residual else 128, -(-features // (tiles * unit)) * unit), sharing, split)


@functools.cache
def kernel(features: int, out: int, inner: int, t: Tiling, norm: bool, gelu: bool, residual: bool,
           low: bool, narrow: bool, device: torch.device) -> Kernel:
    part = -(-(t.columns // 8) // t.sharing) * 8
    stage = 128 * ROWS + t.sharing * part * 128
    rest = (ROWS * t.columns // t.split * 4 if t.split > 1 else 0) + 8 * (t.columns + ROWS) + 16
    stages = t.stages or min(MOST_STAGES, (MOST_SHARED - rest) // (stage + 16))
    shared, sums = stages * (stage + 16) + rest, t.columns // 2
    defines = {"F": features, "OUT": out, "K": inner, "COLUMNS": t.columns, "SHARING": t.sharing, "SPLIT": t.split,
               "STAGES": stages, "NORM": int(norm), "GELU": int(gelu), "RESIDUAL": int(residual),
               "E4M3": int(low), "NARROW": int(narrow),
               "SHARED_BYTES": shared, "LAST": t.columns // 8 - 1, "LEFT": sums, "RIGHT": sums + 1, "KEEP": sums + 2}
    return Program("product", defines, device).kernel("product", shared)


def normed_product(x: Tensor, layer: Affine | Fp8Affine, sums: Tensor, parts: int, out: Tensor, gelu: bool = False,
                   t: Tiling | None = None, before: Sums | None = None) -> None:
    """out [rows, F] = LayerNorm(r) W^T + b, or gelu_tanh of it; x [rows, K] is r times the norm's scale, with that many
    parts of sums float32 [parts, n, 2] (row by row: of r and of its squares). In FP8 x is in the unit that `before`
    gives, the sums before these; an e4m3 out is over the input scale of what reads it."""
    now = Sums(sums, parts)
    _launch(x, layer, out, out, now, before or now, sums, gelu, False, t)


def added_product(x: Tensor, layer: Affine | Fp8Affine, residual: Tensor, out: Tensor, sums: Tensor,
                  t: Tiling | None = None, before: Sums | None = None) -> int:
    """residual float32 [rows, F] += x W^T + b, out it times the next norm's scale; returns how many parts of `sums` are
    now its sums. An e4m3 out is in the unit that `before` gives, the residual's until now."""
    now = before or Sums(sums, 0)
    return _launch(x, layer, residual, out, now, now, sums, False, True, t)


def _launch(x: Tensor, layer: Affine | Fp8Affine, residual: Tensor, out: Tensor, sums: Sums, before: Sums, left: Tensor,
            gelu: bool, adds: bool, t: Tiling | None) -> int:
    (rows, inner), features, low = x.shape, len(layer.weight), x.dtype == FP8
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    t = t or tiling(rows, features, inner, adds, processors)
    heights, widths = -(-rows // (ROWS * t.sharing)), -(-features // t.columns)
    share = -(-(t.columns // 8) // t.sharing) * 8
    if adds and widths * t.split > len(left):
        raise BackendError("vision width", expected=f"at most {len(left)} parts of a row's sums",
                           received=str(widths * t.split), way_out="Use backend 'eager' for this model.")
    maps = TensorMap(x, (ROWS, 128 // x.itemsize)), TensorMap(layer.weight, (share, 128 // x.itemsize))
    kernel(features, out.stride(0), inner, t, not adds, gelu, adds, low, out.dtype == FP8, x.device).launch(
        (heights * widths * t.sharing * t.split,), 384,
        (*maps, layer.table, residual, sums.at, before.at, left, out, rows, left.shape[1], sums.parts, before.parts,
         LAYER_NORM_EPS, layer.factor, layer.over),
        cluster=t.sharing * t.split, dependent=True)
    return widths * t.split
