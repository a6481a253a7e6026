"""What the expert's kernels share: programmatic dependent launch, and weights fetched into L2 ahead of their use.

A step is a chain of short kernels, each a few microseconds, that read 35 MB of weights a layer. With dependent launch
(Hopper and later) a kernel starts while the one before it ends, asks for its weights, and only then waits for its
inputs: memory stays busy through the hand-over. Elsewhere both are left out, and the results are the same.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def options() -> dict[str, bool]:
    """Launch options of an expert kernel on the current device; `PDL` is its compile-time switch."""
    hopper = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"PDL": hopper, "launch_pdl": hopper} if hopper else {"PDL": False}


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """From here on everything that earlier kernels wrote is there; the next kernel may start."""
    if PDL:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()


@triton.jit
def prefetch_rows(w_ptr, rows, start, K: tl.constexpr, LENGTH: tl.constexpr, PDL: tl.constexpr):
    """Ask L2 for columns start .. start + LENGTH of these rows of a bfloat16 matrix [*, K]: 64 to a line."""
    if PDL:
        lines: tl.constexpr = (LENGTH + 63) // 64
        at = w_ptr + rows.to(tl.int64)[:, None] * K + start + tl.arange(0, lines)[None, :] * 64
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)],
                                  dtype=tl.int32, is_pure=False, pack=1)
