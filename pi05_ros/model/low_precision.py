"""The number formats below 16 bits: FP8 (E4M3) with a scale, and NVFP4 (E2M1 in blocks of 16, two levels of scales).

A scale is what a stored number is multiplied with to get the value back; all of them are float32 but NVFP4's block
scales, which are E4M3. Amax is the largest absolute value that must fit.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Precision = Literal["fp8", "fp8_token", "nvfp4"]
# fp8: one scale a weight and one, from calibration, for its input. fp8_token: one an output channel, and one a token,
# found while it runs. nvfp4: blocks of 16; the scale above the blocks of the input is from calibration.
PRECISIONS: tuple[Precision, ...] = ("fp8", "fp8_token", "nvfp4")
BITS = {"fp8": 8.0, "fp8_token": 8.0, "nvfp4": 4.5}  # a weight, with its block's scale
FP8 = torch.float8_e4m3fn
FP8_MAX, FP4_MAX = 448.0, 6.0
BLOCK = 16
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Between two neighbours; where a tie must go up to the even code, the bound is one float lower.
_BOUNDS = tuple((a + b) / 2 * (1 - 2**-24 * (code % 2)) for code, (a, b) in
                enumerate(zip(FP4_VALUES, FP4_VALUES[1:], strict=False)))


def fp8_scale(amax: Tensor) -> Tensor:
    """float32; 1 where nothing but zeros was seen; NaN stays NaN."""
    return torch.where(amax == 0, 1.0, amax.float() / FP8_MAX)


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Rounded to nearest, saturated."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def nvfp4_scale(amax: Tensor) -> Tensor:
    """The scale above the blocks: a block that holds amax gets the largest block scale."""
    return torch.where(amax == 0, 1.0, amax.float() / (FP4_MAX * FP8_MAX))


def to_nvfp4(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """[..., n] to codes 0..15 (sign in bit 3), uint8 [..., n rounded up to blocks], and block scales E4M3."""
    blocks = F.pad(x.float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    block_scale = (blocks.abs().amax(-1) / (FP4_MAX * scale)).clamp(max=FP8_MAX).to(FP8)
    step = (block_scale.float() * scale)[..., None]
    scaled = torch.where(step > 0, blocks / step, 0.0)
    codes = torch.bucketize(scaled.abs(), torch.tensor(_BOUNDS, device=x.device))
    return (codes + 8 * (scaled < 0)).to(torch.uint8).flatten(-2), block_scale


def from_nvfp4(codes: Tensor, block_scale: Tensor, scale: Tensor) -> Tensor:
    """float32, as many numbers as codes."""
    values = torch.tensor((*FP4_VALUES, *(-value for value in FP4_VALUES)), device=codes.device)
    blocks = values[codes.long()].unflatten(-1, (-1, BLOCK))
    return (blocks * (block_scale.float() * scale)[..., None]).flatten(-2)


def pack_codes(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the low half: uint8 [..., n / 2]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
