"""The vision tower in FP8 with norms inside its products: packed weights, and forward_fp8.py over products in PyTorch.

The products here do what csrc/product.cu says of itself; that it does is for test/parity/test_fp8_gpu.py.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fp8_models import small_source
from test_cuda_fp8 import nested

pytest.importorskip("triton", reason="needs Triton, which PyTorch's CPU build does not bring")

from pi05_ros.backends import base  # noqa: E402
from pi05_ros.backends.cuda import checks, forward_fp8, packing, shapes  # noqa: E402
from pi05_ros.backends.cuda.kernels.norm import ROOM  # noqa: E402
from pi05_ros.backends.cuda.quantised import IN_BF16, IN_FP8, how_layers_run, plain_source  # noqa: E402
from pi05_ros.benchmark.error import relative_error  # noqa: E402
from pi05_ros.config import SiglipConfig, tiny_config  # noqa: E402
from pi05_ros.model.low_precision import FP8  # noqa: E402
from pi05_ros.model.siglip import LAYER_NORM_EPS  # noqa: E402

CPU, HOPPER = torch.device("cpu"), (9, 0)
CONFIG = replace(tiny_config(), vision=SiglipConfig(image_size=56, patch_size=14, width=256, depth=4, mlp_dim=528,
                                                    num_heads=4))


@pytest.fixture(scope="module")
def source():
    return small_source("fp8", CONFIG)


@pytest.fixture(scope="module")
def weights(source):
    runs = how_layers_run(source.quantisation, CONFIG, ["vision"], HOPPER)
    low = [name for name, how in runs.items() if how == IN_FP8]
    assert len(low) == 5 * 4 and all(name.endswith("out_proj") for name, how in runs.items() if how == IN_BF16)
    return packing.pack(plain_source(source, runs), CPU, ["vision"], low=low).vision


def test_without_a_common_scale_of_q_k_and_v_all_of_it_is_in_bfloat16(source):
    name = "vision_tower.encoder.layers.2.self_attn.k_proj"
    layers = dict(source.quantisation.layers)
    layers[name] = replace(layers[name], weight_scale=2 * layers[name].weight_scale)
    runs = how_layers_run(replace(source.quantisation, layers=layers), CONFIG, ["vision"], HOPPER)
    assert set(runs.values()) == {IN_BF16}


def test_it_takes_the_bytes_that_were_asked_for(source, weights):
    runs = how_layers_run(source.quantisation, CONFIG, ["vision"], HOPPER)
    counted = checks.weight_bytes(CONFIG, ["vision"], runs)
    assert 0.9 * counted <= sum(tensor.nbytes for tensor in nested(weights)) <= counted


def norm_of(sums, rows, width):
    total = sums.at[:sums.parts, :rows].sum(0) / width
    mean = total[:, :1]
    return (total[:, 1:] - mean.square() + LAYER_NORM_EPS).rsqrt(), mean


def store(out, y):
    out.copy_(y.clamp(-448, 448).to(FP8) if out.dtype == FP8 else y)


def row_sums(x, add, scale, out, sums):
    x += add.repeat(len(x) // len(add), 1)
    sums[:len(x)] = torch.stack([x.sum(1), x.square().sum(1)], 1)
    unit = ROOM * norm_of(forward_fp8.Sums(sums[None], 1), *x.shape)[0]
    store(out, x * scale * unit)


def normed_product(x, layer, sums, parts, out, gelu=False, t=None, before=None):
    over, mean = norm_of(forward_fp8.Sums(sums, parts), *x.shape)
    unit = ROOM * norm_of(before, *x.shape)[0] if x.dtype == FP8 else 1.0
    y = x.float() @ layer.weight.float().T * (over / unit * layer.factor) - over * mean * layer.table[:, 1]
    y = y + layer.table[:, 0]
    store(out, F.gelu(y, approximate="tanh") * layer.over if gelu else y)


def added_product(x, layer, residual, out, sums, t=None, before=None):
    unit = ROOM * norm_of(before, *residual.shape)[0] if out.dtype == FP8 else 1.0
    residual += x.float() @ layer.weight.float().T * layer.factor + layer.table[:, 0]
    store(out, residual * layer.table[:, 1] * unit)
    for part, columns in enumerate(residual.split(100, 1)):
        sums[part, :len(x)] = torch.stack([columns.sum(1), columns.square().sum(1)], 1)
    return part + 1


def image_attention(qkv, patches, heads, out):
    q, k, v = qkv.float().unflatten(0, (-1, patches)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    out.copy_(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))


def test_it_is_as_near_to_the_model_as_the_simulation(source, weights, monkeypatch):
    for stand_in in (row_sums, normed_product, added_product, image_attention):
        monkeypatch.setattr(forward_fp8, stand_in.__name__, stand_in)
    narrow = torch.mm  # which gives float32 of bfloat16 on GPUs alone
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype, out: narrow(a.to(out_dtype), b.to(out_dtype), out=out))
    torch.manual_seed(0)
    pixels, buffers = torch.rand(1, 2, 3, 56, 56) * 2 - 1, shapes.allocate(CONFIG, CPU)
    buffers.pixels[:2] = pixels[0]
    forward_fp8.vision_in_products(weights, buffers, CONFIG, 2)
    ours = buffers.image_tokens[:32].float()
    plain, simulated = (base.build("eager", one, "cpu", "float32").vision for one in (source.source, source))
    right, theirs = (one.encode_images(pixels)[0] for one in (plain, simulated))
    error, bar = relative_error(ours, right), relative_error(theirs, right)
    print(f"error {error:.3e}, of the simulation {bar:.3e}, of each other {relative_error(ours, theirs):.3e}")
    assert 5e-3 < error <= 1.1 * bar
    assert torch.isfinite(buffers.image_tokens).all()
