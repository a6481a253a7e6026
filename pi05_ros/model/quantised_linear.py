"""A Linear in low precision: weight and input are rounded to numbers that a tensor core of that precision multiplies.

On a GPU with FP8 tensor cores, in bfloat16, the product of FP8 numbers is the hardware's (`torch._scaled_mm`). Anywhere
else it is simulated: the rounded numbers are multiplied in the input's dtype, which holds each FP8 number exactly.
NVFP4 is always simulated here, in float32. Every call is counted by how it ran, so that a report can prove what it
measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi05_ros.errors import BackendError
from pi05_ros.model import low_precision as low
from pi05_ros.model.low_precision import BLOCK, FP8, Precision

FP8_CAPABILITY = (8, 9)  # Ada and later
TILE = 16  # hardware FP8 products want sizes that are multiples of it


class QuantisedLinear(nn.Module):
    """y = x W^T + b with W and x in `precision`.

    weight: FP8 [out, in], or NVFP4 two a byte, uint8 [out, in rounded up to blocks / 2].
    weight_scale: float32 [1], or [out, 1] for fp8_token; NVFP4: E4M3 [out, blocks], below weight_scale_2 float32 [1].
    input_scale: float32 [1]; not for fp8_token. Without it (a layer whose output nobody reads) it cannot be called.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_scale_2: nn.Parameter
    input_scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool, precision: Precision,
                 calibrated: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.precision = in_features, out_features, precision
        self.calls: Counter[str] = Counter()
        blocks = -(-in_features // BLOCK)
        formats: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {
            "fp8": {"weight": ((out_features, in_features), FP8), "weight_scale": ((1,), torch.float32)},
            "fp8_token": {"weight": ((out_features, in_features), FP8),
                          "weight_scale": ((out_features, 1), torch.float32)},
            "nvfp4": {"weight": ((out_features, blocks * BLOCK // 2), torch.uint8),
                      "weight_scale": ((out_features, blocks), FP8), "weight_scale_2": ((1,), torch.float32)},
        }
        shapes = formats[precision]
        if calibrated and precision != "fp8_token":
            shapes["input_scale"] = ((1,), torch.float32)
        if bias:
            shapes["bias"] = ((out_features,), torch.float32)
        for name, (shape, dtype) in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
        for name in ("weight_scale_2", "input_scale", "bias"):
            if name not in shapes:
                self.register_parameter(name, None)

    @property
    def own_dtypes(self) -> tuple[str, ...]:
        """Parameters whose dtype is the format's, whatever the model's is."""
        return tuple(name for name, p in self.named_parameters() if name != "bias")

    @property
    def stored_bytes(self) -> int:
        return sum(p.nbytes for p in self.parameters())

    @classmethod
    def of(cls, linear: nn.Linear, precision: Precision, weight_amax: Tensor,
           input_amax: Tensor | None) -> QuantisedLinear:
        """Quantise. weight_amax: [1], or [out, 1] for fp8_token; input_amax: [1], None where nobody calls the layer."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, precision, input_amax is not None)
        weight, device = linear.weight.detach(), linear.weight.device
        made.to(device)
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        amax = weight_amax.to(device)
        if precision == "nvfp4":
            scale = low.nvfp4_scale(amax)
            codes, block_scale = low.to_nvfp4(weight, scale)
            values = {"weight": low.pack_codes(codes), "weight_scale": block_scale, "weight_scale_2": scale}
        else:
            values = {"weight_scale": low.fp8_scale(amax), "weight": low.to_fp8(weight, low.fp8_scale(amax))}
        if made.input_scale is not None and input_amax is not None:
            to_scale = low.nvfp4_scale if precision == "nvfp4" else low.fp8_scale
            values["input_scale"] = to_scale(input_amax.to(device))
        for name, value in values.items():
            getattr(made, name).data.copy_(value)
        return made

    def scales(self) -> dict[str, Tensor]:
        """The float32 ones."""
        return {name: p for name, p in self.named_parameters() if "scale" in name and p.dtype == torch.float32}

    def dequantised(self) -> Tensor:
        """The weight as it is multiplied: float32 [out, in]."""
        if self.precision != "nvfp4":
            return self.weight.float() * self.weight_scale
        values = low.from_nvfp4(low.unpack_codes(self.weight), self.weight_scale, self.weight_scale_2)
        return values[:, :self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise BackendError("gradient through a quantised layer", expected="none", received="a backward pass",
                               way_out="Use guidance with the identity Jacobian, or the model before quantisation.")
        if self.input_scale is None and self.precision != "fp8_token":
            raise BackendError("quantised layer", expected="a scale of its input",
                               received="a layer that no calibration has run",
                               way_out="Quantise again, with a calibration that runs it.")
        run: Callable[[Tensor], Tensor] = self._nvfp4 if self.precision == "nvfp4" else self._fp8
        return run(x)

    def _fp8(self, x: Tensor) -> Tensor:
        scale = low.fp8_scale(x.abs().amax(-1, keepdim=True)) if self.input_scale is None else self.input_scale
        rounded = low.to_fp8(x, scale)
        if self.on_tensor_cores(x):
            self.calls["tensor cores"] += 1
            return self.scaled_product(rounded, scale, x.dtype)
        self.calls["simulated"] += 1
        y = F.linear(rounded.to(x.dtype), self.weight.to(x.dtype)).float() * scale * self.weight_scale.flatten()
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def on_tensor_cores(self, x: Tensor) -> bool:
        fits = self.in_features % TILE == 0 and self.out_features % TILE == 0
        return (fits and x.dtype == torch.bfloat16 and x.is_cuda
                and torch.cuda.get_device_capability(x.device) >= FP8_CAPABILITY)

    def scaled_product(self, rounded: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The FP8 product of the hardware: `rounded` [..., in] with its scale, [1] or [..., 1]."""
        rows = rounded.flatten(0, -2)
        by_token = self.precision == "fp8_token"
        y = torch._scaled_mm(
            rows, self.weight.t(), out_dtype=dtype,
            scale_a=scale.reshape(-1, 1) if by_token else scale.reshape(()),
            scale_b=self.weight_scale.reshape(1, -1) if by_token else self.weight_scale.reshape(()))
        y = y.unflatten(0, rounded.shape[:-1])
        return y if self.bias is None else y + self.bias.to(dtype)

    def _nvfp4(self, x: Tensor) -> Tensor:
        self.calls["simulated"] += 1
        assert self.input_scale is not None
        codes, block_scale = low.to_nvfp4(x, self.input_scale)
        rounded = low.from_nvfp4(codes, block_scale, self.input_scale)[..., :self.in_features]
        return F.linear(rounded, self.dequantised(), self.bias if self.bias is None else self.bias.float()).to(x.dtype)


def quantised_linears(model: nn.Module) -> dict[str, QuantisedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
