"""The expert's two wide products, few rows by many columns: q|k|v with RoPE, and gate|up with the gated linear unit.

Each output needs two columns of the weight: dimension i and i + head_dim / 2 of a head (RoPE's pair), or gate and up.
A program accumulates both, so the epilogue has them in registers. Their input is (1 + scale) x, the epilogue's factor
1 / rms(x) comes from the partial sums of squares that the residual kernel left, and shift W^T is the bias.
Floor: the weights, 5.2 MB (1.2 us) and 16.8 MB (4.0 us). Checked against model/gemma.py in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.backends.cuda.kernels.glu import gelu_tanh
from pi05_ros.backends.cuda.shapes import tile
from pi05_ros.backends.cuda.tuning import Gpu, Tiles
from pi05_ros.model.gemma import RMS_EPS

QKV_CANDIDATES = [Tiles(64, 16, 128, warps=4, stages=4), Tiles(64, 16, 128, warps=4, stages=3),
                  Tiles(64, 16, 64, warps=4, stages=4), Tiles(32, 16, 128, warps=4, stages=3),
                  Tiles(64, 32, 64, warps=4, stages=3), Tiles(16, 16, 128, warps=2, stages=3)]
GLU_CANDIDATES = [Tiles(64, 32, 128, warps=4, stages=4), Tiles(64, 32, 128, warps=4, stages=3),
                  Tiles(64, 32, 64, warps=4, stages=4), Tiles(64, 16, 128, warps=4, stages=3),
                  Tiles(32, 32, 128, warps=4, stages=3), Tiles(64, 64, 64, warps=8, stages=3),
                  Tiles(64, 32, 64, warps=4, stages=3)]


def shared_bytes(t: Tiles, gpu: Gpu) -> int:
    """A pipeline of the input's tile and two of the weight's."""
    return 2 * gpu.buffers(t.stages) * t.inner * (t.rows + 2 * t.columns) + 1024


@triton.jit
def inverse_rms(squares_ptr, rows, M, WIDTH: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, eps):
    """1 / rms of each row, from partial sums of squares [TILES, M]."""
    t = tl.arange(0, BLOCK)
    parts = tl.load(squares_ptr + t[:, None] * M + rows[None, :], mask=(t[:, None] < TILES) & (rows[None, :] < M),
                    other=0.0)
    return tl.rsqrt(tl.sum(parts, 0) / WIDTH + eps)


@triton.jit
def two_products(a_ptr, w_ptr, rows, first, second, M, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr):
    """a [M, K] times the columns `first` and `second` of w^T, w [N, K]."""
    k = tl.arange(0, BK)
    a = a_ptr + rows[:, None] * K + k[None, :]
    w_1 = w_ptr + first[None, :] * K + k[:, None]
    w_2 = w_ptr + second[None, :] * K + k[:, None]
    acc_1 = tl.zeros((BM, BN), tl.float32)
    acc_2 = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        tile_a = tl.load(a + start, mask=rows[:, None] < M, other=0.0)
        acc_1 = tl.dot(tile_a, tl.load(w_1 + start), acc_1)
        acc_2 = tl.dot(tile_a, tl.load(w_2 + start), acc_2)
    return acc_1, acc_2


@triton.jit
def _glu_product(a_ptr, w_ptr, bias_ptr, squares_ptr, out_ptr, M, eps, K: tl.constexpr, F: tl.constexpr,
                  TILES: tl.constexpr, TILES_BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr):
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    gate_bias, up_bias = tl.load(bias_ptr + cols), tl.load(bias_ptr + cols + F)
    factor = inverse_rms(squares_ptr, rows, M, K, TILES, TILES_BLOCK, eps)[:, None]
    gate, up = two_products(a_ptr, w_ptr, rows, cols, cols + F, M, K, BM, BN, BK)
    gate = gate * factor + gate_bias[None, :]
    up = up * factor + up_bias[None, :]
    tl.store(out_ptr + rows[:, None] * F + cols[None, :], (gelu_tanh(gate) * up).to(tl.bfloat16),
             mask=rows[:, None] < M)


@triton.jit
def _qkv_product(a_ptr, w_ptr, bias_ptr, squares_ptr, counters_ptr, cos_ptr, sin_ptr, q_ptr, keys_ptr, values_ptr, M,
                 eps, K: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr,
                 TILES_BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    half: tl.constexpr = D // 2
    per_head: tl.constexpr = half // BN
    head = tl.program_id(0) // per_head
    i = (tl.program_id(0) % per_head) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    cols = head * D + i
    inside = rows[:, None] < M
    first_bias, second_bias = tl.load(bias_ptr + cols), tl.load(bias_ptr + cols + half)
    behind, position = tl.load(counters_ptr), tl.load(counters_ptr + 1)
    rotated = inside & (head <= HEADS)  # values are not
    angle = (position + rows)[:, None] * half + i[None, :]
    cos, sin = tl.load(cos_ptr + angle, mask=rotated, other=1.0), tl.load(sin_ptr + angle, mask=rotated, other=0.0)
    factor = inverse_rms(squares_ptr, rows, M, K, TILES, TILES_BLOCK, eps)[:, None]
    first, second = two_products(a_ptr, w_ptr, rows, cols, cols + half, M, K, BM, BN, BK)
    first = first * factor + first_bias[None, :]
    second = second * factor + second_bias[None, :]
    first, second = first * cos - second * sin, second * cos + first * sin
    at = q_ptr + (rows * HEADS + head)[:, None] * D + i[None, :]
    if head >= HEADS:
        slot = (behind + rows)[:, None] * D + i[None, :]  # behind the prefix's rows
        if head == HEADS:
            at = keys_ptr + slot
        else:
            at = values_ptr + slot
    tl.store(at, first.to(tl.bfloat16), mask=inside)
    tl.store(at + half, second.to(tl.bfloat16), mask=inside)


def row_block(rows: int) -> int:
    return min(64, max(16, triton.next_power_of_2(rows)))


def glu_product(x: Tensor, weight: Tensor, bias: Tensor, squares: Tensor, out: Tensor, tiles: Tiles) -> None:
    """out [M, F] = gelu(gate) * up of x [M, K] (already scaled), weight [2F, K]; bias [2F] of this step."""
    rows, width = x.shape
    features = out.shape[1]
    bm, bn, bk = min(tiles.rows, row_block(rows)), tile(features, tiles.columns), tile(width, tiles.inner)
    _glu_product[(features // bn, triton.cdiv(rows, bm))](
        x, weight, bias, squares, out, rows, RMS_EPS, width, features, squares.shape[0],
        triton.next_power_of_2(squares.shape[0]), bm, bn, bk, num_warps=tiles.warps, num_stages=tiles.stages)


def qkv_product(x: Tensor, weight: Tensor, bias: Tensor, squares: Tensor, counters: Tensor, cos: Tensor, sin: Tensor,
                q: Tensor, keys: Tensor, values: Tensor, tiles: Tiles) -> None:
    """q [M, heads * D] and the suffix's rows of keys and values [*, D], rotated; bias of this step."""
    rows, width = x.shape
    dim = keys.shape[-1]
    bm, bn, bk = min(tiles.rows, row_block(rows)), tile(dim // 2, tiles.columns), tile(width, tiles.inner)
    _qkv_product[(weight.shape[0] // (2 * bn), triton.cdiv(rows, bm))](
        x, weight, bias, squares, counters, cos, sin, q, keys, values, rows, RMS_EPS, width,
        q.shape[1] // dim, dim, squares.shape[0], triton.next_power_of_2(squares.shape[0]), bm, bn, bk,
        num_warps=tiles.warps, num_stages=tiles.stages)
