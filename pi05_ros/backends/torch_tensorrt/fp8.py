"""Layers of a checkpoint in FP8 as torch_tensorrt wants them: ModelOpt's operator around the operands of a product.

`tensorrt::quantize_op` rounds to FP8 and back, in the type of its input; torch_tensorrt makes QuantizeLinear and
DequantizeLinear of it, with one scale a tensor, and TensorRT one FP8 product. A weight that was FP8 stays what it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi05_ros.errors import BackendError
from pi05_ros.model.low_precision import FP8_MAX
from pi05_ros.model.quantised_linear import QuantisedLinear, quantised_linears


class RoundedLinear(nn.Module):
    """y = x W^T + b with x [..., in] and W [out, in] rounded to FP8; amax: the largest magnitude that fits, [1]."""

    input_amax: Tensor
    weight_amax: Tensor

    def __init__(self, of: QuantisedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        assert of.input_scale is not None
        self.weight = nn.Parameter(of.dequantised().to(dtype), requires_grad=False)
        self.bias = of.bias
        self.register_buffer("input_amax", of.input_scale.detach() * FP8_MAX)
        self.register_buffer("weight_amax", of.weight_scale.detach() * FP8_MAX)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(rounded(x, self.input_amax), rounded(self.weight, self.weight_amax), bias)


def rounded(x: Tensor, amax: Tensor) -> Tensor:
    """x as FP8 holds it, in its own dtype."""
    return quantize_op()(x, amax, 8, 4, False, False)  # bits, those of the exponent; neither unsigned nor narrow


def round_linears(module: nn.Module, dtype: torch.dtype) -> int:
    """Put `RoundedLinear`s in the place of the quantised layers that have been calibrated; how many.

    Raises:
        BackendError: a format that torch_tensorrt does not take from 16-bit programs; ModelOpt is not installed.
    """
    found = {name: linear for name, linear in quantised_linears(module).items() if not linear.weight.is_meta}
    for name, linear in found.items():
        if linear.precision != "fp8":
            raise BackendError(f"layer '{name}'", expected="fp8, with one scale a tensor", received=linear.precision,
                               way_out="Quantise with recipe fp8, or export the checkpoint before quantisation.")
    called = {name: linear for name, linear in found.items() if linear.input_scale is not None}
    if called:
        quantize_op()
    for name, linear in called.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, RoundedLinear(linear, dtype))
    return len(called)


def quantize_op() -> Any:
    """ModelOpt's operator, which it registers when it is imported; a program that has it needs it to be read too."""
    try:
        import modelopt.torch.quantization  # noqa: F401

        return torch.ops.tensorrt.quantize_op
    except (ImportError, AttributeError) as error:
        raise BackendError("FP8 with torch_tensorrt", expected="nvidia-modelopt, whose operator it converts",
                           received=str(error), way_out="Install it: pip install 'pi05_ros[quantize]'.") from error
