"""Policy.infer on the embedded tiny model: the whole path without ROS."""

import numpy as np
import pytest

from pi05_ros.backends import base
from pi05_ros.errors import BackendError, ConfigError, ObservationError
from pi05_ros.runtime.pipelined import Pipeline
from pi05_ros.runtime.policy import Policy, draw_noise
from pi05_ros.runtime.sequential import Sequential
from pi05_ros.schema import CAMERAS, Guidance, Observation


@pytest.fixture(scope="module")
def policy():
    return Policy.load(robot="arm6", seed=3)


def observation(**changes):
    rng = np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for camera in CAMERAS}
    return Observation(**{**dict(images=images, state=np.zeros(7, np.float32), prompt="pick", stamp_ns=5), **changes})


def test_an_observation_becomes_a_chunk_in_the_robots_units(policy):
    chunk = policy.infer(observation(), num_steps=2)
    assert chunk.actions.shape == (50, 7) and chunk.normalised.shape == (50, 32)
    assert chunk.actions.dtype == np.float32 and np.isfinite(chunk.actions).all()
    assert (chunk.stamp_ns, chunk.prompt, chunk.num_steps, chunk.seed) == (5, "pick", 2, 3)
    assert chunk.control_period_s == pytest.approx(0.02)
    assert set(chunk.stage_times_ms) == {"transform", "images", "vision", "prefix", "expert", "inverse", "total"}


def test_the_same_seed_and_index_make_the_same_chunk_again(policy):
    first = policy.infer(observation(), 2, seed=1, chunk_index=7)
    again = policy.infer(observation(), 2, seed=1, chunk_index=7)
    other = policy.infer(observation(), 2, seed=1, chunk_index=8)
    np.testing.assert_array_equal(first.normalised, again.normalised)
    assert not np.array_equal(first.normalised, other.normalised)


def test_warming_up_leaves_no_trace_in_what_follows(policy):
    fresh = Policy.load(robot="arm6", seed=3)
    fresh.warm_up()
    np.testing.assert_array_equal(fresh.infer(observation(), 2).normalised,
                                  policy.infer(observation(), 2, chunk_index=0).normalised)


def test_given_noise_replaces_the_drawn_one(policy):
    noise = draw_noise(1, 7, policy.config)
    given = policy.infer(observation(), 2, noise=noise)
    drawn = policy.infer(observation(), 2, seed=1, chunk_index=7)
    np.testing.assert_array_equal(given.normalised, drawn.normalised)
    assert given.noise_given and not drawn.noise_given


@pytest.mark.parametrize("change", ["prompt", "state", "images"])
def test_everything_in_the_observation_matters(policy, change):
    base_case = policy.infer(observation(), 2, chunk_index=0).normalised
    changed = {"prompt": "drop", "state": np.full(7, 0.02, np.float32),
               "images": {camera: np.zeros((48, 64, 3), np.uint8) for camera in CAMERAS}}[change]
    other = policy.infer(observation(**{change: changed}), 2, chunk_index=0).normalised
    assert not np.allclose(other, base_case, atol=1e-4)


def test_guidance_pulls_the_first_actions_towards_the_previous_chunk(policy):
    previous = np.zeros((1, 50, 32), np.float32)
    free = policy.infer(observation(), 10, chunk_index=0).normalised
    guided = policy.infer(observation(), 10, chunk_index=0, guidance=Guidance(previous, 5, 40)).normalised
    assert np.abs(guided[:5]).mean() < 0.5 * np.abs(free[:5]).mean()


def test_a_trained_prefix_is_part_of_the_chunk_and_changes_the_rest(policy):
    previous = draw_noise(9, 0, policy.config)[None] * np.float32(0.1)
    free, given, other = (policy.infer(observation(), 3, chunk_index=0, guidance=guidance).normalised for guidance in (
        None, Guidance(previous, 5, 50, trained=True), Guidance(-previous, 5, 50, trained=True)))
    np.testing.assert_array_equal(given[:5], previous[0, :5])
    assert not np.allclose(given[5:], free[5:], atol=1e-4) and not np.allclose(given[5:], other[5:], atol=1e-4)
    none = policy.infer(observation(), 3, chunk_index=0, guidance=Guidance(previous, 0, 50, trained=True)).normalised
    np.testing.assert_allclose(none, free, atol=1e-5)  # one time a row is the same model


def test_chunks_follow_each_other_in_overlap_or_one_by_one(policy):
    assert isinstance(policy.pipeline(True), Pipeline) and isinstance(policy.pipeline(False), Sequential)
    assert policy.sensors()() == {}  # on a CPU


@pytest.mark.parametrize("steps", [0, 51])
def test_refuses_a_number_of_steps_out_of_range(policy, steps):
    with pytest.raises(ConfigError, match="denoising_steps"):
        policy.infer(observation(), steps)


def test_refuses_noise_of_another_shape(policy):
    with pytest.raises(ConfigError, match="noise"):
        policy.infer(observation(), 2, noise=np.zeros((10, 32), np.float32))


@pytest.mark.parametrize("state", [np.full(7, np.nan, np.float32), np.zeros(6, np.float32)])
def test_refuses_a_state_that_is_not_usable(policy, state):
    with pytest.raises(ObservationError):
        policy.infer(observation(state=state), 2)


@pytest.mark.parametrize("frame", [np.zeros((0, 64, 3), np.uint8), np.zeros((48, 64), np.uint8),
                                   np.zeros((48, 64, 3), np.float32)])
def test_refuses_a_frame_that_is_no_picture(policy, frame):
    images = {**observation().images, CAMERAS[1]: frame}
    with pytest.raises(ObservationError, match=CAMERAS[1]):
        policy.infer(observation(images=images), 2)


def test_non_finite_actions_never_leave_the_policy(policy):
    noise = draw_noise(0, 0, policy.config)
    noise[3, 2] = np.nan
    with pytest.raises(ObservationError, match="finite"):
        policy.infer(observation(), 2, noise=noise)


@pytest.mark.parametrize("robot", ["libero", "droid", "droid_jointpos", "aloha", "arm6"])
def test_every_robot_of_the_package_runs(robot):
    policy = Policy.load(robot=robot)
    state = np.array([0.5 * (j.lower + j.upper) for j in policy.robot.joints] or [0.0] * policy.robot.state_dim)
    images = {camera: np.full((30, 40, 3), 90, np.uint8) for camera in policy.robot.cameras}
    chunk = policy.infer(Observation(images, state.astype(np.float32), "go"), 1)
    assert chunk.actions.shape == (50, policy.robot.action_dim) and np.isfinite(chunk.actions).all()


def test_backends_are_chosen_by_name_and_per_stage():
    assert set(base.parse_choice("eager").values()) == {"eager"}
    assert base.parse_choice("vision=eager,expert=eager")["prefix"] == "eager"


@pytest.mark.parametrize(("choice", "says"), [
    ("fast", "no backend 'fast'"), ("vision=openvino", "no backend 'openvino'"),
    ("sight=eager", "expected stages among"),
])
def test_a_backend_that_is_not_there_is_refused_by_name(choice, says):
    with pytest.raises(BackendError, match=says):
        base.parse_choice(choice)


@pytest.mark.parametrize("device", ["cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(BackendError, match="device"):
        base.check_device(device)


def test_a_precision_that_is_not_offered_is_refused():
    with pytest.raises(ConfigError, match="float16"):
        Policy.load(dtype="float16")
