"""What stands before an FP8 product: the residual takes up the last product, is normed and rounded, row by row.

x += delta (in x's dtype, which is stored), n = the norm of x in float32, out = n weight + shift over input_scale in
e4m3, saturated; into a bfloat16 `out` the norm goes as it is, for a product that is not in FP8. One program a row.
Floor: bytes, 14 MB at 968 rows (3 us). Checked against the norms of model/ and low_precision.to_fp8.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.model.gemma import RMS_EPS
from pi05_ros.model.low_precision import FP8_MAX
from pi05_ros.model.siglip import LAYER_NORM_EPS

FP8_LIMIT = tl.constexpr(FP8_MAX)


@triton.jit
def to_fp8(x, scale):
    """x / scale, saturated, as e4m3."""
    return tl.minimum(tl.maximum(x / scale, -FP8_LIMIT), FP8_LIMIT).to(tl.float8e4nv)


@triton.jit
def _norm_to_fp8(x_ptr, delta_ptr, weight_ptr, shift_ptr, scale_ptr, out_ptr, eps, WIDTH: tl.constexpr,
                 BLOCK: tl.constexpr, PERIOD: tl.constexpr, CENTRED: tl.constexpr, SHIFTED: tl.constexpr,
                 FP8: tl.constexpr):
    row = tl.program_id(0)
    at = row * WIDTH
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    x = tl.load(x_ptr + at + cols, mask=inside, other=0.0).to(tl.float32)
    if PERIOD > 0:
        x += tl.load(delta_ptr + row % PERIOD * WIDTH + cols, mask=inside, other=0.0).to(tl.float32)
        taken_up = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at + cols, taken_up, mask=inside)
        x = taken_up.to(tl.float32)
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x) / WIDTH, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x) / WIDTH + eps)
    if FP8:
        y *= tl.load(weight_ptr + cols, mask=inside, other=0.0)
        if SHIFTED:
            y += tl.load(shift_ptr + cols, mask=inside, other=0.0)
        tl.store(out_ptr + at + cols, to_fp8(y, tl.load(scale_ptr)), mask=inside)
    else:
        tl.store(out_ptr + at + cols, y.to(out_ptr.dtype.element_ty), mask=inside)


def norm_to_fp8(x: Tensor, delta: Tensor | None, weight: Tensor, shift: Tensor | None, input_scale: Tensor,
                out: Tensor) -> None:
    """RMSNorm, or with `shift` LayerNorm. x [rows, W] += delta [rows, W], or [n, W] of which row i takes i % n; weight
    and shift float32 [W]; out e4m3 [rows, W]."""
    _launch(x, delta, weight, shift, input_scale, out, shift is not None, True)


def norm_to_bf16(x: Tensor, delta: Tensor | None, out: Tensor, centred: bool) -> None:
    """The same without weight, shift and rounding: out bfloat16. `centred`: LayerNorm."""
    _launch(x, delta, x, None, x, out, centred, False)


def _launch(x: Tensor, delta: Tensor | None, weight: Tensor, shift: Tensor | None, scale: Tensor, out: Tensor,
            centred: bool, fp8: bool) -> None:
    rows, width = x.shape
    _norm_to_fp8[(rows,)](x, x if delta is None else delta, weight, weight if shift is None else shift, scale, out,
                          LAYER_NORM_EPS if centred else RMS_EPS, width, triton.next_power_of_2(width),
                          0 if delta is None else delta.numel() // width, centred, shift is not None, fp8, num_warps=4)
