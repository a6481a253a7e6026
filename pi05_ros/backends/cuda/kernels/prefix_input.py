"""The prefix's way in: where each row comes from, then the rows themselves.

plan: one program; a row is an image token (source >= 0), a prompt token (-1 - id), or padding of the bucket. Also the
mask of valid rows, and positions, which masked rows do not advance. fill: the rows, prompt tokens times sqrt(W).
Floor: latency, then 8 MB (2 us). Checked against model/positions.py and the eager embedding.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PADDING = -(2**31)


@triton.jit(do_not_specialize=["image_rows", "text_rows", "rows"])  # no prompt compiles a kernel of its own
def _plan(image_mask_ptr, token_mask_ptr, tokens_ptr, source_ptr, valid_ptr, positions_ptr, image_rows, text_rows, rows,
          PATCHES: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    image = row < image_rows
    text = (row >= image_rows) & (row < image_rows + text_rows)
    seen = tl.load(image_mask_ptr + row // PATCHES, mask=image, other=0).to(tl.int32)
    seen += tl.load(token_mask_ptr + row - image_rows, mask=text, other=0).to(tl.int32)
    token = tl.load(tokens_ptr + row - image_rows, mask=text, other=0).to(tl.int32)
    source = tl.where(image, row, tl.where(text, -1 - token, PADDING))
    inside = row < rows
    tl.store(source_ptr + row, source, mask=inside)
    tl.store(valid_ptr + row, seen.to(tl.uint8), mask=inside)
    tl.store(positions_ptr + row, tl.maximum(tl.cumsum(seen, 0) - 1, 0), mask=inside)


@triton.jit
def _fill(source_ptr, image_ptr, embedding_ptr, x_ptr, scale, WIDTH: tl.constexpr, PADDING: tl.constexpr,
          BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    source = tl.load(source_ptr + row).to(tl.int64)
    image = source >= 0
    text = (source < 0) & (source > PADDING)
    x = tl.load(image_ptr + tl.maximum(source, 0) * WIDTH + cols, mask=(cols < WIDTH) & image, other=0.0).to(tl.float32)
    token = tl.where(text, -1 - source, 0)
    x += scale * tl.load(embedding_ptr + token * WIDTH + cols, mask=(cols < WIDTH) & text, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * WIDTH + cols, x.to(x_ptr.dtype.element_ty), mask=cols < WIDTH)


def plan(image_mask: Tensor, token_mask: Tensor, tokens: Tensor, patches: int, source: Tensor, valid: Tensor,
         positions: Tensor) -> None:
    """image_mask [N], token_mask and tokens [L] to source [rows], valid and positions [>= rows]."""
    rows = source.shape[0]
    _plan[(1,)](image_mask, token_mask, tokens, source, valid, positions, image_mask.shape[0] * patches,
                tokens.shape[0], rows, patches, PADDING, triton.next_power_of_2(len(positions)), num_warps=4)


def fill(source: Tensor, image_tokens: Tensor, embedding: Tensor, x: Tensor) -> None:
    """x [rows, W] from its sources."""
    rows, width = x.shape
    _fill[(rows,)](source, image_tokens, embedding, x, width**0.5, width, PADDING, triton.next_power_of_2(width),
                   num_warps=4)
