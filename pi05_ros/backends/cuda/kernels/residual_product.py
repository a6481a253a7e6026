"""The expert's two narrow products, into the residual: x += gate * (a W^T), for the attention's output and the MLP's.

Few columns, so several programs share a tile of the output, each a part of K (split-K). Each writes its sums; the last
to arrive adds all of them in order, which keeps the result the same from run to run, and does the epilogue: the gated
residual in float32, (1 + scale) x for the next product, and the tile's sums of squares for the next norm.
Floor: the weights, 4.2 MB (1.0 us) and 8.4 MB (2.0 us). Checked against model/gemma.py in float32.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.backends.cuda.kernels.pair_product import row_block
from pi05_ros.backends.cuda.shapes import SPLIT_K, TILE, tile
from pi05_ros.backends.cuda.tuning import Gpu, Tiles

# all of TILE columns, which the sums of squares are laid out by, and at most SPLIT_K programs a tile
CANDIDATES = [Tiles(64, TILE, 128, split=4, warps=4, stages=4), Tiles(64, TILE, 128, split=8, warps=4, stages=3),
              Tiles(64, TILE, 64, split=4, warps=4, stages=4), Tiles(64, TILE, 128, split=2, warps=4, stages=4),
              Tiles(64, TILE, 128, split=4, warps=4, stages=3), Tiles(32, TILE, 128, split=4, warps=4, stages=4),
              Tiles(32, TILE, 128, split=2, warps=4, stages=3)]


def shared_bytes(t: Tiles, gpu: Gpu) -> int:
    """A pipeline of the input's tile and the weight's."""
    return 2 * gpu.buffers(t.stages) * t.inner * (t.rows + t.columns) + 1024


@triton.jit
def leave_residual(x, x_ptr, scaled_ptr, squares_ptr, scale_ptr, rows, cols, tile_index, M, N: tl.constexpr):
    """Store x, (1 + scale) x and the sums of squares of this tile."""
    at, inside = rows[:, None] * N + cols[None, :], rows[:, None] < M
    tl.store(x_ptr + at, x, mask=inside)
    tl.store(scaled_ptr + at, (x * tl.load(scale_ptr + cols)[None, :]).to(tl.bfloat16), mask=inside)
    tl.store(squares_ptr + tile_index * M + rows, tl.sum(x * x, 1), mask=rows < M)


@triton.jit
def _residual_product(a_ptr, w_ptr, gate_ptr, scale_ptr, x_ptr, scaled_ptr, squares_ptr, sums_ptr, arrivals_ptr,
                      M, K: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    column, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols, rows, k = column * BN + tl.arange(0, BN), row * BM + tl.arange(0, BM), tl.arange(0, BK)
    share: tl.constexpr = K // SPLIT
    gate = tl.load(gate_ptr + cols)
    x = tl.load(x_ptr + rows[:, None] * N + cols[None, :], mask=rows[:, None] < M, other=0.0)
    a = a_ptr + rows[:, None] * K + part * share + k[None, :]
    w = w_ptr + cols[None, :] * K + part * share + k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, share, BK):
        acc = tl.dot(tl.load(a + start, mask=rows[:, None] < M, other=0.0), tl.load(w + start), acc)
    last = True
    if SPLIT > 1:
        padded = tl.num_programs(2) * BM
        here = sums_ptr + rows[:, None] * N + cols[None, :]
        tl.store(here + part * padded * N, acc)
        tl.debug_barrier()  # every thread's sums are written before the arrival is
        group = row * tl.num_programs(0) + column
        last = tl.atomic_add(arrivals_ptr + group, 1, sem="acq_rel") == SPLIT - 1
        if last:
            acc = tl.zeros((BM, BN), tl.float32)
            for other in range(SPLIT):
                acc += tl.load(here + other * padded * N, cache_modifier=".cg")
            tl.store(arrivals_ptr + group, 0)
    if last:
        leave_residual(x + gate[None, :] * acc, x_ptr, scaled_ptr, squares_ptr, scale_ptr, rows, cols, column,
                       M, N)


def residual_product(a: Tensor, weight: Tensor, gate: Tensor, next_scale: Tensor, x: Tensor, scaled: Tensor,
                     squares: Tensor, sums: Tensor, arrivals: Tensor, tiles: Tiles) -> None:
    """x [M, N] += gate * (a [M, K] weight^T); gate, next_scale [N] of this step."""
    rows, inner = a.shape
    width = x.shape[1]
    bm, bn, bk = min(tiles.rows, row_block(rows)), tile(width, TILE), tile(inner, tiles.inner)
    split = math.gcd(min(tiles.split, SPLIT_K), inner // bk)  # parts of whole blocks
    _residual_product[(width // bn, split, triton.cdiv(rows, bm))](
        a, weight, gate, next_scale, x, scaled, squares, sums, arrivals, rows, inner, width, split, bm, bn, bk,
        num_warps=tiles.warps, num_stages=tiles.stages)
