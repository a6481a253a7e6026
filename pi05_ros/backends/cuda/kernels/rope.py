"""Prefix q, k, v after their merged product: normed where they are not, k rotated into the cache, v copied into it, q
rotated if wanted.

Where the product read rows of x as they are, each row of q, k, v takes its 1 / rms(x) here: rms norm is a factor a row.
Half-split rotation, pair i with i + head_dim / 2, in float32 with float32 tables. One program a row.
Floor: bytes, 5 MB at 968 rows where q stays (1.2 us). Checked against model/positions.py `rotate`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.backends.cuda.kernels.norm import row_inverse_rms
from pi05_ros.model.gemma import RMS_EPS


@triton.jit
def _rope(x_ptr, qkv_ptr, positions_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, inverse_ptr, eps, FIRST: tl.constexpr,
          ROTATED: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
          WIDTH_BLOCK: tl.constexpr):
    """Heads 0..ROTATED-1 are queries, then one key, then one value; HEADS is all of them, FIRST the first to do.
    WIDTH of x; 0: no x, and the factor is 1."""
    row = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = D // 2
    i = tl.arange(0, BLOCK)
    inside = i < half
    angle = tl.load(positions_ptr + row) * half + i
    cos, sin = tl.load(cos_ptr + angle, mask=inside, other=0.0), tl.load(sin_ptr + angle, mask=inside, other=0.0)
    factor = row_inverse_rms(x_ptr + row * WIDTH, eps, WIDTH, WIDTH_BLOCK) if WIDTH > 0 else 1.0
    tl.store(inverse_ptr + row, factor)
    for head in tl.static_range(FIRST, HEADS):
        at = qkv_ptr + (row * HEADS + head) * D + i
        first = factor * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = factor * tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
        if head <= ROTATED:
            first, second = first * cos - second * sin, second * cos + first * sin
        if head == ROTATED:
            at = keys_ptr + row * D + i
        elif head > ROTATED:
            at = values_ptr + row * D + i
        tl.store(at, first.to(tl.bfloat16), mask=inside)
        tl.store(at + half, second.to(tl.bfloat16), mask=inside)


def rope_into_cache(x: Tensor | None, qkv: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, keys: Tensor,
                    values: Tensor, inverse: Tensor, queries: bool) -> None:
    """x [rows, W]; qkv [rows, (Q + 2) * D] of x, Q may be 0; keys, values [>= rows, D]; inverse float32 [>= rows]
    becomes 1 / rms(x); `queries`: norm and rotate q too. x None: qkv is of normed rows, and inverse becomes 1."""
    rows, width, dim = qkv.shape[0], 0 if x is None else x.shape[1], keys.shape[-1]
    heads = qkv.shape[1] // dim
    _rope[(rows,)](qkv if x is None else x, qkv, positions, cos, sin, keys, values, inverse, RMS_EPS,
                   0 if queries else heads - 2, heads - 2, heads, dim, triton.next_power_of_2(dim // 2), width,
                   triton.next_power_of_2(max(width, 1)), num_warps=4)
