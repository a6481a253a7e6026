"""Masks, position ids and RoPE tables (PI05_SPEC section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

MASKED = -2.3819763e38  # added once to a logit: in bfloat16 twice overflows (PI05_SPEC trap T2)
ROPE_THETA = 10000.0


def prefix_pad_mask(image_mask: Tensor, token_mask: Tensor, patches: int) -> Tensor:
    """[B, N] and [B, L] to [B, N*patches + L]: True where a prefix position is real."""
    return torch.cat([image_mask.repeat_interleave(patches, dim=1), token_mask], dim=1)


def prefix_positions(pad_mask: Tensor) -> Tensor:
    """[B, P] int64: a masked slot does not advance the count, so it repeats its predecessor (-1 if leading)."""
    return pad_mask.to(torch.int64).cumsum(dim=1) - 1


def suffix_positions(pad_mask: Tensor, length: int) -> Tensor:
    """[B, length] int64: the suffix goes on after the last valid prefix position."""
    return pad_mask.sum(dim=1, keepdim=True) + torch.arange(length, device=pad_mask.device)


def prefix_attention_mask(pad_mask: Tensor) -> Tensor:
    """[B, P] to additive float32 [B, 1, P, P]: valid tokens see all valid tokens."""
    return additive(pad_mask[:, None, :, None] & pad_mask[:, None, None, :])


def suffix_attention_mask(pad_mask: Tensor, block_starts: Tensor) -> Tensor:
    """[B, P] and the suffix's block flags [S] to additive float32 [B, 1, S, P + S].

    Every suffix token sees every valid prefix token; among themselves token i sees j where block(j) <= block(i).
    """
    block = block_starts.to(torch.int64).cumsum(dim=0)
    among = block[None, :] <= block[:, None]
    batch, length = pad_mask.shape[0], block.shape[0]
    to_prefix = pad_mask[:, None, None, :].expand(batch, 1, length, -1)
    return additive(torch.cat([to_prefix, among.expand(batch, 1, length, length)], dim=-1))


def additive(visible: Tensor) -> Tensor:
    """bool to float32: 0 where visible, `MASKED` elsewhere."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, MASKED)


def rope_tables(positions: Tensor, head_dim: int, inv_freq_dtype: torch.dtype,
                dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions [B, T] to cos and sin [B, 1, T, head_dim], angles in float32, cast to `dtype` at the end.

    `inv_freq_dtype` bfloat16 rounds the frequencies as openpi and lerobot do in their bf16 mode (trap T1).
    Angles are elementwise products, never a matrix product that TF32 could round (trap T7).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    inv_freq = (1.0 / ROPE_THETA**exponent).to(inv_freq_dtype).float()
    angle = positions[:, None, :, None].float() * inv_freq
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Half-split rotation of [B, heads, T, head_dim]: pair i turns with pair i + head_dim / 2."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
