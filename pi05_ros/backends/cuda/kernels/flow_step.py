"""The ends of a denoising step: noise and mask in, actions to tokens, tokens to velocity and the Euler step.

start: one program, before the first step. enter: x = x_t W_in^T + b. leave: x_t += dt (norm(x) W_out^T + b).
Floor: latency; 131 KB of weights. Products in float32 (tf32 where the input is bfloat16 anyway). Checked against
model/pi05.py in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.backends.cuda.kernels.pair_product import inverse_rms, row_block
from pi05_ros.backends.cuda.kernels.residual_product import leave_residual
from pi05_ros.backends.cuda.shapes import TILE, tile
from pi05_ros.model.gemma import RMS_EPS


@triton.jit(do_not_specialize=["prefix", "steps", "guided"])
def _start(noise_ptr, mask_ptr, x_t_ptr, valid_ptr, counters_ptr, prefix, horizon, numel, steps, guided,
           ROWS: tl.constexpr, NUMEL: tl.constexpr):
    row, i = tl.arange(0, ROWS), tl.arange(0, NUMEL)
    seen = tl.load(mask_ptr + row, mask=row < prefix, other=0).to(tl.int32)
    tl.store(valid_ptr + row, tl.where(row < prefix, seen, 1).to(tl.uint8), mask=row < prefix + horizon)
    tl.store(counters_ptr, prefix)
    tl.store(counters_ptr + 1, tl.sum(seen))
    tl.store(counters_ptr + 2, 0)
    tl.store(counters_ptr + 3, steps)
    tl.store(counters_ptr + 4, guided)
    tl.store(x_t_ptr + i, tl.load(noise_ptr + i, mask=i < numel, other=0.0), mask=i < numel)


@triton.jit
def _enter(x_t_ptr, w_ptr, bias_ptr, scale_ptr, x_ptr, scaled_ptr, squares_ptr, M,
           A: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    cols, rows = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    a = tl.arange(0, A)
    w = tl.load(w_ptr + cols[None, :] * A + a[:, None])
    x_t = tl.load(x_t_ptr + rows[:, None] * A + a[None, :], mask=rows[:, None] < M, other=0.0)
    x = tl.dot(x_t, w, input_precision="ieee") + tl.load(bias_ptr + cols)[None, :]
    leave_residual(x, x_ptr, scaled_ptr, squares_ptr, scale_ptr, rows, cols, tl.program_id(0), M, N)


@triton.jit
def _leave(scaled_ptr, w_ptr, bias_ptr, squares_ptr, dt_ptr, x_t_ptr, M, eps, K: tl.constexpr,
           A: tl.constexpr, TILES: tl.constexpr, TILES_BLOCK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    rows, a, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, A), tl.arange(0, BK)
    acc = tl.zeros((BM, A), tl.float32)
    for start in range(0, K, BK):
        x = tl.load(scaled_ptr + rows[:, None] * K + start + k[None, :], mask=rows[:, None] < M, other=0.0)
        w = tl.load(w_ptr + a[None, :] * K + start + k[:, None])
        acc = tl.dot(x.to(tl.float32), w, acc, input_precision="tf32")
    factor = inverse_rms(squares_ptr, rows, M, K, TILES, TILES_BLOCK, eps)[:, None]
    v = acc * factor + tl.load(bias_ptr + a)[None, :]
    at = x_t_ptr + rows[:, None] * A + a[None, :]
    inside = rows[:, None] < M
    tl.store(at, tl.load(at, mask=inside, other=0.0) + tl.load(dt_ptr) * v, mask=inside)


def start(noise: Tensor, pad_mask: Tensor, x_t: Tensor, valid: Tensor, counters: Tensor, steps: int = 0,
          guided: int = 0) -> None:
    """noise [H, A], pad_mask [P] to x_t, the keys' mask with the suffix behind the prefix, and the counters."""
    prefix, horizon = pad_mask.shape[0], x_t.shape[0]
    _start[(1,)](noise, pad_mask, x_t, valid, counters, prefix, horizon, x_t.numel(), steps, guided,
                 triton.next_power_of_2(valid.shape[0]), triton.next_power_of_2(x_t.numel()), num_warps=4)


def enter(x_t: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, x: Tensor, scaled: Tensor, squares: Tensor) -> None:
    """x_t [H, A] to the residual x [H, N], and what the first product needs of it; scale [N]."""
    rows, width = x.shape
    bm, bn = row_block(rows), tile(width, TILE)
    _enter[(width // bn, triton.cdiv(rows, bm))](x_t, weight, bias, scale, x, scaled, squares, rows,
                                                 x_t.shape[1], width, bm, bn,
                                                 num_warps=4)


def leave(scaled: Tensor, weight: Tensor, bias: Tensor, squares: Tensor, dt: Tensor, x_t: Tensor) -> None:
    """x_t += dt * v, v from the residual (already scaled)."""
    rows, width = scaled.shape
    bm = 16
    _leave[(triton.cdiv(rows, bm),)](scaled, weight, bias, squares, dt, x_t, rows, RMS_EPS, width,
                                     x_t.shape[1], squares.shape[0], triton.next_power_of_2(squares.shape[0]), bm,
                                     tile(width, 128), num_warps=4, num_stages=3)
