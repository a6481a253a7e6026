"""The CUDA backend against float32 eager, on inputs nobody has seen: stages, totals, shapes, repeatability, memory."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch

from pi05_ros.backends import base
from pi05_ros.backends.cuda import checks
from pi05_ros.benchmark.error import relative_error, run_stages
from pi05_ros.benchmark.inputs import random_inputs
from pi05_ros.config import Pi05Config, tiny_config
from pi05_ros.errors import BackendError
from pi05_ros.model.recipe import DeviceSource, RecipeSource
from pi05_ros.schema import Guidance

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
SEEDS = np.random.SeedSequence()  # fresh in every run; a failure prints the seed it used


class Trio:
    """One model three times: float32 eager (the truth), bfloat16 eager (the bar), cuda."""

    def __init__(self, source):
        self.config = source.config
        self.truth = base.build("eager", source, "cuda", "float32")
        self.eager = base.build("eager", source, "cuda", "bfloat16")
        self.cuda = base.build("cuda", source, "cuda", "bfloat16")

    def inputs(self, cameras, tokens, seed):
        return random_inputs(self.config, DEVICE, cameras, tokens, seed)


@pytest.fixture(scope="module")
def tiny():
    return Trio(RecipeSource(tiny_config()))


@pytest.fixture(scope="module", params=[50, 10, 15], ids="horizon {}".format)
def full(request):
    trio = Trio(DeviceSource(Pi05Config(action_horizon=request.param)))
    yield trio
    del trio
    torch.cuda.empty_cache()


def errors(trio, inputs, steps):
    truth = run_stages(trio.truth, inputs, steps)
    return tuple(relative_error(run_stages(stages, inputs, steps), truth) for stages in (trio.cuda, trio.eager))


def fresh_cases(config, count):
    rng = np.random.default_rng(SEEDS.spawn(1)[0])
    for _ in range(count):
        cameras, tokens = rng.integers(1, config.num_cameras + 1), rng.integers(1, config.max_token_len + 1)
        yield int(cameras), int(tokens), int(rng.integers(1, 21)), int(rng.integers(2**31))


def test_tiny_model_is_no_further_from_float32_than_eager(tiny):
    ours, theirs = np.array([errors(tiny, tiny.inputs(c, t, s), n) for c, t, n, s in fresh_cases(tiny.config, 8)]).T
    assert np.median(ours) <= 1.2 * np.median(theirs) and (ours <= 2 * theirs).all(), (ours, theirs)


def test_full_size_is_no_further_from_float32_than_eager(full):
    for cameras, tokens, steps, seed in fresh_cases(full.config, 8):
        ours, theirs = errors(full, full.inputs(cameras, tokens, seed), steps)
        assert ours <= 1.2 * theirs, (cameras, tokens, steps, seed)


def guided_actions(stages, inputs, steps, guidance):
    cache = stages.prefix.prefill(stages.vision.encode_images(stages.images.prepare_images(inputs.frames)),
                                  inputs.image_mask, inputs.tokens, inputs.token_mask)
    return stages.expert.denoise(cache, inputs.noise, steps, guidance=guidance)


def test_guided_chunks_are_no_further_from_float32_than_eagers(full):
    rng, horizon = np.random.default_rng(SEEDS.spawn(1)[0]), full.config.action_horizon
    for (cameras, tokens, steps, seed), schedule in zip(fresh_cases(full.config, 4), ("linear", "exp", "ones", "zeros"),
                                                        strict=True):
        previous = rng.standard_normal((1, horizon, full.config.action_dim), dtype=np.float32)
        guidance = Guidance(previous, delay=int(rng.integers(1, 6)), end=int(rng.integers(5, horizon + 1)),
                            schedule=schedule)
        inputs = full.inputs(cameras, tokens, seed)
        truth, theirs, ours = (guided_actions(s, inputs, steps, guidance) for s in (full.truth, full.eager, full.cuda))
        assert relative_error(ours, truth) <= 1.2 * relative_error(theirs, truth), (cameras, tokens, steps, seed)
        free = run_stages(full.cuda, inputs, steps)  # a chunk without guidance after one with it
        assert relative_error(free, truth) > 0.01 and torch.equal(free, run_stages(full.cuda, inputs, steps))


def test_each_stage_is_no_further_from_float32_than_eager(full):
    """Each stage on the truth's own input to it."""
    inputs = full.inputs(3, 137, int(SEEDS.generate_state(1)[0]))
    masks = (inputs.image_mask, inputs.tokens, inputs.token_mask)
    pixels = full.truth.images.prepare_images(inputs.frames)
    tokens = full.truth.vision.encode_images(pixels)
    cache = full.truth.prefix.prefill(tokens, *masks)
    actions = full.truth.expert.denoise(cache, inputs.noise, 10)
    half = type(cache)(cache.keys.bfloat16(), cache.values.bfloat16(), cache.pad_mask)

    def stage_errors(stages):
        prefix = stages.prefix.prefill(tokens.bfloat16(), *masks)
        return np.array([relative_error(stages.vision.encode_images(pixels), tokens),
                         relative_error(prefix.keys, cache.keys), relative_error(prefix.values, cache.values),
                         relative_error(stages.expert.denoise(half, inputs.noise, 10), actions)])

    ours, theirs = stage_errors(full.cuda), stage_errors(full.eager)
    assert (ours <= 1.2 * theirs).all(), (ours, theirs)


def test_masked_cameras_and_padding_do_not_matter(tiny):
    inputs = tiny.inputs(3, 40, 5)
    inputs.image_mask[0, 0] = False
    inputs.token_mask[0, 23:] = False
    ours, theirs = errors(tiny, inputs, 4)
    first = run_stages(tiny.cuda, inputs, 4)
    inputs.tokens[0, 23:] = 77
    inputs.frames[0][:] = 255 - inputs.frames[0]
    assert ours <= 2 * theirs and torch.equal(first, run_stages(tiny.cuda, inputs, 4))


def test_after_the_first_chunk_no_other_compiles_a_kernel(tiny, monkeypatch):
    from triton import knobs

    from pi05_ros.backends.cuda.kernels.prefix_input import plan

    run_stages(tiny.cuda, tiny.inputs(tiny.config.num_cameras, tiny.config.max_token_len, 1), 10)
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda *args, **kwargs: compiled.append(kwargs["repr"]))
    for cameras in range(1, tiny.config.num_cameras + 1):
        for tokens in {1, 2, 3, 7, 8, 15, 16, 17, tiny.config.max_token_len}:
            for steps in (1, 2, 16):
                run_stages(tiny.cuda, tiny.inputs(cameras, min(tokens, tiny.config.max_token_len), 1), steps)
    assert not compiled
    room = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    plan(room[:1].bool(), room[:3].bool(), room[:3].long(), 7, room, room.byte(), room)  # seen, where there is one
    assert len(compiled) == 1 and "_plan" in compiled[0]


def test_runs_repeat_bit_for_bit_whatever_ran_between(tiny):
    inputs, other = tiny.inputs(3, 48, 1), tiny.inputs(1, 3, 2)
    first = run_stages(tiny.cuda, inputs, 10)
    run_stages(tiny.cuda, other, 3)
    assert torch.equal(first, run_stages(tiny.cuda, inputs, 10))


@pytest.mark.parametrize("choice", ["vision=cuda", "prefix=cuda", "expert=cuda", "prefix=cuda,expert=cuda"])
def test_stages_mix_with_eager(tiny, choice):
    inputs = tiny.inputs(2, 20, 3)
    mixed = base.build(choice, RecipeSource(tiny_config()), "cuda", "bfloat16")
    assert relative_error(run_stages(mixed, inputs, 5), run_stages(tiny.truth, inputs, 5)) < 1e-2


def test_full_size_never_takes_more_than_eight_gigabytes():
    """Of everything PyTorch holds, from loading to actions; and no more than was asked for."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    source = DeviceSource(Pi05Config())
    stages = base.build("cuda", source, "cuda", "bfloat16")
    run_stages(stages, random_inputs(source.config, DEVICE, 3, 200, 0), 50)
    taken = torch.cuda.max_memory_reserved() - before
    assert taken <= checks.bytes_needed(source.config, list(base.STAGES)) <= 8e9


def test_refuses_what_it_cannot_do(tiny):
    inputs = tiny.inputs(1, 8, 0)
    with pytest.raises(BackendError, match="dtype bfloat16"):
        base.build("cuda", RecipeSource(tiny_config()), "cuda", "float32")
    pixels = tiny.cuda.images.prepare_images(inputs.frames)
    with pytest.raises(BackendError, match="batch of images"):
        tiny.cuda.vision.encode_images(pixels.repeat(2, 1, 1, 1, 1))
    cache = tiny.cuda.prefix.prefill(tiny.cuda.vision.encode_images(pixels), inputs.image_mask, inputs.tokens,
                                     inputs.token_mask)
    guidance = Guidance(np.zeros((1, 10, 32), np.float32), delay=1, end=5)
    for wrong, match in ((replace(guidance, jacobian="vjp"), "identity Jacobian"),
                         (replace(guidance, previous=guidance.previous[:, :5]), "previous chunk")):
        with pytest.raises(BackendError, match=match):
            tiny.cuda.expert.denoise(cache, inputs.noise, 5, guidance=wrong)
    with pytest.raises(BackendError, match="num_steps"):
        tiny.cuda.expert.denoise(cache, inputs.noise, 51)
