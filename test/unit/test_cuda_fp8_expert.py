"""The persistent expert in FP8 (csrc/expert.cu): its packed weights, and its arithmetic against the simulation.

What is emulated is what the kernel rounds and scales, on the numbers that `packing.py` gives it; the kernel itself is
run by test/parity/test_fp8_gpu.py.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fp8_models import small_source

from pi05_ros.backends import base
from pi05_ros.backends.cuda import packing
from pi05_ros.backends.cuda.modulation import step_tables
from pi05_ros.backends.cuda.quantised import IN_BF16, IN_FP8, expert_in_fp8, how_layers_run, plain_source
from pi05_ros.benchmark.error import relative_error
from pi05_ros.config import GemmaConfig, SiglipConfig, tiny_config
from pi05_ros.model.gemma import RMS_EPS
from pi05_ros.model.low_precision import FP8
from pi05_ros.model.pi05 import PrefixCache
from pi05_ros.model.positions import rope_tables, rotate
from pi05_ros.model.weights import openpi_name

CPU, HOPPER, DEPTH = torch.device("cpu"), (9, 0), 2
CONFIG = replace(tiny_config(action_horizon=8),
                 vision=SiglipConfig(image_size=28, patch_size=14, width=96, depth=1, mlp_dim=208, num_heads=4),
                 prefix=GemmaConfig(width=64, depth=DEPTH, mlp_dim=128, vocab_size=512),
                 expert=GemmaConfig(width=1024, depth=DEPTH, mlp_dim=4096))
ROOM = 0.125  # as csrc/expert_ends.cuh


@pytest.fixture(scope="module")
def source():
    return small_source("fp8", CONFIG)


@pytest.fixture(scope="module")
def packed(source):
    runs = how_layers_run(source.quantisation, CONFIG, ["expert"], HOPPER, one_kernel=True)
    low = [name for name, how in runs.items() if how == IN_FP8]
    return packing.pack(plain_source(source, runs), CPU, ["expert"], None, 15, low).expert


def test_all_but_the_outputs_run_in_fp8_where_the_expert_is_one_kernel(source):
    assert expert_in_fp8(source.quantisation, CONFIG) and not expert_in_fp8(None, CONFIG)
    runs = how_layers_run(source.quantisation, CONFIG, ["expert"], HOPPER, one_kernel=True)
    assert len(runs) == 7 * DEPTH
    assert all((how == IN_BF16) == name.endswith("o_proj") for name, how in runs.items())
    rest = {name: layer for name, layer in source.quantisation.layers.items() if "1.mlp.up" not in name}
    fewer = replace(source.quantisation, layers=rest)
    assert not expert_in_fp8(fewer, CONFIG)
    assert set(how_layers_run(fewer, CONFIG, ["expert"], HOPPER, one_kernel=True).values()) == {IN_BF16}


def test_packed_weights_are_the_stored_numbers(source, packed):
    def stored(name, leaf="weight"):
        return source.tensors[f"{openpi_name(f'action_expert.layers.1.{name}_proj')}.{leaf}"]

    layers = packed.layers
    gate, up = (stored(f"mlp.{name}").float() * stored(f"mlp.{name}", "weight_scale") for name in ("gate", "up"))
    assert torch.equal(layers.rows("gate_up", 1), torch.cat([gate, up]))
    q, k, v = (stored(f"self_attn.{name}").float() * stored(f"self_attn.{name}", "weight_scale") for name in "qkv")
    assert torch.equal(layers.rows("qkv", 1), torch.cat([q, k, v]))
    assert torch.equal(layers.rows("down", 1).float(), stored("mlp.down").float())
    out = stored("self_attn.o").float() * stored("self_attn.o", "weight_scale")
    assert torch.equal(layers.rows("out", 1), out.bfloat16())
    of_input = stored("mlp.down", "input_scale")
    assert layers.scales[1, 5:].tolist() == pytest.approx(
        [1 / of_input.item(), (of_input * stored("mlp.down", "weight_scale")).item(), 0])
    slot = layers.tensors["down"][1][2, 3].view(2, 16, -1, 16)[1, 5]  # cluster 2, block 3; the second slot of 256 k
    k = slice(3 * 512 + 256 + 80, 3 * 512 + 256 + 96)
    first = 2 * slot.shape[0]
    assert torch.equal(slot[:2].view(FP8).float(), stored("mlp.down")[first:first + 2, k].float())


def normed_product(layers, name, index, act, x, unit, bias):
    """Of activations rounded in `unit`, and the unit of the next: 1 / rms(unit x) takes it out again."""
    rounded = (act * unit).clamp(-448, 448).to(FP8).float()
    factor = ((x * unit).square().mean(1, keepdim=True) + RMS_EPS * unit**2).rsqrt()
    return (rounded @ layers.rows(name, index).T) * factor + bias, ROOM * factor * unit


def denoise(weights, cache, x_t, steps):
    """csrc/expert.cu in FP8: float32 but where it rounds."""
    tables, layers, half = step_tables(weights, steps), weights.layers, torch.bfloat16
    rope = rope_tables(cache.keys.shape[3] + torch.arange(len(x_t))[None], 256, torch.float32, torch.float32)
    for step in range(steps):
        scale, gate = tables.scales[step], tables.gates[step]
        x = F.linear(x_t, weights.action_in, weights.action_in_b)
        unit = ROOM * (layers.scales[-1, 0] * x_t.square().sum(1, keepdim=True) + layers.scales[-1, 1]).rsqrt()
        for i in range(DEPTH):
            over_hidden, of_down = layers.scales[i, 5:7]
            qkv, unit = normed_product(layers, "qkv", i, scale[2 * i] * x, x, unit, tables.qkv_bias[step, i])
            q, k, v = (t.unflatten(1, (-1, 256)).transpose(0, 1)[None] for t in qkv.split([2048, 256, 256], 1))
            q, k, v = (t.to(half).float() for t in (rotate(q, rope), rotate(k, rope), v))
            keys, values = (torch.cat([a[i], b], 2) for a, b in ((cache.keys, k), (cache.values, v)))
            attended = F.scaled_dot_product_attention(q, keys.expand(-1, 8, -1, -1), values.expand(-1, 8, -1, -1))
            attended = attended[0].transpose(0, 1).flatten(1).to(half).float()
            x = x + gate[2 * i] * (attended @ layers.rows("out", i).float().T)
            bias = tables.gate_up_bias[step, i]
            both, unit = normed_product(layers, "gate_up", i, scale[2 * i + 1] * x, x, unit, bias)
            hidden = F.gelu(both[:, :4096], approximate="tanh") * both[:, 4096:] * over_hidden
            hidden = hidden.clamp(-448, 448).to(FP8).float()
            x = x + gate[2 * i + 1] * (hidden @ layers.rows("down", i).float().T * of_down)
        factor = (x.square().mean(1, keepdim=True) + RMS_EPS).rsqrt()
        velocity = F.linear(scale[-1] * x, weights.action_out) * factor + tables.out_bias[step]
        x_t = x_t - velocity / steps
    return x_t


def test_its_arithmetic_is_as_near_to_the_model_as_the_simulation(source, packed):
    torch.manual_seed(0)
    keys, values = torch.randn(2, DEPTH, 1, 1, 20, 256).bfloat16().float()
    cache, noise = PrefixCache(keys, values, torch.ones(1, 20, dtype=torch.bool)), torch.randn(1, 8, 32)
    plain, simulated = (base.build("eager", one, "cpu", "float32").expert for one in (source.source, source))
    right, theirs = (one.denoise(cache, noise, 2) for one in (plain, simulated))
    ours = denoise(packed, cache, noise[0], 2)[None]
    error, bar = relative_error(ours, right), relative_error(theirs, right)
    print(f"error {error:.3e}, of the simulation {bar:.3e}, of each other {relative_error(ours, theirs):.3e}")
    assert 1e-3 < error <= 1.1 * bar
