"""Attention of the action tokens: few queries, one key and value head, the prefix's keys and their own behind them.

The queries of all heads are one matrix [H * heads, D]. A program takes 16 of its rows and a part of the keys; the last
to arrive joins the parts in order, so the result is the same from run to run. Keys are counted on the device: one
captured graph serves every prefix length. Floor: latency, 1 MB of keys and values from L2. Checked against
model/gemma.py in float32, with masked keys in the middle.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.backends.cuda.kernels.launch import options, wait_for_inputs
from pi05_ros.backends.cuda.shapes import SPLITS


@triton.jit
def _suffix_attention(q_ptr, keys_ptr, values_ptr, valid_ptr, counters_ptr, attended_ptr, stats_ptr, arrivals_ptr,
                      out_ptr, queries, horizon, scale, D: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr,
                      BN: tl.constexpr, PDL: tl.constexpr):
    block, part = tl.program_id(0), tl.program_id(1)
    m, d = block * BM + tl.arange(0, BM), tl.arange(0, D)
    inside = m < queries
    wait_for_inputs(PDL)
    count = tl.load(counters_ptr + 1) + horizon
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
    here = attended_ptr + m[:, None] * D + d[None, :]
    stats = stats_ptr + m
    tl.store(here + part * queries * D, acc, mask=inside[:, None])
    tl.store(stats + part * 2 * queries, most, mask=inside)
    tl.store(stats + part * 2 * queries + queries, total, mask=inside)
    tl.debug_barrier()  # every thread's part is written before the arrival is
    if tl.atomic_add(arrivals_ptr + block, 1, sem="acq_rel") == SPLIT - 1:
        most = tl.full((BM,), -1.0e30, tl.float32)
        for other in range(SPLIT):
            most = tl.maximum(most, tl.load(stats + other * 2 * queries, mask=inside, other=-1.0e30,
                                            cache_modifier=".cg"))
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, D), tl.float32)
        for other in range(SPLIT):
            weight = tl.exp2(tl.load(stats + other * 2 * queries, mask=inside, other=-1.0e30, cache_modifier=".cg")
                             - most)
            total += weight * tl.load(stats + other * 2 * queries + queries, mask=inside, other=0.0,
                                      cache_modifier=".cg")
            acc += weight[:, None] * tl.load(here + other * queries * D, mask=inside[:, None], other=0.0,
                                             cache_modifier=".cg")
        tl.store(out_ptr + m[:, None] * D + d[None, :], (acc / tl.maximum(total, 1.0e-30)[:, None]).to(tl.bfloat16),
                 mask=inside[:, None])
        tl.store(arrivals_ptr + block, 0)


def suffix_attention(q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, counters: Tensor, attended: Tensor,
                     stats: Tensor, arrivals: Tensor, out: Tensor, split: int = 5) -> None:
    """q [H, heads * D], keys and values [*, D], valid [*]; attended and stats hold the parts; out as q."""
    horizon, dim = q.shape[0], keys.shape[-1]
    queries = q.numel() // dim
    scale = dim**-0.5 * 1.4426950408889634  # exp2 instead of exp
    split = min(split, SPLITS)
    _suffix_attention[(triton.cdiv(queries, 16), split)](q, keys, values, valid, counters, attended, stats, arrivals,
                                                         out, queries, horizon, scale, dim, split, 16, 32, **options(),
                                                         num_warps=4, num_stages=3)
