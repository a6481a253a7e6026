"""Kernels of vision and prefix alone, on fresh inputs, against PyTorch in float32; the Hopper ones and the portable.

What they write lies in a larger tensor of a known value, so that a row too many shows.
"""

import pytest
import torch
import torch.nn.functional as F

from pi05_ros.benchmark.error import relative_error
from pi05_ros.model.gemma import RMS_EPS
from pi05_ros.model.siglip import LAYER_NORM_EPS

pytestmark = pytest.mark.gpu
DEVICE, BF16 = torch.device("cuda"), torch.bfloat16
PORTABLE = pytest.mark.parametrize("portable", [False, True], ids=["this GPU's", "portable"])
BEYOND = 7.0  # what stands behind the rows that a kernel may write


def normal(*shape, dtype=BF16, scale=1.0):
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def room(rows, columns):
    return torch.full((rows + 8, columns), BEYOND, device=DEVICE, dtype=BF16)


@PORTABLE
@pytest.mark.parametrize(("rows", "inner", "features"), [(968, 2048, 16384), (560, 2048, 16384), (272, 2048, 16384),
                                                         (1000, 2048, 1024), (40, 128, 128), (257, 192, 384),
                                                         (7, 128, 128)])
def test_gated_product(rows, inner, features, portable):
    from pi05_ros.backends.cuda.kernels.gated_product import gated_product

    x, weight, out = normal(rows, inner), normal(2 * features, inner, scale=inner**-0.5), room(rows, features)
    factors = torch.rand(rows + 256, device=DEVICE) + 0.5
    gate, up = (factors[:rows, None] * (x.float() @ weight.float().T)).chunk(2, 1)
    gated_product(x, factors, weight, torch.empty(rows, 2 * features, device=DEVICE, dtype=BF16), out[:rows],
                  portable=portable)
    first = out.clone()
    gated_product(x, factors, weight, torch.empty(rows, 2 * features, device=DEVICE, dtype=BF16), out[:rows],
                  portable=portable)
    assert relative_error(out[:rows], F.gelu(gate, approximate="tanh") * up) < 4e-3
    assert torch.equal(first, out) and (out[rows:] == BEYOND).all()


@PORTABLE
@pytest.mark.parametrize(("rows", "inner", "features"), [(968, 2048, 16384), (560, 2048, 16384), (40, 128, 128),
                                                         (257, 192, 384)])
def test_gated_product_norms_its_rows(rows, inner, features, portable):
    from pi05_ros.backends.cuda.kernels.gated_product import gated_product

    x = normal(rows, inner) * normal(rows, 1).exp()
    weight, out = normal(2 * features, inner, scale=inner**-0.5), room(rows, features)
    counters, wanted = torch.zeros(3, device=DEVICE, dtype=torch.int32), (x.float().square().mean(1) + RMS_EPS).rsqrt()
    gate, up = (wanted[:, None] * (x.float() @ weight.float().T)).chunk(2, 1)
    for _ in range(3):  # the counters are as they were
        factors = torch.zeros(rows + 256, device=DEVICE)
        gated_product(x, factors, weight, torch.empty(rows, 2 * features, device=DEVICE, dtype=BF16), out[:rows],
                      counters, portable)
        assert relative_error(factors[:rows], wanted) < 1e-5 and (factors[rows:] == 0).all() and not counters.any()
        assert relative_error(out[:rows], F.gelu(gate, approximate="tanh") * up) < 4e-3
        assert (out[rows:] == BEYOND).all()


@PORTABLE
@pytest.mark.parametrize(("rows", "features", "inner"), [
    (968, 2048, 16384), (968, 2048, 2048), (832, 2048, 16384), (560, 2048, 2048), (304, 2048, 16384), (40, 128, 1024),
    (1000, 2048, 1152), (4001, 256, 1024)])
def test_prefix_product_added_to_the_residual(rows, features, inner, portable):
    from pi05_ros.backends.cuda.kernels.prefix_added import add_product

    x, y, weight = normal(rows, features), normal(rows, inner), normal(features, inner, scale=inner**-0.5)
    made = []
    for _ in range(2):
        out = room(rows, features)
        out[:rows] = x
        add_product(out[:rows], y, weight, portable)
        made.append(out)
    assert relative_error(made[0][:rows], x.float() + y.float() @ weight.float().T) < 3e-3
    assert (made[0][rows:] == BEYOND).all() and torch.equal(*made)


@PORTABLE
@pytest.mark.parametrize(("rows", "heads"), [(968, 8), (560, 8), (272, 8), (65, 8), (129, 4)])
def test_prefix_attention_with_masked_rows(rows, heads, portable):
    from pi05_ros.backends.cuda.kernels.prefix_attention import CANDIDATES, prefix_attention

    dim, spare = 256, 50
    angles = torch.arange(rows + spare, device=DEVICE)[:, None] * 1e4 ** -(torch.arange(128, device=DEVICE) / 128)
    cos, sin = angles.cos().contiguous(), angles.sin().contiguous()
    valid = (torch.rand(rows + spare, device=DEVICE) < 0.8).to(torch.uint8)
    valid[rows // 3:rows // 2] = 0
    valid[0] = 1
    positions = (valid[:rows].cumsum(0) - 1).clamp(min=0).int()
    x, out = normal(rows, 192) * normal(rows, 1).exp(), room(rows, heads * dim)
    scale = (x.float().square().mean(1, keepdim=True) + RMS_EPS).sqrt()
    inverse = torch.zeros(rows + spare, device=DEVICE)
    qkv = (normal(rows, (heads + 2) * dim, scale=1.5) * scale).to(BF16)
    q, k, v = (t.unflatten(1, (-1, dim)) for t in (qkv.float() / scale).split([heads * dim, dim, dim], 1))

    def rotated(t):
        c, s, (a, b) = cos[positions.long()][:, None], sin[positions.long()][:, None], t.chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    q, k, v = (t.transpose(0, 1).expand(heads, -1, -1) for t in (rotated(q), rotated(k), v))
    mask = valid[:rows].bool()[None, None]
    truth = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1).flatten(1)
    keys, values = (torch.full((rows + spare, dim), BEYOND, device=DEVICE, dtype=BF16) for _ in range(2))
    counters, first = torch.zeros(3, device=DEVICE, dtype=torch.int32), None
    for _ in range(3):
        prefix_attention(x, qkv.clone(), positions, cos, sin, keys, values, inverse, counters, valid, out[:rows], heads,
                         CANDIDATES[2], portable)
        assert first is None or torch.equal(out, first)
        first = out.clone()
    assert not counters.any()
    assert relative_error(out[:rows], truth) < 1e-2 and relative_error(keys[:rows], k[0]) < 4e-3
    assert relative_error(inverse[:rows], 1 / scale[:, 0]) < 1e-5 and (inverse[rows:] == 0).all()
    assert (out[rows:] == BEYOND).all() and (keys[rows:] == BEYOND).all() and (values[rows:] == BEYOND).all()


@PORTABLE
@pytest.mark.parametrize(("images", "patches", "heads", "dim"), [(3, 256, 16, 72), (2, 256, 16, 72), (1, 256, 5, 72),
                                                                 (1, 64, 2, 16),
                                                                 (2, 128, 3, 64), (2, 16, 2, 32)])
def test_image_attention(images, patches, heads, dim, portable):
    from pi05_ros.backends.cuda.kernels.image_attention import image_attention

    rows = images * patches
    qkv, out = normal(rows, 3 * heads * dim), room(rows, heads * dim)
    q, k, v = qkv.float().view(images, patches, 3, heads, dim).permute(2, 0, 3, 1, 4)
    image_attention(qkv, patches, heads, out[:rows], portable)
    truth = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, -1)
    assert relative_error(out[:rows], truth) < 8e-3 and (out[rows:] == BEYOND).all()


@pytest.mark.parametrize("added", ["nothing", "position", "product and bias"])
def test_layer_norm_takes_up_what_is_added(added):
    from pi05_ros.backends.cuda.kernels.norm import layer_norm

    rows, width, patches = 768, 1152, 256
    x, out = normal(rows, width, dtype=torch.float32), room(rows, width)
    delta, add = {"nothing": (None, None), "position": (None, normal(patches, width, dtype=torch.float32)),
                  "product and bias": (normal(rows, width), normal(width))}[added]
    summed = x + (0 if delta is None else delta.float())
    summed += 0 if add is None else add.float().repeat(rows // patches, 1) if add.dim() == 2 else add.float()
    scale = normal(width, dtype=torch.float32)
    layer_norm(x, delta, add, scale, out[:rows])
    truth = F.layer_norm(summed, (width,), scale, eps=LAYER_NORM_EPS)
    assert torch.equal(x, summed) and relative_error(out[:rows], truth) < 4e-3 and (out[rows:] == BEYOND).all()


def test_row_sums_are_what_the_next_norm_needs():
    from pi05_ros.backends.cuda.kernels.norm import row_sums

    rows, width, patches = 512, 1152, 256
    x, position = (normal(n, width, dtype=torch.float32) for n in (rows, patches))
    out, sums, summed = room(rows, width), torch.full((rows + 1, 2), BEYOND, device=DEVICE), x + position.repeat(2, 1)
    scale = normal(width, dtype=torch.float32)
    row_sums(x, position, scale, out[:rows], sums)
    truth = torch.stack([summed.sum(1), (summed * summed).sum(1)], 1)
    assert torch.equal(x, summed) and torch.equal(out[:rows], (summed * scale).bfloat16())
    assert (out[rows:] == BEYOND).all()
    assert relative_error(sums[:rows], truth) < 1e-5 and (sums[rows:] == BEYOND).all()


HOPPER = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
                            reason="the kernel is for compute capability 9.0")


@HOPPER
@pytest.mark.parametrize("rows", [768, 512, 256, 200, 129, 40])
@pytest.mark.parametrize(("features", "inner", "gelu"), [(3456, 1152, False), (4304, 1152, True), (2048, 1152, False),
                                                         (328, 264, True)])
def test_product_of_a_layer_norm(rows, features, inner, gelu):
    from pi05_ros.backends.cuda.kernels.vision_product import normed_product
    from pi05_ros.backends.cuda.packing import affine

    x, scale, shift = normal(rows, inner, dtype=torch.float32, scale=2) + 0.5, normal(inner), normal(inner)
    scaled = (x * scale.float()).bfloat16()
    weight, bias = normal(features, inner, scale=inner**-0.5), normal(features)
    parts, sums = 3, torch.full((4, rows + 8, 2), BEYOND, device=DEVICE)
    for i, part in enumerate(x.tensor_split(parts, 1)):
        sums[i, :rows] = torch.stack([part.sum(1), (part * part).sum(1)], 1)
    room_and_pad = room(rows, features + 24)
    out, layer = room_and_pad[:, :features], affine(weight, bias, (scale, shift))
    normed_product(scaled, layer, sums, parts, out[:rows], gelu)
    first = room_and_pad.clone()
    normed_product(scaled, layer, sums, parts, out[:rows], gelu)
    truth = F.layer_norm(x, (inner,), scale.float(), shift.float(), LAYER_NORM_EPS) @ weight.float().T
    truth = F.gelu(truth + bias.float(), approximate="tanh") if gelu else truth + bias.float()
    assert relative_error(out[:rows], truth) < 6e-3 and torch.equal(first, room_and_pad)
    assert (room_and_pad[rows:] == BEYOND).all() and (room_and_pad[:, features:] == BEYOND).all()


@HOPPER
@pytest.mark.parametrize("rows", [768, 512, 256, 200, 129, 40])
@pytest.mark.parametrize(("features", "inner"), [(1152, 1152), (1152, 4304), (264, 328), (264, 1000)])
def test_product_added_to_the_residual(rows, features, inner):
    from pi05_ros.backends.cuda.kernels.vision_product import added_product
    from pi05_ros.backends.cuda.packing import affine

    x, scale = normal(rows, inner), normal(features)
    layer = affine(normal(features, inner, scale=inner**-0.5), normal(features), after=scale, padded=True)
    before, out = normal(rows, features, dtype=torch.float32), room(rows, features)
    residual, sums = out.float(), torch.full((64, rows + 8, 2), BEYOND, device=DEVICE)
    residual[:rows] = before
    parts = added_product(x, layer, residual[:rows], out[:rows], sums)
    first = residual.clone()
    truth = before + x.float() @ layer.weight.float().T + layer.bias.float()
    assert relative_error(first[:rows], truth) < 1e-5 and torch.equal(out[:rows], (first[:rows] * scale).bfloat16())
    assert relative_error(sums[:parts, :rows, 0].sum(0), truth.sum(1)) < 1e-4
    assert relative_error(sums[:parts, :rows, 1].sum(0), (truth * truth).sum(1)) < 1e-5
    assert (out[rows:] == BEYOND).all() and (first[rows:] == BEYOND).all()
    assert (sums[:, rows:] == BEYOND).all() and (sums[parts:] == BEYOND).all()
    residual[:rows] = before
    added_product(x, layer, residual[:rows], out[:rows], sums)
    assert torch.equal(first, residual)


@pytest.mark.parametrize(("horizon", "guided"), [(50, False), (50, True), (10, False), (15, True)])
def test_expert_in_one_kernel(horizon, guided, monkeypatch):
    """The persistent expert against the portable one, both far from float32 by no more than eager in bfloat16 is."""
    from pi05_ros.backends import eager
    from pi05_ros.backends.cuda import build
    from pi05_ros.backends.cuda.persistent import Misfit
    from pi05_ros.config import Pi05Config
    from pi05_ros.model.pi05 import PrefixCache
    from pi05_ros.model.recipe import DeviceSource
    from pi05_ros.schema import Guidance

    source = DeviceSource(Pi05Config(action_horizon=horizon))
    monkeypatch.setenv("PI05_EXPERT", "portable")
    many = build.build(["expert"], source, DEVICE, "bfloat16", "pil", None)
    monkeypatch.setenv("PI05_EXPERT", "persistent")
    try:
        one = build.build(["expert"], source, DEVICE, "bfloat16", "pil", None)
    except Misfit as error:
        pytest.skip(str(error))  # a GPU without room for the kernel
    truth = eager.build(["expert"], source, DEVICE, "float32", "pil", None)
    bar = eager.build(["expert"], source, DEVICE, "bfloat16", "pil", None)
    for prefix, steps in ((968, 10), (300, 2), (785, 5), (257, 1)):
        mask = torch.rand(1, prefix, device=DEVICE) < 0.9
        mask[0, 0] = True
        cache = PrefixCache(normal(18, 1, 1, prefix, 256), normal(18, 1, 1, prefix, 256), mask)
        exact = PrefixCache(cache.keys.float(), cache.values.float(), mask)
        noise = torch.randn(1, horizon, 32, device=DEVICE)
        previous = torch.randn(1, horizon, 32).numpy()
        guidance = Guidance(previous, 2, horizon - 2, "exp", 5.0, "identity") if guided else None
        wanted = truth.denoise(exact, noise, steps, guidance=guidance)
        ours, theirs, eagers = (stages.denoise(cache, noise, steps, guidance=guidance) for stages in (one, many, bar))
        limit = 1.2 * relative_error(eagers, wanted)
        assert relative_error(ours, wanted) <= limit and relative_error(theirs, wanted) <= limit
        assert torch.equal(ours, one.denoise(cache, noise, steps, guidance=guidance))
