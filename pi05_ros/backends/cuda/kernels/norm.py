"""Row norms of vision and prefix, one program a row, in float32.

layer_norm: the float32 residual x takes up the last product and its bias; out is x with mean 0 and variance 1, times
the norm's scale (what it adds is in the next bias). row_sums: no norm, which the next product has (vision_product.py),
but x times that norm's scale and the sums it needs.
inverse_rms: 1 / rms(x) alone, which what follows a product multiplies by; the norm's scale is in the weights.
Floor: bytes (vision 10.6 MB, 2.5 us; prefix 4 MB). Checked against torch in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.model.gemma import RMS_EPS
from pi05_ros.model.low_precision import FP8
from pi05_ros.model.siglip import LAYER_NORM_EPS

ROOM = 0.125  # as csrc/product.cu: what a row's deviation becomes in e4m3


@triton.jit
def _layer_norm(x_ptr, delta_ptr, add_ptr, scale_ptr, out_ptr, sums_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                ADDED: tl.constexpr, DELTA: tl.constexpr, SUMS: tl.constexpr, ROOM: tl.constexpr):
    at = tl.program_id(0) * WIDTH
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    x = tl.load(x_ptr + at + cols, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + cols, mask=inside, other=0.0)  # here: all loads under way together
    if ADDED > 0:
        if DELTA:
            x += tl.load(delta_ptr + at + cols, mask=inside, other=0.0).to(tl.float32)
        add = add_ptr + tl.program_id(0) % ADDED * WIDTH
        x += tl.load(add + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + at + cols, x.to(x_ptr.dtype.element_ty), mask=inside)
    if SUMS:
        total, squares = tl.sum(x), tl.sum(x * x)
        tl.store(sums_ptr + 2 * tl.program_id(0), total)
        tl.store(sums_ptr + 2 * tl.program_id(0) + 1, squares)
        y = x
        if ROOM > 0:  # in FP8
            mean = total / WIDTH
            y *= ROOM * tl.rsqrt(tl.maximum(squares / WIDTH - mean * mean, 0.0) + eps)
    else:
        centred = tl.where(inside, x - tl.sum(x) / WIDTH, 0.0)
        y = centred * tl.rsqrt(tl.sum(centred * centred) / WIDTH + eps)
    y *= scale
    if ROOM > 0:
        y = tl.minimum(tl.maximum(y, -448.0), 448.0)
    tl.store(out_ptr + at + cols, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _inverse_rms(x_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0), row_inverse_rms(x_ptr + tl.program_id(0) * WIDTH, eps, WIDTH, BLOCK))


@triton.jit
def row_inverse_rms(row_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(row_ptr + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x) / WIDTH + eps)


def layer_norm(x: Tensor, delta: Tensor | None, add: Tensor | None, scale: Tensor, out: Tensor) -> None:
    """x [rows, W] += delta [rows, W] + add [W] or [n, W], row i taking i % n (where given); out = scale float32 [W] *
    (x - mean) / std."""
    _by_rows(x, delta, add, scale, out, None)


def row_sums(x: Tensor, add: Tensor, scale: Tensor, out: Tensor, sums: Tensor) -> None:
    """x [rows, W] += add [n, W]; out = x * scale, float32 [W]; sums float32 [rows, 2] of x and of its squares. An e4m3
    out is in the unit that these sums give."""
    _by_rows(x, None, add, scale, out, sums)


def _by_rows(x: Tensor, delta: Tensor | None, add: Tensor | None, scale: Tensor, out: Tensor,
             sums: Tensor | None) -> None:
    rows, width = x.shape
    added = 0 if add is None else add.numel() // width
    _layer_norm[(rows,)](x, out if delta is None else delta, x if add is None else add, scale, out,
                         x if sums is None else sums, LAYER_NORM_EPS, width, triton.next_power_of_2(width), added,
                         delta is not None, sums is not None, ROOM if out.dtype == FP8 else 0.0, num_warps=1)


def inverse_rms(x: Tensor, out: Tensor) -> None:
    """out float32 [rows] = 1 / rms(x), x [rows, W]."""
    rows, width = x.shape
    _inverse_rms[(rows,)](x, out, RMS_EPS, width, triton.next_power_of_2(width), num_warps=4)
