"""Attention of the action tokens: few queries, one key and value head, the prefix's keys and their own behind them.

The queries of all heads are one matrix [H * heads, D]. attend: a program takes 64 of its rows and a part of the keys
(split keys), and leaves the part's result with its maximum and sum. join: the parts added in order, so the result is
the same from run to run. Keys are counted on the device: one captured graph serves every prefix length.
Floor: latency, 1 MB of keys and values from L2. Checked against model/gemma.py in float32, with masked keys in the
middle.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.backends.cuda.tuning import Tiles

# at most SPLITS parts (shapes.py); shared memory as in prefix_attention.py
CANDIDATES = [Tiles(64, 64, split=16, warps=4, stages=2), Tiles(64, 64, split=8, warps=4, stages=2),
              Tiles(64, 32, split=16, warps=4, stages=2), Tiles(64, 32, split=8, warps=4, stages=2),
              Tiles(32, 64, split=8, warps=4, stages=2), Tiles(32, 32, split=16, warps=4, stages=2)]
JOIN_ROWS = 2


@triton.jit
def _attend(q_ptr, keys_ptr, values_ptr, valid_ptr, counters_ptr, parts_ptr, stats_ptr, queries,
            horizon, scale, D: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    block, part = tl.program_id(0), tl.program_id(1)
    m, d = block * BM + tl.arange(0, BM), tl.arange(0, D)
    inside = m < queries
    count = tl.load(counters_ptr) + horizon
    share = tl.cdiv(tl.cdiv(count, SPLIT), BN) * BN
    end = tl.minimum((part + 1) * share, count)
    q = tl.load(q_ptr + m[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    most = tl.full((BM,), -1.0e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for start in range(part * share, end, BN):
        n = start + tl.arange(0, BN)
        seen = tl.load(valid_ptr + n, mask=n < end, other=0) != 0
        k = tl.load(keys_ptr + n[:, None] * D + d[None, :], mask=(n < end)[:, None], other=0.0)
        v = tl.load(values_ptr + n[:, None] * D + d[None, :], mask=(n < end)[:, None], other=0.0)
        logits = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * scale, -1.0e30)
        now = tl.maximum(most, tl.max(logits, 1))
        p = tl.where(seen[None, :], tl.exp2(logits - now[:, None]), 0.0)
        rescale = tl.exp2(most - now)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        most = now
    acc = acc / tl.maximum(total, 1.0e-30)[:, None]
    tl.store(parts_ptr + (part * queries + m)[:, None] * D + d[None, :], acc.to(tl.bfloat16), mask=inside[:, None])
    tl.store(stats_ptr + part * 2 * queries + m, most, mask=inside)
    tl.store(stats_ptr + (part * 2 + 1) * queries + m, total, mask=inside)


@triton.jit
def _join(parts_ptr, stats_ptr, out_ptr, queries, D: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr):
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    inside = m < queries
    s = tl.arange(0, SPLIT)
    stats = stats_ptr + s[:, None] * 2 * queries + m[None, :]
    most = tl.load(stats, mask=inside[None, :], other=-1.0e30)
    total = tl.load(stats + queries, mask=inside[None, :], other=0.0)
    most = tl.max(most, 0)
    acc = tl.zeros((BM, D), tl.float32)
    whole = tl.sum(total * tl.exp2(tl.load(stats, mask=inside[None, :], other=-1.0e30) - most[None, :]), 0)
    for part in tl.static_range(SPLIT):
        here = stats_ptr + part * 2 * queries + m
        weight = tl.exp2(tl.load(here, mask=inside, other=-1.0e30) - most) * tl.load(here + queries, mask=inside,
                                                                                     other=0.0)
        acc += weight[:, None] * tl.load(parts_ptr + (part * queries + m)[:, None] * D + d[None, :],
                                         mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(out_ptr + m[:, None] * D + d[None, :], (acc / tl.maximum(whole, 1.0e-30)[:, None]).to(tl.bfloat16),
             mask=inside[:, None])


def suffix_attention(q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, counters: Tensor, parts: Tensor,
                     stats: Tensor, out: Tensor, tiles: Tiles) -> None:
    """q [H, heads * D], keys and values [*, D], valid [*]; parts and stats hold the parts; out as q."""
    horizon, dim = q.shape[0], keys.shape[-1]
    queries = q.numel() // dim
    scale = dim**-0.5 * 1.4426950408889634  # exp2 instead of exp
    _attend[(triton.cdiv(queries, tiles.rows), tiles.split)](
        q, keys, values, valid, counters, parts, stats, queries, horizon, scale, dim, tiles.split, tiles.rows,
        tiles.columns, num_warps=tiles.warps, num_stages=tiles.stages)
    _join[(triton.cdiv(queries, JOIN_ROWS),)](parts, stats, out, queries, dim, tiles.split, JOIN_ROWS, num_warps=4)
