"""The number formats, and the Linear that multiplies in them."""

import pytest
import torch
from torch import nn

from pi05_ros.errors import BackendError
from pi05_ros.model import low_precision as low
from pi05_ros.model.quantised_linear import QuantisedLinear
from pi05_ros.quantize.layer_errors import relative
from pi05_ros.quantize.ptq import weight_amax


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_fp4_rounds_to_the_nearest_and_ties_to_even():
    values = torch.tensor([0.25, 0.26, 0.75, 0.74, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, -0.75, -5.0, 6.0, 0.0, -0.2, 3.4])
    expected = [0.0, 0.5, 1.0, 0.5, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -1.0, -4.0, 6.0, 0.0, 0.0, 3.0]
    one = torch.tensor([1.0])
    codes, block_scale = low.to_nvfp4(values, one)
    assert block_scale.item() == 1.0  # 6 is the largest, so a step is 1
    assert low.from_nvfp4(codes, block_scale, one).tolist() == expected


def test_codes_survive_packing():
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    packed = low.pack_codes(codes)
    assert packed.shape == (2, 4) and torch.equal(low.unpack_codes(packed), codes)


@pytest.mark.parametrize("width", [16, 40])
def test_a_block_of_nvfp4_is_off_by_at_most_half_a_step_and_its_scales_rounding(width):
    x = drawn(8, width) * torch.logspace(-2, 2, 8)[:, None]
    scale = low.nvfp4_scale(x.abs().amax().reshape(1))
    codes, block_scale = low.to_nvfp4(x, scale)
    back = low.from_nvfp4(codes, block_scale, scale)[:, :width]
    blocks = torch.nn.functional.pad(x, (0, -width % 16)).unflatten(-1, (-1, 16)).abs().amax(-1)
    # Between 4 and 6 half a step is 1/6 of the largest; the block's scale is off by 1/16, or its least step.
    allowed = (blocks * (1 / 6 + 1 / 16) + 6 * 2**-10 * scale).repeat_interleave(16, dim=-1)[:, :width]
    assert ((x - back).abs() <= allowed).all()


def test_fp8_saturates_and_keeps_zeros_alone():
    scale = low.fp8_scale(torch.tensor([0.0, 448.0]))
    assert scale.tolist() == [1.0, 1.0]
    assert low.to_fp8(torch.tensor([1e9, -1e9, 0.0]), torch.tensor([1.0])).float().tolist() == [448.0, -448.0, 0.0]


def quantised(precision, bias=True, inputs=32, outputs=48):
    linear = nn.Linear(inputs, outputs, bias).requires_grad_(False)
    linear.weight.copy_(drawn(outputs, inputs, seed=1))
    amax = weight_amax(linear, precision)
    return linear, QuantisedLinear.of(linear, precision, amax, torch.tensor([4.0]))


@pytest.mark.parametrize(("precision", "limit"), [("fp8", 0.05), ("fp8_token", 0.05), ("nvfp4", 0.2)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantised_linear_is_near_the_linear_and_counts(precision, limit, bias):
    linear, layer = quantised(precision, bias)
    x = drawn(2, 5, 32)
    assert 1e-3 < relative(layer.dequantised(), linear.weight) < limit
    assert 1e-3 < relative(layer(x), linear(x)) < limit
    assert layer.calls == {"simulated": 1} and layer(x.bfloat16()).dtype == torch.bfloat16
    saved = sum(p.nbytes for p in (layer.weight, layer.weight_scale))
    assert saved < linear.weight.nbytes / 3


@pytest.mark.parametrize("precision", ["fp8", "fp8_token"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_of_the_hardware_is_the_simulated_one(precision, bias):
    """PyTorch has the same operation on the CPU; on a GPU it is the tensor cores'."""
    _, layer = quantised(precision, bias)
    x = drawn(2, 7, 32, seed=2).bfloat16()
    scale = low.fp8_scale(x.abs().amax(-1, keepdim=True)) if precision == "fp8_token" else layer.input_scale
    made = layer.scaled_product(low.to_fp8(x, scale), scale, torch.bfloat16)
    assert made.shape == (2, 7, 48) and relative(made, layer(x)) < 4e-3  # bfloat16's rounding


def test_numbers_beyond_the_calibrated_range_saturate():
    _, layer = quantised("fp8", bias=False)
    assert torch.equal(layer(torch.full((1, 32), 4.0)), layer(torch.full((1, 32), 40.0)))


def test_what_cannot_be_run_is_refused():
    linear, layer = quantised("fp8")
    with pytest.raises(BackendError, match="identity Jacobian"):
        layer(drawn(1, 32).requires_grad_(True))
    never = QuantisedLinear.of(linear, "fp8", weight_amax(linear, "fp8"), None)
    assert relative(never.dequantised(), linear.weight) < 0.05
    with pytest.raises(BackendError, match="no calibration has run"):
        never(drawn(1, 32))
