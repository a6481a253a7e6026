"""The forward beyond the recorded cases: shortcuts, batches, precisions, shapes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pi05_ros.config import GemmaConfig, Pi05Config, tiny_config
from pi05_ros.errors import ConfigError
from pi05_ros.model import weights
from pi05_ros.model.recipe import RecipeSource
from pi05_ros.schema import ModelInputs


@pytest.fixture(scope="module")
def model():
    return weights.load(RecipeSource(tiny_config()))


def random_inputs(batch, image_mask, lengths, seed=0):
    rng = np.random.default_rng(seed)
    frames = [rng.integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8) for _ in image_mask[0]]
    token_mask = np.arange(48)[None] < np.array(lengths)[:, None]
    tokens = np.where(token_mask, rng.integers(3, 512, (batch, 48)), 0)
    return ModelInputs(frames, np.array(image_mask, bool), tokens, token_mask,
                       rng.uniform(-1, 1, (batch, 32)).astype(np.float32))


@torch.no_grad()
def forward(model, inputs, noise, steps=3):
    tokens = model.encode_images(model.prepare_images(inputs.frames))
    cache = model.prefill(tokens, torch.tensor(inputs.image_mask), torch.tensor(inputs.tokens),
                          torch.tensor(inputs.token_mask))
    return model.denoise(cache, noise, steps, torch.tensor(inputs.state))


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("image_mask", "lengths", "cameras", "slots"), [
    ([[1, 1, 0]], [17], 2, 17),
    ([[0, 1, 0]], [1], 1, 1),
    ([[1, 0, 1]], [48], 2, 48),
    ([[1, 0, 0], [0, 0, 1]], [5, 31], 2, 31),
])
def test_dropping_masked_cameras_and_padding_gives_the_same_actions(model, image_mask, lengths, cameras, slots):
    inputs, noise = random_inputs(len(lengths), image_mask, lengths), torch.randn(len(lengths), 10, 32)
    trimmed = inputs.trimmed()
    assert (len(trimmed.frames), trimmed.tokens.shape[1]) == (cameras, slots)
    assert relative(forward(model, trimmed, noise), forward(model, inputs, noise)) < 1e-6


def test_what_stands_in_masked_slots_does_not_matter(model):
    inputs, noise = random_inputs(1, [[1, 1, 0]], [10]), torch.randn(1, 10, 32)
    other = replace(inputs, frames=[*inputs.frames[:2], 255 - inputs.frames[2]],
                    tokens=np.where(inputs.token_mask, inputs.tokens, 77))
    assert torch.equal(forward(model, other, noise), forward(model, inputs, noise))


def test_a_batch_gives_what_its_members_give_alone(model):
    both, noise = random_inputs(2, [[1, 1, 1], [1, 0, 1]], [48, 20]), torch.randn(2, 10, 32)
    together = forward(model, both, noise)
    for i in range(2):
        one = ModelInputs([f[i:i + 1] for f in both.frames], both.image_mask[i:i + 1], both.tokens[i:i + 1],
                          both.token_mask[i:i + 1], both.state[i:i + 1])
        assert relative(forward(model, one, noise[i:i + 1]), together[i:i + 1]) < 1e-5


def test_one_flow_time_a_token_agrees_with_one_for_all(model):
    inputs, noise = random_inputs(1, [[1, 1, 1]], [20]), torch.randn(1, 10, 32)
    with torch.no_grad():
        cache = model.prefill(model.encode_images(model.prepare_images(inputs.frames)), torch.tensor(inputs.image_mask),
                              torch.tensor(inputs.tokens), torch.tensor(inputs.token_mask))
        one = model.velocity(cache, noise, torch.tensor(0.3))
        each = model.velocity(cache, noise, torch.full((1, 10), 0.3))
    torch.testing.assert_close(one, each, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"action_horizon": 15}, {"num_cameras": 1}, {"num_cameras": 4},
                                     {"max_token_len": 8}])
def test_shapes_come_from_the_configuration(changes):
    config = tiny_config(**changes)
    inputs = random_inputs(1, [[1] * config.num_cameras], [8])
    inputs = replace(inputs, tokens=inputs.tokens[:, :config.max_token_len],
                     token_mask=inputs.token_mask[:, :config.max_token_len])
    actions = forward(weights.load(RecipeSource(config)), inputs, torch.randn(1, config.action_horizon, 32))
    assert actions.shape == (1, config.action_horizon, 32) and torch.isfinite(actions).all()


def test_bfloat16_keeps_the_parts_in_float32_that_the_reference_keeps():
    model = weights.load(RecipeSource(tiny_config()), dtype="bfloat16")
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert "vision_tower.embeddings.patch_embedding.weight" in kept
    assert "action_expert.layers.0.input_layernorm.dense.weight" in kept
    assert "language_model.norm.weight" in kept and "time_mlp_in.weight" in kept
    assert not {n for n in kept if "q_proj" in n or "mlp.gate" in n or "layer_norm1" in n or "projector" in n}


def test_only_the_stages_asked_for_take_memory():
    model = weights.load(RecipeSource(tiny_config()), stages=["vision"])
    assert not model.projector.weight.is_meta and model.action_in_proj.weight.is_meta
    assert all(p.is_meta for p in model.language_model.parameters())


def test_full_size_has_the_parameters_of_the_paper():
    with torch.device("meta"):
        from pi05_ros.model.pi05 import Pi05
        model = Pi05(Pi05Config())
    assert sum(p.numel() for p in model.parameters()) == 3_353_433_872


def test_refuses_experts_of_unequal_depth():
    with pytest.raises(ConfigError, match="depth of prefix and expert"):
        Pi05Config(expert=GemmaConfig(width=1024, mlp_dim=4096, depth=17))
