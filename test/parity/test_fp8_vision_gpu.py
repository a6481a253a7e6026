"""The vision tower's products in FP8 with norm, activation and residual inside (csrc/product.cu), against PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from test_fp8_gpu import BEYOND, BF16, DEVICE, HAS_FP8, HOPPER, near, outliers, scale_of

from pi05_ros.benchmark.error import relative_error
from pi05_ros.model.low_precision import FP8, to_fp8

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (HAS_FP8 and HOPPER), reason="needs compute capability 9.0")]


def vision_layer(features, inner, low):
    from pi05_ros.backends.cuda.packing_fp8 import Fp8Affine

    weight = torch.randn(features, inner, device=DEVICE) * inner**-0.5
    scale, table = scale_of(weight).item(), torch.randn(features, 2, device=DEVICE)
    room = torch.zeros(features, -(-inner // 128) * 128, device=DEVICE).to(FP8 if low else BF16)
    room[:, :inner] = to_fp8(weight, scale_of(weight)) if low else weight.to(BF16)
    return Fp8Affine(room[:, :inner], table, torch.empty(0), scale if low else 1.0, 0.5)


def row_sums_of(x, parts):
    from pi05_ros.backends.cuda.kernels.vision_product import Sums

    sums = torch.full((64, len(x) + 8, 2), BEYOND, device=DEVICE)
    for i, part in enumerate(x.chunk(parts, 1)):
        sums[i, :len(x)] = torch.stack([part.sum(1), part.square().sum(1)], 1)
    return Sums(sums, parts)


def over_deviation(x):
    return (x.var(1, correction=0, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("rows", [768, 512, 256, 200])
@pytest.mark.parametrize(("features", "gelu"), [(3456, False), (4304, True)])
def test_vision_product_with_a_norm_inside(rows, features, gelu):
    from pi05_ros.backends.cuda.kernels.norm import ROOM
    from pi05_ros.backends.cuda.kernels.vision_product import normed_product

    before, layer = 1 + torch.randn(rows, 1152, device=DEVICE), vision_layer(features, 1152, True)
    c = outliers(1152).float()
    r = 1.5 * before + torch.randn_like(before)
    x = to_fp8(r * c * ROOM * over_deviation(before), torch.ones(1, device=DEVICE))
    out = torch.full((rows + 8, 4352), BEYOND, device=DEVICE).to(FP8 if gelu else BF16)
    y = (x.double() @ layer.weight.double().T).float() * layer.factor / (ROOM * over_deviation(before))
    y = y * over_deviation(r) - over_deviation(r) * r.mean(1, keepdim=True) * layer.table[:, 1] + layer.table[:, 0]
    now = row_sums_of(r, 9)
    normed_product(x, layer, *now, out[:rows, :features], gelu, before=row_sums_of(before, 3))
    found = out[:rows, :features]
    assert (out[rows:].float() == BEYOND).all() and (out[:, features:].float() == BEYOND).all()
    if gelu:
        return near(found, to_fp8(F.gelu(y, approximate="tanh") * layer.over, torch.ones(1, device=DEVICE)), 0.9, 0.995)
    print(f"error {relative_error(found, y):.2e}")
    assert relative_error(found, y) < 1e-2


@pytest.mark.parametrize("rows", [768, 512, 256, 200])
@pytest.mark.parametrize(("inner", "narrow"), [(1152, True), (4304, True), (4304, False)])
def test_vision_product_into_the_residual(rows, inner, narrow):
    """Of e4m3 but for the attention's, which is bfloat16; what it leaves is in the unit of the residual before."""
    from pi05_ros.backends.cuda.kernels.norm import ROOM
    from pi05_ros.backends.cuda.kernels.vision_product import added_product

    layer, before = vision_layer(1152, inner, inner == 4304), 1 + torch.randn(rows, 1152, device=DEVICE)
    x, one = outliers(rows, 4352)[:, :inner], torch.ones(1, device=DEVICE)
    x = to_fp8(x, one) if inner == 4304 else x.contiguous()
    right = before + (x.double() @ layer.weight.double().T).float() * layer.factor + layer.table[:, 0]
    residual = torch.full((rows + 8, 1152), BEYOND, device=DEVICE)
    residual[:rows] = before
    out = torch.full((rows + 8, 1152), BEYOND, device=DEVICE).to(FP8 if narrow else BF16)
    left = torch.full((64, rows + 8, 2), BEYOND, device=DEVICE)
    parts = added_product(x, layer, residual[:rows], out[:rows], left, before=row_sums_of(before, 5))
    error = relative_error(residual[:rows], right)
    print(f"error {error:.2e}")
    assert error < 1e-2 and (residual[rows:] == BEYOND).all() and (out[rows:].float() == BEYOND).all()
    sums = left[:parts, :rows].sum(0)
    torch.testing.assert_close(sums[:, 0], residual[:rows].sum(1), rtol=1e-3, atol=0.5)
    torch.testing.assert_close(sums[:, 1], residual[:rows].square().sum(1), rtol=1e-4, atol=1e-2)
    unit = ROOM * over_deviation(before) if narrow else 1.0
    wanted = residual[:rows] * layer.table[:, 1] * unit
    near(out[:rows], to_fp8(wanted, one)) if narrow else torch.testing.assert_close(out[:rows].float(), wanted,
                                                                                    rtol=1e-2, atol=1e-3)
