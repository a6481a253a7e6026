"""FP8 in the CUDA backend on a GPU that has it: kernels and the whole against QuantisedLinear, and proof that it ran.

The bar is eager's own quantised run: it rounds the same numbers, with the same scales, and multiplies them in the same
tensor cores. What is small and needs no GPU: test/unit/test_cuda_fp8*.py.
"""

import gc
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from pi05_ros.backends import base
from pi05_ros.backends.cuda import checks
from pi05_ros.benchmark.error import StageTruth, relative_error, run_stages, stage_errors
from pi05_ros.benchmark.inputs import random_inputs
from pi05_ros.benchmark.profile import by_name, record
from pi05_ros.cli.main import main
from pi05_ros.config import Pi05Config
from pi05_ros.model.low_precision import FP8, to_fp8
from pi05_ros.model.pi05 import PrefixCache
from pi05_ros.model.recipe import DeviceSource
from pi05_ros.model.weights import load
from pi05_ros.quantize.calibration import calibrate
from pi05_ros.quantize.outliers import OutlierSource
from pi05_ros.quantize.recipes import RECIPES
from pi05_ros.quantize.samples import synthetic
from pi05_ros.quantize.source import QuantisedSource

HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_FP8, reason="needs a GPU with FP8 tensor cores")]
DEVICE, BF16 = torch.device("cuda"), torch.bfloat16
BEYOND = 7.0  # what stands behind the rows that a kernel may write


def outliers(*shape, dtype=BF16):
    """A twentieth of the channels 32 times as large."""
    return (torch.randn(shape, device=DEVICE) * torch.where(torch.rand(shape[-1], device=DEVICE) < 0.05, 32.0, 1.0)
            ).to(dtype)


def room(rows, columns):
    return torch.full((rows + 8, columns), BEYOND, device=DEVICE).to(FP8)


def near(value, reference, least=0.99, neighbours=1 - 1e-5):
    """Nearly all codes are the same, the others (a share `neighbours`) neighbours: rounding of nearly a tie."""
    value, reference = value.float(), reference.float()
    same = (value == reference).float().mean().item()
    beside = ((value - reference).abs() <= 0.13 * reference.abs() + 2**-8).float().mean().item()
    assert same >= least and beside >= neighbours, (same, beside)


def scale_of(x):
    return (x.float().abs().amax() / 448).reshape(1)


@pytest.mark.parametrize("kind", ["rms", "layer norm"])
@pytest.mark.parametrize("added", [False, True])
def test_norms_leave_fp8(kind, added):
    from pi05_ros.backends.cuda.kernels.fp8_norm import norm_to_fp8

    rows, width, dtype = (968, 2048, BF16) if kind == "rms" else (768, 1152, torch.float32)
    x, delta = outliers(rows, width, dtype=dtype), outliers(rows, width) if added else None
    weight = 1 + torch.randn(width, device=DEVICE)
    shift = None if kind == "rms" else torch.randn(width, device=DEVICE)
    summed = x if delta is None else (x.float() + delta.float()).to(dtype)
    normed = (F.layer_norm(summed.float(), (width,), weight, shift, 1e-6) if kind == "layer norm"
              else F.rms_norm(summed.float(), (width,), weight, 1e-6))
    out, scale = room(rows, width), 0.7 * scale_of(normed)  # some are saturated
    norm_to_fp8(x, delta, weight, shift, scale, out[:rows])
    assert torch.equal(x, summed) and (out[rows:].float() == BEYOND).all()
    near(out[:rows], to_fp8(normed, scale))


@pytest.mark.parametrize("gelu", [False, True])
def test_activations_leave_fp8(gelu):
    from pi05_ros.backends.cuda.kernels.fp8_activation import activation_to_fp8

    x, out = outliers(768, 4304), room(768, 4304)
    y = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    activation_to_fp8(x, scale_of(y), out[:768], gelu)
    near(out[:768], to_fp8(y, scale_of(y)))
    assert (out[768:].float() == BEYOND).all()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("rows", "inner", "features"), [(968, 16384, 2048), (968, 2048, 2560), (272, 2048, 512),
                                                         (768, 4304, 1152), (256, 1152, 3456)])
def test_products_of_the_library(rows, inner, features, merged, fast):
    from pi05_ros.backends.cuda.kernels.fp8_product import fp8_product
    from pi05_ros.backends.cuda.packing_fp8 import Fp8Linear

    x, weight = outliers(rows, inner), torch.randn(features, inner, device=DEVICE) * inner**-0.5
    low_x, low_w = to_fp8(x, scale_of(x)), to_fp8(weight, scale_of(weight))
    scale = scale_of(x) * scale_of(weight) * (1 + torch.rand(1, features if merged else 1, device=DEVICE))
    bias = torch.randn(features, device=DEVICE).to(BF16)
    out = fp8_product(low_x, Fp8Linear(low_w, torch.ones(1), scale, bias), fast)
    right = (low_x.float().double() @ low_w.float().double().T) * scale.double() + bias.double()
    error = relative_error(out, right)
    print(f"{rows} x {inner} x {features}, merged {merged}, fast {fast}: {error:.2e}")
    assert error < (2e-2 if fast else 4e-3)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("rows", "inner", "features"), [(968, 2048, 16384), (560, 2048, 16384), (272, 2048, 1024),
                                                         (40, 512, 128), (257, 512, 384), (7, 512, 128)])
def test_gated_product(rows, inner, features, portable):
    from pi05_ros.backends.cuda.kernels.fp8_gated_product import fits_hopper, gated_product_fp8
    from pi05_ros.backends.cuda.packing_fp8 import Fp8GateUp

    if not portable and not fits_hopper(features, inner, DEVICE):
        pytest.skip("the kernel is for compute capability 9.0")
    x, weight = outliers(rows, inner), torch.randn(2 * features, inner, device=DEVICE) * inner**-0.5
    low_x, low_w = to_fp8(x, scale_of(x)), to_fp8(weight, scale_of(weight))
    both = scale_of(x) * scale_of(weight)
    gate, up = (low_x.float() @ low_w.float().T).chunk(2, 1)
    right = F.gelu(gate * both, approximate="tanh") * up * (1.5 * both)
    factors = torch.cat([both, 1.5 * both, 0.7 * scale_of(right)])
    scratch, out = torch.empty(rows, 2 * features, device=DEVICE, dtype=BF16), room(rows, features)
    layer = Fp8GateUp(low_w, scale_of(x), factors, (torch.ones(1), None))
    results = []
    for _ in range(2):
        gated_product_fp8(low_x, layer, scratch, out[:rows], portable)
        results.append(out.view(torch.uint8).clone())
    assert torch.equal(*results) and (out[rows:].float() == BEYOND).all()
    error = relative_error(out[:rows].float() * factors[2], right.clamp(-448 * factors[2], 448 * factors[2]))
    exact = relative_error(to_fp8(right, factors[2:]).float() * factors[2], right.clamp(-448 * factors[2],
                                                                                     448 * factors[2]))
    print(f"{rows} x {inner} x {features}: error {error:.3e}, of the rounding alone {exact:.3e}")
    # Far down the unit's left side a step of the product is many of the result, which is small there.
    near(out[:rows], to_fp8(right, factors[2:]), least=0.95 if portable else 0.9, neighbours=0.995)
    assert error < 1.1 * exact


def test_the_embedding_is_read_from_pinned_memory():
    from pi05_ros.backends.cuda.kernels.prefix_input import fill

    table, images = outliers(1000, 2048), outliers(256, 2048)
    pinned = torch.empty(table.shape, dtype=BF16, pin_memory=True).copy_(table)
    source = torch.cat([torch.arange(256), -1 - torch.randint(1000, (200,))]).int().to(DEVICE)
    here, there = (torch.empty(456, 2048, device=DEVICE, dtype=BF16) for _ in range(2))
    fill(source, images, table, here)
    fill(source, images, pinned, there)
    assert torch.equal(here, there)


@dataclass
class Quantised:
    """A full-size model with outlier channels: before (float32), and quantised, by eager and by cuda, in bfloat16."""

    recipe: str
    truth: base.StageSet
    eager: base.StageSet
    cuda: base.StageSet


@pytest.fixture(scope="module")
def sources():
    source = OutlierSource(DeviceSource(Pi05Config()), 32.0)
    model = load(source, DEVICE, "bfloat16")
    statistics = calibrate(model, synthetic(source.config, 4, 0), {}, 4)
    made = {recipe: QuantisedSource.calibrated(source, model, RECIPES[recipe], statistics)
            for recipe in ("fp8_mlp", "fp8")}
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return made


@pytest.fixture(scope="module", params=["fp8_mlp", "fp8"])
def quantised(request, sources):
    source = sources[request.param]
    yield Quantised(request.param, base.build("eager", source.source, "cuda", "float32"),
                    base.build("eager", source, "cuda", "bfloat16"), base.build("cuda", source, "cuda", "bfloat16"))
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("cameras", "tokens", "seed"), [(3, 200, 1), (2, 48, 2), (1, 7, 3)])
def test_each_stage_is_as_near_to_the_model_as_eagers_quantised_run(quantised, cameras, tokens, seed):
    inputs = random_inputs(Pi05Config(), DEVICE, cameras, tokens, seed)
    right = StageTruth.of(quantised.truth, inputs, 10)
    ours, theirs = (stage_errors(stages, inputs, 10, right, "bfloat16") for stages in (quantised.cuda, quantised.eager))
    print(quantised.recipe, {stage: f"{error:.2e}, eager {theirs[stage]:.2e}" for stage, error in ours.items()})
    assert all(error <= 1.2 * theirs[stage] + 1e-6 for stage, error in ours.items()), (ours, theirs)
    first = run_stages(quantised.cuda, inputs, 10)
    whole, eagers = (relative_error(one, right.actions) for one in (first, run_stages(quantised.eager, inputs, 10)))
    assert whole <= 1.3 * eagers, (whole, eagers)
    assert torch.equal(first, run_stages(quantised.cuda, inputs, 10))


def test_the_kernels_in_fp8_are_those_that_the_backend_names(quantised):
    """Counted by the profiler: what rounds to e4m3, whose readers can be nothing but FP8 products."""
    config, runs = Pi05Config(), quantised.cuda.runs
    inputs = random_inputs(config, DEVICE, 3, 200, 0)
    tokens = quantised.cuda.vision.encode_images(quantised.cuda.images.prepare_images(inputs.frames)).clone()
    masks = (inputs.image_mask, inputs.tokens, inputs.token_mask)
    prefix = by_name(record(lambda: quantised.cuda.prefix.prefill(tokens, *masks), DEVICE, 1), 1)
    calls = {name: sum(one["calls"] for one in prefix if name in one["name"])
             for name in ("_norm_to_fp8", "_glu_to_fp8", "gate_up_fp8", "_activation_to_fp8")}
    in_fp8 = [name for name, how in runs.items() if how == "FP8" and name.startswith("language_model.")]
    layers = sum(name.endswith("mlp.gate_proj") for name in in_fp8)
    assert layers == 17 and calls["gate_up_fp8" if HOPPER else "_glu_to_fp8"] == layers
    assert calls["_norm_to_fp8"] == 2 * 17 + 1  # those of products in bfloat16, too, which take up the residual
    assert calls["_activation_to_fp8"] == sum(name.endswith("o_proj") for name in in_fp8)
    plain = quantised.truth.prefix.prefill(tokens.float(), *masks)
    found = quantised.cuda.prefix.prefill(tokens, *masks)
    assert relative_error(found.keys, plain.keys) > 5e-3  # coarser than bfloat16


@pytest.mark.parametrize(("keys", "steps", "size"), [(968, 10, 1.0), (300, 2, 0.1), (785, 5, 10.0), (257, 1, 1.0)])
def test_the_expert_in_fp8(quantised, keys, steps, size):
    """At other lengths than prefixes have, and noise of other sizes."""
    low = [name for name, how in quantised.cuda.runs.items() if how == "FP8" and name.startswith("action_expert.")]
    if not low:
        pytest.skip("the expert is in FP8 in recipe fp8, and there as one kernel alone, on Hopper")
    assert len(low) == 6 * 18 and not any(name.endswith("o_proj") for name in low)
    torch.manual_seed(keys)
    mask = torch.rand(1, keys, device=DEVICE) < 0.9
    mask[0, 0] = True
    rows = torch.randn(2, 18, 1, 1, keys, 256, device=DEVICE).to(BF16)
    cache, exact = PrefixCache(*rows, mask), PrefixCache(*rows.float(), mask)
    noise = size * torch.randn(1, 50, 32, device=DEVICE)
    wanted = quantised.truth.expert.denoise(exact, noise, steps)
    ours, theirs = (one.expert.denoise(cache, noise, steps) for one in (quantised.cuda, quantised.eager))
    error, bar = relative_error(ours, wanted), relative_error(theirs, wanted)
    print(f"{keys} keys, {steps} steps, noise {size}: error {error:.2e}, eager {bar:.2e}")
    assert error <= 1.2 * bar and torch.equal(ours, quantised.cuda.expert.denoise(cache, noise, steps))


def test_fp8_takes_no_more_than_its_goal(sources):
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    stages = base.build("cuda", sources["fp8"], "cuda", "bfloat16")
    run_stages(stages, random_inputs(Pi05Config(), DEVICE, 3, 200, 0), 50)
    taken = torch.cuda.max_memory_reserved() - before
    needed = checks.bytes_needed(Pi05Config(), list(base.STAGES), stages.runs, host_embedding=True)
    print(f"{taken / 1e9:.2f} GB taken, {needed / 1e9:.2f} counted")
    assert taken <= min(needed, 4.6e9)


def test_the_command_validates_the_backend():
    words = ["validate-quantized", "--backend", "cuda", "--device", "cuda", "--dtype", "bfloat16", "--samples", "2",
             "--count", "2", "--steps", "3", "--outliers", "32", "--recipe"]
    assert main([*words, "fp8_mlp"]) == 0
    assert main([*words, "fp8"]) == 1  # some layers are multiplied in bfloat16, and say so
