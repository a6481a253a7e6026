"""Training: the loss by hand, learning, resuming, and the checkpoint it leaves."""

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_episodes import PROMPTS, TOY, one_thread, record, toy_episode  # noqa: F401 (one_thread is a fixture)

from pi05_ros.errors import CheckpointError, ConfigError
from pi05_ros.model.pi05 import PrefixCache
from pi05_ros.runtime.policy import Policy, draw_noise
from pi05_ros.schema import ACTION_DIM, Observation
from pi05_ros.train import run as training
from pi05_ros.train.augment import augment
from pi05_ros.train.dataset import DatasetWriter, read_index
from pi05_ros.train.flow_matching import Batch, PrefixHeads, draw_times, losses
from pi05_ros.train.presets import PRESETS, TrainSettings
from pi05_ros.train.samples import draw_batch
from pi05_ros.train.trainer import learning_rate_at

CPU = torch.device("cpu")
SETTINGS = TrainSettings(config="smallest", horizon=4, steps=300, batch=16, learning_rate=3e-3, warmup=20, ema=0.98,
                         augment=False)
FEW = replace(SETTINGS, steps=6, batch=4, augment=True)


@contextmanager
def no_bar(label):
    yield lambda done, total: None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return record(tmp_path_factory.mktemp("toy") / "data")


def train(data, output, settings, until=float("inf"), **options):
    prepared = training.prepare([data], TOY, settings, no_bar)
    return training.train(prepared, settings, output, CPU, no_bar, until, **options)


class StandIn:
    """Answers with what it was asked: v_t = x_t + t."""

    def encode_images(self, pixels):
        return None

    def prefill(self, image_tokens, image_mask, tokens, token_mask):
        assert image_mask.all() and image_mask.shape == (1, 2)

    def velocity(self, cache, x_t, t):
        self.x_t = x_t
        return x_t + t[..., None]


def test_the_loss_by_hand():
    """One sample, one step, two real dimensions and one of padding."""
    batch = Batch(torch.zeros(1, 2, 3, 8, 8), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool),
                  actions=torch.tensor([[[1.0, -1.0, 0.0]]]), goals=torch.tensor([[2.0, 1.0, 0.0]]),
                  scenes=torch.tensor([[0.5, 1.5]]),
                  noise=torch.tensor([[[3.0, 2.0, 9.0]]]), time=torch.tensor([0.25]))
    model = StandIn()
    guesses = torch.tensor([[0.0, 0.5]]), torch.tensor([[1.0, 3.0, 7.0]])
    flow, goal, scene = losses(model, lambda cache, slots: guesses, batch, robot_action_dim=2)
    # x = 0.25 noise + 0.75 action = 1.5 and -0.25; v = x + 0.25 = 1.75 and 0; noise - action = 2 and 3.
    assert model.x_t.tolist() == [[[1.5, -0.25, 0.0]]]
    assert flow.item() == pytest.approx((0.25**2 + 3**2) / 2)
    assert goal.item() == pytest.approx((1**2 + 2**2) / 2)
    assert scene.item() == pytest.approx((0.5**2 + 1) / 2)


def test_scene_and_goal_are_guessed_from_the_first_and_the_last_token_that_are_there():
    heads = PrefixHeads(PRESETS["smallest"](4, 64), 3)
    values = torch.randn(2, 3, 1, 5, 32)
    pad_mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    scene, goal = heads(PrefixCache(values, values, pad_mask), prompt_slots=4)
    for row, last in enumerate((3, 4, 1)):
        read, first = (torch.cat([values[:, row, 0, slot].flatten(), torch.ones(1)]) for slot in (last, 1))
        torch.testing.assert_close(goal[row], heads.goal_weight @ read)
        torch.testing.assert_close(scene[row], heads.scene_weight @ first)


def test_times_lean_towards_noise():
    times = draw_times(20_000, torch.Generator().manual_seed(0))
    assert times.min() >= 0.001 and times.max() <= 1.0
    assert times.mean().item() == pytest.approx(0.999 * 0.6 + 0.001, abs=0.01)  # of Beta(1.5, 1)
    assert (times < 0.5).float().mean().item() == pytest.approx((0.499 / 0.999) ** 1.5, abs=0.01)


def test_it_learns_and_the_ordinary_loader_gives_the_same_actions(data, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(training, "write_checkpoint", lambda trainer, *rest, write=training.write_checkpoint:
                        kept.append(trainer) or write(trainer, *rest))
    figures = train(data, tmp_path, SETTINGS, dtype="float32")
    assert figures["finished"] and figures["action_error"] < 0.12 and figures["goal_error"] < 0.12
    policy = Policy.load(tmp_path, robot=TOY)
    (trainer,) = kept
    model, _ = trainer.averaged()
    for seed in range(4):
        episode = toy_episode(seed)
        seen = Observation({"base_0_rgb": episode.images[0, 0]}, episode.state[0], episode.prompts[0])
        chunk = policy.infer(seen, chunk_index=0)
        assert np.abs(chunk.actions - episode.actions[:4]).max() < 0.3
        inputs = policy.transforms.encode(seen).trimmed()
        cache = model.prefill(model.encode_images(model.prepare_images(inputs.frames)),
                              *map(torch.from_numpy, (inputs.image_mask, inputs.tokens, inputs.token_mask)))
        noise = torch.from_numpy(draw_noise(policy.seed, 0, policy.config))
        np.testing.assert_allclose(chunk.normalised, model.denoise(cache, noise[None], 10)[0].numpy(), atol=1e-5)


def test_noise_in_the_padding_moves_nothing(data, tmp_path):
    train(data, tmp_path, FEW, dtype="float32")
    policy = Policy.load(tmp_path, robot=TOY)
    observation = Observation({"base_0_rgb": np.zeros((56, 56, 3), np.uint8)}, np.zeros(2, np.float32), PROMPTS[0])
    noise = draw_noise(0, 0, policy.config)
    other = np.where(np.arange(ACTION_DIM) < TOY.action_dim, noise, 5.0).astype(np.float32)
    first, second = (policy.infer(observation, noise=one).actions for one in (noise, other))
    np.testing.assert_array_equal(first, second)


def test_a_resumed_run_gives_the_same_bits(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECK_EVERY", 2)
    whole = train(data, tmp_path / "whole", FEW)
    pieces = [train(data, tmp_path / "pieces", FEW, until=0.0) for _ in range(3)]
    assert [piece["step"] for piece in pieces] == [2, 4, 6]
    assert [piece["finished"] for piece in pieces] == [False, False, True]
    assert whole["loss"] == pieces[-1]["loss"]
    one, other = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "pieces"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for file in ("tokenizer.model", "training.json", "assets/toy/norm_stats.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "pieces" / file).read_bytes()


def test_a_killed_run_leaves_weights_and_goes_on_from_its_last_save(data, tmp_path, monkeypatch):
    train(data, tmp_path / "whole", FEW)
    monkeypatch.setattr(training, "CHECK_EVERY", 2)
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0.0)
    advance = training.Trainer.advance

    def killed(trainer):
        if trainer.step == 5:
            raise KeyboardInterrupt
        return advance(trainer)

    with monkeypatch.context() as once:
        once.setattr(training.Trainer, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "killed", FEW)
    assert json.loads((tmp_path / "killed" / "training.json").read_text())["step"] == 4
    left = load_file(tmp_path / "killed" / "model.safetensors")
    resumed = train(data, tmp_path / "killed", FEW)
    assert resumed["step"] == 6
    ended, one = (load_file(tmp_path / run / "model.safetensors") for run in ("killed", "whole"))
    assert all(torch.equal(tensor, one[name]) for name, tensor in ended.items())
    assert not all(torch.equal(tensor, left[name]) for name, tensor in ended.items())


def test_a_run_is_not_resumed_as_another(data, tmp_path):
    train(data, tmp_path / "run", FEW)
    with pytest.raises(ConfigError, match="learning_rate.*0.003.*0.1.*--output"):
        train(data, tmp_path / "run", replace(FEW, learning_rate=0.1))
    more = record(tmp_path / "more", count=5)
    with pytest.raises(ConfigError, match="data of the run"):
        train(more, tmp_path / "run", FEW)
    (tmp_path / "run" / training.STATE).write_bytes(b"half")
    with pytest.raises(CheckpointError, match="Delete it"):
        train(data, tmp_path / "run", FEW)


def test_a_diverging_run_stops(data, tmp_path):
    with pytest.raises(ConfigError, match="Lower --learning-rate"):
        train(data, tmp_path, replace(FEW, learning_rate=1e30, warmup=0, steps=4))
    assert not (tmp_path / "model.safetensors").exists()


def test_held_out_episodes_are_measured_and_not_learnt(data, tmp_path):
    prepared = training.prepare([data], TOY, FEW, no_bar, held_out=1)
    assert (len(prepared.samples), len(prepared.held_out)) == (36, 12)
    figures = training.train(prepared, FEW, tmp_path, CPU, no_bar)
    assert figures["held_out_action_error"] > 0 and figures["held_out_goal_error"] > 0
    with pytest.raises(ConfigError, match="held out"):
        training.prepare([data], TOY, FEW, no_bar, held_out=4)


def test_several_data_sets_are_learnt_as_one(data, tmp_path):
    parts = []
    for seeds in ((0, 1), (2, 3)):
        parts.append(tmp_path / f"part_{seeds[0]}")
        with DatasetWriter(parts[-1], "toy", ("base_0_rgb",)) as writer:
            for seed in seeds:
                writer.add(toy_episode(seed))
    whole, both = (training.prepare(of, TOY, FEW, no_bar, held_out=1) for of in ([data], parts))
    for name in ("images", "tokens", "actions", "goals"):
        assert torch.equal(getattr(whole.samples, name), getattr(both.samples, name)), name
        assert torch.equal(getattr(whole.held_out, name), getattr(both.held_out, name)), name
    assert whole.identity != both.identity != training.prepare(parts[::-1], TOY, FEW, no_bar, held_out=1).identity
    with DatasetWriter(tmp_path / "other", "arm6", ("base_0_rgb",)) as writer:
        writer.add(toy_episode(0))
    with pytest.raises(ConfigError, match="robot of .*other: expected toy, as in"):
        training.prepare([*parts, tmp_path / "other"], TOY, FEW, no_bar)


def test_a_batch_depends_on_seed_and_step_alone(data):
    samples = training.prepare([data], TOY, FEW, no_bar).samples
    one, same, other = (draw_batch(samples, 4, 0, step, True) for step in (3, 3, 4))
    assert all(torch.equal(getattr(one, name), getattr(same, name)) for name in vars(one))
    assert not torch.equal(one.noise, other.noise) and not torch.equal(one.pixels, other.pixels)


def test_augmentation_changes_little_and_nothing_when_told_so():
    pixels = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    none = torch.tensor([-1.0, 0, 0, 0, 0, 0]).expand(2, -1)
    torch.testing.assert_close(augment(pixels, none), pixels, atol=1e-5, rtol=0)
    brighter = none.clone()
    brighter[1, 3] = 1.0
    changed = augment(pixels, brighter)
    torch.testing.assert_close(changed[0], pixels[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(changed[1], ((pixels[1] + 1) * 1.2 - 1).clamp(-1, 1), atol=1e-5, rtol=0)


def test_bfloat16_products_change_the_loss_a_little(data):
    prepared = training.prepare([data], TOY, FEW, no_bar)
    losses = [float(training.make_trainer(prepared, replace(FEW, precision=precision), CPU).advance()[0])
              for precision in ("float32", "bfloat16")]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_learning_rate_rises_and_falls():
    settings = TrainSettings(steps=110, warmup=10, learning_rate=1.0)
    rates = [learning_rate_at(step, settings) for step in (0, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0])


def test_presets_suit_every_backend():
    for name, preset in PRESETS.items():
        config = preset(50, 640)
        for width in (config.vision.width, config.prefix.width, config.expert.width, config.vision.mlp_dim,
                      config.prefix.mlp_dim, config.expert.mlp_dim, config.vision.num_patches):
            assert width % 64 == 0 or name == "smallest"
        assert config.prefix.head_dim == 32 and config.vision.width // config.vision.num_heads % 16 == 0
    shapes = training.parameter_counts(PRESETS["small"](50, 704))
    assert sum(shapes.values()) <= 7_500_000


@pytest.mark.parametrize(("field", "value"), [("config", "huge"), ("batch", 0), ("ema", 1.0), ("learning_rate", 0.0),
                                              ("precision", "float16"), ("warmup", -1)])
def test_wrong_settings_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        replace(SETTINGS, **{field: value})


def test_training_json_tells_how_it_was_made(data, tmp_path):
    train(data, tmp_path, FEW)
    made = json.loads((tmp_path / "training.json").read_text())
    assert (made["step"], made["seed"], made["robot"], made["steps"]) == (6, 0, "toy", 6)


def test_what_is_known_of_the_scene_is_learnt_scaled(tmp_path):
    scene = np.array([[5.0, 0.3]] * 12, np.float32)
    with DatasetWriter(tmp_path / "data", "toy", ("base_0_rgb",)) as writer:
        for seed in range(4):
            writer.add(toy_episode(seed, scene=scene * np.array([1, seed + 1], np.float32)))
    prepared = training.prepare([tmp_path / "data"], TOY, FEW, no_bar, held_out=1)
    learnt, unseen = prepared.samples.scenes, prepared.held_out.scenes
    assert learnt[:, 0].abs().max() < 0.01  # never changes
    assert learnt[:, 1].unique().tolist() == pytest.approx([-1.5**0.5, 0, 1.5**0.5], abs=1e-4)
    assert unseen[:, 1].unique().tolist() == pytest.approx([2 * 1.5**0.5], abs=1e-4)
    figures = training.train(prepared, replace(FEW, steps=60, learning_rate=3e-3), tmp_path / "run", CPU, no_bar)
    assert figures["scene_loss"] < 0.9 and figures["held_out_scene_error"] > 0


def test_an_episode_has_one_goal_and_guessing_their_mean_costs_one(data):
    prepared = training.prepare([data], TOY, SETTINGS, no_bar, held_out=1)
    goals = prepared.samples.goals[:, :TOY.action_dim]
    assert float(goals.square().mean()) == pytest.approx(1.0, rel=1e-5)
    assert float(goals.mean(dim=0).abs().max()) < 1e-5
    episodes = len(read_index(data)["episodes"])
    assert len(torch.unique(goals, dim=0)) <= episodes - 1
    assert len(torch.unique(prepared.held_out.goals, dim=0)) == 1
