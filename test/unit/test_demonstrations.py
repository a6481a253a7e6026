"""Cameras, recorded demonstrations, `pi05 collect`."""

import json
from dataclasses import replace

import numpy as np
import pytest
from rendering import seen_world  # noqa: F401 (a fixture)

from pi05_ros.cli.main import main
from pi05_ros.errors import ConfigError
from pi05_ros.schema import CAMERAS
from pi05_ros.sim.demonstrations import Recording, demonstrations, seeded_task
from pi05_ros.sim.expert import FORK_M, ScriptedExpert
from pi05_ros.sim.kinematics import TipKinematics
from pi05_ros.sim.tasks import COLOURS, HELD_OUT_SEEDS, Task, parse_kinds
from pi05_ros.sim.world import BLOCK_HEIGHT_M, TabletopWorld
from pi05_ros.train.dataset import read_episodes
from pi05_ros.transforms.images import resize_with_pad

UNDISTURBED = Recording(image_size=56, frame_every=5, astray=0, pushed=0, looks=False)


def test_the_cameras_show_the_blocks_and_vary_with_the_seed(seen_world):  # noqa: F811
    seen_world.reset(3, Task("touch", "red"))
    images = seen_world.observe().images
    assert list(images) == list(CAMERAS)
    assert all(image.shape == (224, 224, 3) and image.dtype == np.uint8 for image in images.values())
    for camera in ("base_0_rgb", "right_wrist_0_rgb"):
        red, green, blue = images[camera].astype(int).transpose(2, 0, 1)
        for block in (red - np.maximum(green, blue), green - np.maximum(red, blue), blue - np.maximum(red, green)):
            assert (block > 40).sum() > 30  # pixels of a block 4 cm wide
    np.testing.assert_array_equal(seen_world.observe().images["base_0_rgb"], images["base_0_rgb"])
    seen_world.reset(4, Task("touch", "red"))
    assert np.abs(seen_world.observe().images["base_0_rgb"].astype(int) - images["base_0_rgb"]).mean() > 5


def test_a_demonstration_is_what_the_policy_would_see_and_should_do(seen_world):  # noqa: F811
    ((_, episode),) = demonstrations(UNDISTURBED, range(2, 3))
    task = seen_world.reset(2)
    assert task == seeded_task(2, parse_kinds(None)) and task.prompt in episode.prompts and episode.task == task.kind
    assert episode.frame_steps.tolist() == list(range(0, len(episode.actions), 5))
    for step in range(11):
        np.testing.assert_array_equal(episode.state[step], seen_world.state)
        if step % 5 == 0:
            np.testing.assert_allclose(episode.scene[step // 5], seen_world.blocks.position.flatten(), atol=1e-6)
            image = seen_world.observe().images["base_0_rgb"]
            np.testing.assert_array_equal(episode.images[step // 5, 0], resize_with_pad(image, 56))
        np.testing.assert_array_equal(episode.actions[step], seen_world.command.astype(np.float32))
        seen_world.step(episode.actions[step + 1])
    np.testing.assert_array_equal(episode.actions[-1], episode.actions[-2])  # ends at rest


def test_disturbed_demonstrations_record_the_way_back(seen_world):  # noqa: F811
    still, looking, pushed = (next(demonstrations(replace(UNDISTURBED, **changes), range(2, 3)))[1]
                              for changes in ({}, {"looks": True}, {"pushed": 1.0}))
    for one in (looking, pushed):
        np.testing.assert_array_equal(one.actions, still.actions)
    off = np.abs(pushed.state - still.state)[:, :6].max(axis=0)
    assert (off > 0.002).all() and (off < 0.1).all()  # rad
    np.testing.assert_array_equal(looking.state, still.state)
    np.testing.assert_array_equal(looking.images[0], still.images[0])  # as an evaluation begins
    changed = np.abs(looking.images.astype(int) - still.images).mean(axis=(2, 3, 4))
    assert (changed[1:] > 2).all()


def test_a_fork_is_decided_over_the_block(seen_world):  # noqa: F811
    """Both ways of `sideways` share the motion to a place over the block; from there their mean comes down on it."""
    tips, block = TipKinematics(seen_world), COLOURS.index("red")
    seen_world.reset(5, Task("sideways", "red"))
    (x, y), paths = seen_world.blocks.position[block], {}
    for seed in range(8):
        plan = ScriptedExpert(seen_world).plan(np.random.default_rng(seed))
        path = np.array([tips.tip(target[:6]) for target in plan])
        paths[np.sign(path[-1, 1] - y)] = path
    left, right = paths[1.0], paths[-1.0]
    over = int(np.argmin(np.linalg.norm(left - [x, y, FORK_M], axis=1)))
    np.testing.assert_allclose(left[:over], right[:over], atol=1e-3)
    middle = (left[over:over + 25] + right[over:over + 25]) / 2
    low = middle[middle[:, 2] < BLOCK_HEIGHT_M]
    assert len(low) and (np.abs(low[:, :2] - [x, y]) < 0.02).all()


def test_half_of_the_demonstrations_begin_anywhere(seen_world):  # noqa: F811
    tips = TipKinematics(seen_world)

    def begins(astray):
        recording = Recording(image_size=28, frame_every=99, astray=astray)
        return {seed: tips.tip(one.state[0, :6].astype(float))
                for seed, one in demonstrations(recording, range(12)) if one is not None}

    home, anywhere, mixed = begins(0.0), begins(1.0), begins(0.5)
    assert min(len(tips) for tips in (home, anywhere, mixed)) >= 10  # a disturbed one may fail
    assert all(z > 0.1 for _, _, z in home.values())
    _, y, z = np.array(list(anywhere.values())).T
    assert (z < 0.12).all() and np.ptp(z) > 0.02 and np.ptp(y) > 0.1
    both = home.keys() & mixed.keys()
    assert 0 < sum(np.abs(mixed[seed] - home[seed]).max() > 1e-6 for seed in both) < len(both)


def test_collecting_again_goes_on_and_processes_change_nothing(seen_world, tmp_path, capsys):  # noqa: F811
    def collect(name, episodes, workers):
        options = ["--image-size", "28", "--frame-every", "20", "--tasks", "touch,forward"]
        assert main(["collect", str(tmp_path / name), "--episodes", str(episodes), "--workers", str(workers),
                     *options]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    collect("pieces", 2, 1)
    assert collect("pieces", 5, 1)["next_seed"] == collect("whole", 5, 2)["next_seed"] == 5
    pieces, whole = (list(read_episodes(tmp_path / name)) for name in ("pieces", "whole"))
    assert len(pieces) == len(whole) == 5 and {one.task for one in whole} == {"touch", "forward"}
    for one, other in zip(pieces, whole, strict=True):
        assert (one.seed, one.prompts) == (other.seed, other.prompts)
        for name in ("images", "state", "actions", "frame_steps"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_a_failed_demonstration_is_none(seen_world, monkeypatch):  # noqa: F811
    monkeypatch.setattr(TabletopWorld, "step", lambda self, target: "failure")
    assert list(demonstrations(Recording(frame_every=50), range(1))) == [(0, None)]


def test_held_out_seeds_are_refused(tmp_path, capsys):
    assert main(["collect", str(tmp_path / "data"), "--first-seed", str(HELD_OUT_SEEDS[0])]) == 2
    assert "those above are for evaluation" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


def test_kinds_are_checked():
    assert parse_kinds("forward, touch") == ("touch", "forward")
    with pytest.raises(ConfigError, match="'pull'"):
        parse_kinds("touch,pull")
    assert {seeded_task(seed, ("left",)).colour for seed in range(40)} == set(COLOURS)
