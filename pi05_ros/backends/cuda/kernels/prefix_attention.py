"""Prefix attention with norm and RoPE of what it reads: every valid row sees every valid row.

All query heads share one key and value head, so the queries of all heads are one matrix [rows * heads, D] against keys
and values [rows, D]: online softmax over blocks of keys, logits and sums in float32. On Hopper
csrc/prefix_attention.cu, which norms and rotates itself; elsewhere `rope_into_cache` and the Triton kernel here. Floor
at 968 rows: 7.7 GFLOP a layer, 10 us. Checked against torch's scaled_dot_product_attention in float32, masked rows too.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.backends.cuda.cpp import Kernel, Program
from pi05_ros.backends.cuda.kernels.rope import rope_into_cache
from pi05_ros.backends.cuda.tma import TensorMap
from pi05_ros.backends.cuda.tuning import Gpu, SharedBytes, Tiles

MOST_ROWS = 1024  # of the Hopper kernel: a block's share of the mask is in shared memory
BLOCK = 128  # keys a turn of the Hopper kernel
# Its queries, ring, mask, statistics, norms, barriers
SHARED_BYTES = 2 * 2**15 + 5 * 2**15 + 2 * 512 + 16 + 2 * 512 + 512 + 5 * 16 + 48
CANDIDATES = [Tiles(64, 64, warps=4, stages=3), Tiles(128, 64, warps=8, stages=2), Tiles(64, 64, warps=4, stages=2),
              Tiles(64, 64, warps=8, stages=2), Tiles(64, 32, warps=4, stages=2), Tiles(32, 32, warps=4, stages=2)]


def shared_bytes(dim: int) -> SharedBytes:
    """Queries, the pipeline's keys and values, and the probabilities where they do not stay in registers."""

    def bound(t: Tiles, gpu: Gpu) -> int:
        probabilities = 0 if gpu.asynchronous else t.rows * t.columns
        return 2 * (dim * (t.rows + 2 * gpu.buffers(t.stages) * t.columns) + probabilities) + 1024

    return bound


@triton.jit
def _attention(qkv_ptr, keys_ptr, values_ptr, valid_ptr, out_ptr, rows, scale, HEADS: tl.constexpr,
               ROW_STRIDE: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    row, head = m // HEADS, m % HEADS
    inside = row < rows
    q = tl.load(qkv_ptr + row[:, None] * ROW_STRIDE + head[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    most = tl.full((BM,), -1.0e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for start in range(0, rows, BN):
        n = start + tl.arange(0, BN)
        known = n < rows
        seen = tl.load(valid_ptr + n, mask=known, other=0) != 0
        k = tl.load(keys_ptr + n[:, None] * D + d[None, :], mask=known[:, None], other=0.0)
        logits = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * scale, -1.0e30)
        now = tl.maximum(most, tl.max(logits, 1))
        p = tl.where(seen[None, :], tl.exp2(logits - now[:, None]), 0.0)
        rescale = tl.exp2(most - now)
        total = total * rescale + tl.sum(p, 1)
        v = tl.load(values_ptr + n[:, None] * D + d[None, :], mask=known[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        most = now
    acc = acc / tl.maximum(total, 1.0e-30)[:, None]
    tl.store(out_ptr + m[:, None] * D + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside[:, None])


def fits_hopper(rows: int, dim: int, device: torch.device) -> bool:
    shapes = dim == 256 and 64 < rows <= MOST_ROWS
    return shapes and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _kernel(heads: int, width: int, device: torch.device) -> Kernel:
    defines = {"HEADS": heads, "QKV": (heads + 2) * 256, "WIDTH": width, "SHARED_BYTES": SHARED_BYTES}
    return Program("prefix_attention", defines, device).kernel("prefix_attention", SHARED_BYTES)


def prefix_attention(x: Tensor | None, qkv: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, keys: Tensor,
                     values: Tensor, inverse: Tensor, counters: Tensor, valid: Tensor, out: Tensor, heads: int,
                     tiles: Tiles, portable: bool = False) -> None:
    """x [rows, W] and its qkv [rows, (heads + 2) * D] before norm and RoPE (x None: of normed rows); inverse [>= rows]
    becomes 1 / rms(x), or 1; counters int32 [3]: zeros, and left so; keys, values [>= rows, D] take this layer's;
    valid [rows]; out [rows, heads * D]. `tiles`: of the portable kernel; `portable`: that one, even on Hopper."""
    rows, dim = qkv.shape[0], keys.shape[-1]
    scale = dim**-0.5 * 1.4426950408889634  # exp2 instead of exp
    if portable or not fits_hopper(rows, dim, qkv.device):
        rope_into_cache(x, qkv, positions, cos, sin, keys, values, inverse, queries=True)
        _attention[(triton.cdiv(rows * heads, tiles.rows),)](
            qkv, keys, values, valid, out, rows, scale, heads, qkv.shape[1], dim, tiles.rows, tiles.columns,
            num_warps=tiles.warps, num_stages=tiles.stages)
        return
    boxes = ((keys[:rows], BLOCK), (values[:rows], BLOCK // 2), (out.view(-1, dim), 64))
    maps = tuple(TensorMap(tensor, (high, 64)) for tensor, high in boxes)
    kernel = _kernel(heads, 8 if x is None else x.shape[1], qkv.device)
    kernel.launch((2 * triton.cdiv(rows * heads, 128),), 384,
                  (*maps, x, qkv, positions, cos, sin, keys, values, inverse, counters, valid, rows, scale), cluster=2,
                  dependent=True)
