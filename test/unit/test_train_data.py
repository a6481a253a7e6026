"""Episodes on disk: there and back, statistics, encoding, and what is refused."""

import json

import numpy as np
import pytest
from toy_episodes import PROMPTS, TOY, one_thread, record, toy_episode  # noqa: F401 (one_thread is a fixture)

from pi05_ros.cli.main import main
from pi05_ros.errors import ConfigError
from pi05_ros.model.norm_stats import find_openpi_stats, read_openpi_stats
from pi05_ros.model.save import save_openpi
from pi05_ros.schema import Conventions
from pi05_ros.train.dataset import ARRAYS, INDEX, DatasetWriter, Episode, read_episodes, read_index
from pi05_ros.train.initial import initial_model
from pi05_ros.train.presets import smallest
from pi05_ros.train.samples import encode_episodes
from pi05_ros.train.statistics import action_chunk, dataset_stats, field_stats
from pi05_ros.train.tokenizer import STATE_PIECES, state_token_ids, train_tokenizer
from pi05_ros.transforms.prompt import PromptTokenizer
from pi05_ros.transforms.robot import RobotTransforms


def encoded(episodes, horizon=4):
    stats = dataset_stats(episodes, TOY, horizon)
    model = train_tokenizer(prompt for one in episodes for prompt in one.prompts)
    config = smallest(horizon, 704)
    transforms = RobotTransforms(TOY, Conventions(), stats, PromptTokenizer(model, config.max_token_len), config)
    frames = sum(len(one.images) for one in episodes)
    return encode_episodes(episodes, frames, ("base_0_rgb",), transforms, seed=0), transforms


def test_what_is_written_is_read(tmp_path):
    directory = record(tmp_path / "data", count=5)
    read = list(read_episodes(directory))
    assert len({entry["file"] for entry in read_index(directory)["episodes"]}) == 2  # 30 frames a file, 12 an episode
    for seed, episode in enumerate(read):
        written = toy_episode(seed)
        for name in ("images", "state", "actions", "frame_steps"):
            np.testing.assert_array_equal(getattr(episode, name), getattr(written, name))
        assert (episode.prompts, episode.task, episode.seed) == (written.prompts, "go", seed)


def test_a_recording_goes_on_where_it_stopped(tmp_path):
    record(tmp_path, count=3)
    with DatasetWriter(tmp_path, "toy", ("base_0_rgb",)) as writer:
        assert writer.recorded == 3
        writer.add(toy_episode(3))
    assert [episode.seed for episode in read_episodes(tmp_path)] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="robot of .*another directory"):
        DatasetWriter(tmp_path, "arm6", ("base_0_rgb",))


def test_an_interrupted_recording_leaves_what_was_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path, "toy", ("base_0_rgb",), frames_a_file=12) as writer:
        writer.add(toy_episode(0))
        writer._limit = 10**9
        writer.add(toy_episode(1))
        raise KeyboardInterrupt
    assert [episode.seed for episode in read_episodes(tmp_path)] == [0]


def test_frames_may_be_rarer_than_control_steps():
    state = np.linspace(-1, 1, 20, dtype=np.float32).reshape(10, 2)
    episode = toy_episode(0, steps=3, state=state, actions=state, frame_steps=np.array([0, 4, 8]))
    np.testing.assert_allclose(action_chunk(episode, 4, 3), state[4:7])
    np.testing.assert_allclose(action_chunk(episode, 8, 4), state[[8, 9, 9, 9]])  # the end repeats
    samples, transforms = encoded([episode])
    back = transforms.decode(samples.actions[1].numpy(), state[4])
    np.testing.assert_allclose(back, state[4:8], atol=1e-5)


def test_samples_are_what_inference_would_see():
    episodes = [toy_episode(seed, size=80) for seed in range(2)]
    samples, transforms = encoded(episodes)
    assert samples.images.shape == (24, 1, 56, 56, 3) and samples.actions.shape == (24, 4, 32)
    assert not samples.actions[..., 2:].any()
    ids = samples.tokens[samples.token_mask.cumsum(1) == samples.token_mask.cumsum(1)[:, -1:]]
    assert len(ids) >= 24 and samples.tokens.shape[1] < 48


def test_every_wording_is_used():
    wordings = ("go left", "move to the left side now")
    samples, _ = encoded([toy_episode(0, steps=30, prompts=wordings)])
    assert len(set(samples.token_mask.sum(dim=1).tolist())) == 2


def test_statistics_make_the_round_trip_through_a_checkpoint(tmp_path):
    episodes = [toy_episode(seed) for seed in range(4)]
    stats, config = dataset_stats(episodes, TOY, 4), smallest(4, 704)
    model = initial_model(config, 2, state_token_ids(train_tokenizer(PROMPTS)), seed=0)
    save_openpi(model, tmp_path, config, stats, asset_id="toy")
    read = read_openpi_stats(find_openpi_stats(tmp_path), "quantile")
    for field in ("state", "actions"):
        for kind in ("mean", "std", "q01", "q99"):
            np.testing.assert_array_equal(getattr(getattr(read, field), kind), getattr(getattr(stats, field), kind))


def test_quantiles_of_known_numbers():
    values = np.stack([np.arange(101.0), np.full(101, 3.0), np.r_[np.zeros(100), 1.0]], axis=1)
    stats = field_stats(values)
    np.testing.assert_allclose(stats.q01, [1.0, 2.99, -0.1])  # constant: 0.02 wide; mostly at rest: 0.2 of its range
    np.testing.assert_allclose(stats.q99, [99.0, 3.01, 0.1])
    np.testing.assert_allclose(stats.mean, [50.0, 3.0, 1 / 101])


def test_bounds_of_what_is_mostly_small_and_seldom_large_are_moved_together():
    rare = np.zeros((1000, 2))
    rare[::25, 0], rare[:, 1] = 1.0, np.linspace(-1, 1, 1000)  # 4 % of the rows; evenly spread: deviation 0.577
    plain, together = field_stats(rare), field_stats(rare, 1.2)
    np.testing.assert_allclose((plain.q99 - plain.q01) / 2, [0.5, 0.98], atol=1e-3)
    deviation = rare.std(axis=0)
    np.testing.assert_allclose(together.q01, [0.0, -1.2 * deviation[1]])  # never beyond the quantiles
    np.testing.assert_allclose(together.q99, [0.04 + 1.2 * deviation[0], 1.2 * deviation[1]])


def test_a_tokenizer_has_a_token_for_each_state_number():
    model = train_tokenizer(PROMPTS)
    assert model == train_tokenizer(reversed(PROMPTS))
    ids = state_token_ids(model)
    assert len(set(ids.tolist())) == len(STATE_PIECES) == 257
    state = np.array([-2.0, -1.0, 0.0, 1.0])
    tokens = PromptTokenizer(model, 48).tokenize("go left", state, "pi05")
    assert [i for i in tokens.ids.tolist() if i in ids] == ids[[0, 1, 129, 256]].tolist()
    with pytest.raises(ConfigError, match="prompts of the tokenizer"):
        train_tokenizer([])


@pytest.mark.parametrize(("changes", "words"), [
    ({"images": np.zeros((12, 56, 56, 3), np.uint8)}, "images of episode.*frames, cameras"),
    ({"images": np.zeros((12, 1, 56, 56, 3), np.float32)}, "float32"),
    ({"actions": np.full((12, 2), np.nan, np.float32)}, "actions.*finite"),
    ({"state": np.zeros((11, 2), np.float32)}, "11 steps"),
    ({"frame_steps": np.arange(12) + 1}, "frame_steps.*0 to 11"),
    ({"prompts": ()}, "prompts.*at least one"),
    ({"prompts": (" ",)}, "prompts.*none empty"),
])
def test_an_episode_that_does_not_fit_together_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        toy_episode(0, **changes)
    assert caught.value.way_out


def edit(directory, **changes):
    index = json.loads((directory / INDEX).read_text()) | changes
    (directory / INDEX).write_text(json.dumps(index))


ENTRY = {"file": "episodes_00000.npz", "frames": [0, 1], "steps": [0, 1], "prompts": ["go"], "task": "", "seed": 0}


@pytest.mark.parametrize(("damage", "words"), [
    (lambda d: (d / INDEX).unlink(), "readable JSON"),
    (lambda d: (d / INDEX).write_text("{"), "readable JSON"),
    (lambda d: edit(d, format=7), "format 2"),
    (lambda d: edit(d, episodes=[]), "at least one episode"),
    (lambda d: edit(d, episodes=[{"file": "x"}]), "'frames' of episode 0"),
    (lambda d: edit(d, episodes={"a": 1}), "at least one episode"),
    (lambda d: edit(d, episodes=[3]), "an object for episode 0"),
    (lambda d: edit(d, episodes=[ENTRY | {"frames": [0, "1"]}]), "'frames' of episode 0"),
    (lambda d: edit(d, episodes=[ENTRY | {"file": "../x.npz"}]), "'file' of episode 0"),
    (lambda d: edit(d, episodes=[ENTRY | {"prompts": [1]}]), "'prompts' of episode 0"),
    (lambda d: edit(d, cameras=["front"]), "cameras among"),
    (lambda d: edit(d, cameras=[["front"]]), "cameras among"),
    (lambda d: (d / INDEX).write_text("[" * 100_000), "readable JSON"),
    (lambda d: np.savez(d / "episodes_00000.npz", **dict.fromkeys(ARRAYS, np.zeros(()))), "single value"),
    (lambda d: np.save((d / "episodes_00000.npz").open("wb"), np.zeros(3)), "episodes_00000.npz"),
    (lambda d: (d / "episodes_00000.npz").unlink(), "episodes_00000.npz"),
    (lambda d: (d / "episodes_00000.npz").write_bytes(b"PK\x03\x04half"), "episodes_00000.npz"),
    (lambda d: np.savez(d / "episodes_00000.npz", images=np.zeros(3)), "frame_steps"),
    (lambda d: (d / "episodes_00001.npz").replace(d / "episodes_00000.npz"), "rows in the file"),
])
def test_a_damaged_data_set_is_refused(tmp_path, damage, words):
    record(tmp_path, count=4)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=words) as caught:
        list(read_episodes(tmp_path))
    assert caught.value.way_out


def test_the_wrong_robot_is_refused_by_the_command(tmp_path, capsys):
    record(tmp_path / "data")
    words = ["train", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(words) == 2  # the data set names a robot that is not there
    assert "robot 'toy'" in json.loads(capsys.readouterr().out)["message"]
    assert main([*words, "--robot", "arm6"]) == 2
    assert "left_wrist_0_rgb" in json.loads(capsys.readouterr().out)["message"]


def test_the_command_trains_in_pieces(tmp_path, capsys):
    arm6 = {"images": np.zeros((4, 2, 56, 56, 3), np.uint8), "state": np.zeros((4, 7), np.float32),
            "actions": np.zeros((4, 7), np.float32)}
    with DatasetWriter(tmp_path / "data", "arm6", ("base_0_rgb", "left_wrist_0_rgb")) as writer:
        writer.add(Episode(**arm6, prompts=("rest",)))
    words = ["train", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--config", "smallest", "--device",
             "cpu", "--horizon", "2", "--steps", "40", "--batch", "2"]
    assert main([*words, "--minutes", "1e-6"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(words) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (first["step"], first["finished"], second["step"], second["finished"]) == (20, False, 40, True)
    assert main(["inspect", first["checkpoint"]]) == 0
