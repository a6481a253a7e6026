"""Prefix q, k, v after their merged product: k rotated into the cache, v copied into it, q rotated in place if wanted.

Half-split rotation, pair i with i + head_dim / 2, in float32 with float32 tables. One program a row and head.
Floor: bytes, 10 MB at 968 rows (2.3 us). Checked against model/positions.py `rotate`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rope(qkv_ptr, positions_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, FIRST: tl.constexpr, ROTATED: tl.constexpr,
          HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Heads 0..ROTATED-1 are queries, then one key, then one value; HEADS is all of them, FIRST the first to do."""
    row, head = tl.program_id(0).to(tl.int64), FIRST + tl.program_id(1)
    half: tl.constexpr = D // 2
    i = tl.arange(0, BLOCK)
    inside = i < half
    at = qkv_ptr + (row * HEADS + head) * D + i
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    if head <= ROTATED:
        position = tl.load(positions_ptr + row)
        cos = tl.load(cos_ptr + position * half + i, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + position * half + i, mask=inside, other=0.0)
        first, second = first * cos - second * sin, second * cos + first * sin
    if head == ROTATED:
        at = keys_ptr + row * D + i
    elif head > ROTATED:
        at = values_ptr + row * D + i
    tl.store(at, first.to(tl.bfloat16), mask=inside)
    tl.store(at + half, second.to(tl.bfloat16), mask=inside)


def rope_into_cache(qkv: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
                    queries: bool) -> None:
    """qkv [rows, (Q + 2) * D], Q may be 0; keys, values [>= rows, D]; `queries`: rotate q too."""
    rows, dim = qkv.shape[0], keys.shape[-1]
    heads = qkv.shape[1] // dim
    first = 0 if queries else heads - 2
    _rope[(rows, heads - first)](qkv, positions, cos, sin, keys, values, first, heads - 2, heads, dim,
                                 triton.next_power_of_2(dim // 2), num_warps=1)
