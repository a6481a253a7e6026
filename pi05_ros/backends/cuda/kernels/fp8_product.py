"""FP8 products by PyTorch's library call (cuBLASLt; CUTLASS where merged layers have scales of their own).

x e4m3 [rows, K] by weight e4m3 [F, K], both with their scales, to bfloat16. `FAST_ACCUMULATION`: the tensor cores' own
sum, of about 14 bits, over all of K; else it is added to float32 sums every few steps, which costs time. Floor at 968
rows: gate|up 130 GFLOP (89 us at the ceiling measured in FP8), down 65 (44 us). Checked against QuantisedLinear's
simulation.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pi05_ros.backends.cuda.packing_fp8 import Fp8Linear

FAST_ACCUMULATION = False


def fp8_product(x: Tensor, layer: Fp8Linear, fast: bool = FAST_ACCUMULATION) -> Tensor:
    """bfloat16 [rows, F], the bias added."""
    by_column = layer.scale.numel() > 1
    one = _ones(len(x) if by_column else 1, x.device)
    return torch._scaled_mm(x, layer.weight.t(), scale_a=one, scale_b=layer.scale, bias=layer.bias,
                            out_dtype=torch.bfloat16, use_fast_accum=fast)


def raw_product(x: Tensor, weight: Tensor, out: Tensor, fast: bool = FAST_ACCUMULATION) -> Tensor:
    """out bfloat16 [rows, F], contiguous: the product of the stored numbers; who reads it knows the scales."""
    one = _ones(1, x.device)
    return torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast,
                            out=out)


@functools.cache
def _ones(rows: int, device: torch.device) -> Tensor:
    """float32 [rows, 1]; kept, as graphs hold its address."""
    return torch.ones(rows, 1, device=device)
