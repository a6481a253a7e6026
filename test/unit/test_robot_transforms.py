import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pi05_ros.config import tiny_config
from pi05_ros.errors import ConfigError, ObservationError
from pi05_ros.schema import CAMERAS, Conventions, FieldStats, NormStats, Observation
from pi05_ros.transforms.prompt import PromptTokenizer
from pi05_ros.transforms.robot import PromptTruncated, RobotTransforms, camera_order
from pi05_ros.transforms.robot_file import CameraSpec, ControllerSpec, JointSpec, Robot
from pi05_ros.transforms.robot_loader import load_robot
from pi05_ros.transforms.tiny_tokenizer import tiny_tokenizer

CONFIG = tiny_config()
FRAME = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
LIFT = JointSpec("lift", -10.0, 10.0, 1.0, delta=True)
GRIP = JointSpec("grip", 0.0, 0.8, 1.0, scale=0.8)
# Two joints: numbers are position and opening / 0.8; the model's are (lift - lift now) / 2 and 2 * opening number - 1.
STATS = NormStats(state=FieldStats(q01=np.array([-4.0, 0.0]), q99=np.array([4.0, 1.0])),
                  actions=FieldStats(q01=np.array([-2.0, 0.0]), q99=np.array([2.0, 1.0])))


def two_joints(**changes):
    fields = dict(name="two", action_meaning="joint_position", control_rate_hz=10.0, state_dim=2, action_dim=2,
                  joints=(LIFT, GRIP), controllers=(ControllerSpec("trajectory", ("lift", "grip")),),
                  cameras={"base_0_rgb": CameraSpec(), "left_wrist_0_rgb": CameraSpec(required=False)})
    return Robot(**{**fields, **changes})


def transforms(robot=None, conventions=None, stats=STATS, config=CONFIG, max_token_len=48):
    tokenizer = PromptTokenizer(tiny_tokenizer(), max_token_len)
    return RobotTransforms(robot or two_joints(), conventions or Conventions(), stats, tokenizer, config)


def observation(state=(2.0, 0.4), prompt="pick", **images):
    return Observation(images=images or {"base_0_rgb": FRAME}, state=np.array(state, np.float32), prompt=prompt)


def text_of(inputs):
    import sentencepiece
    model = sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer())
    return model.decode([int(i) for i in inputs.tokens[0][inputs.token_mask[0]][1:]])


# ---------------------------------------------------------------- encode


def test_encode_gives_a_batch_of_one_in_the_shapes_of_the_schema():
    inputs = transforms().encode(observation())
    assert [f if f is None else f.shape for f in inputs.frames] == [(1, 2, 3, 3), None, None]
    assert inputs.image_mask.tolist() == [[True, False, False]] and inputs.image_mask.dtype == bool
    assert inputs.tokens.shape == inputs.token_mask.shape == (1, 48) and inputs.tokens.dtype == np.int64
    assert inputs.state.shape == (1, 32) and inputs.state.dtype == np.float32


def test_the_state_is_scaled_normalised_and_only_then_padded():
    inputs = transforms().encode(observation(state=(2.0, 0.6)))
    np.testing.assert_allclose(inputs.state[0, :2], [0.5, 0.5], atol=1e-5)  # 2 in [-4, 4], 0.75 in [0, 1]
    assert (inputs.state[0, 2:] == 0).all()
    assert text_of(inputs) == "Task: pick, State: 191 191;\nAction: "  # two numbers, and just below 0.5


def test_a_state_below_the_first_quantile_reads_minus_one():
    assert "State: -1 128;" in text_of(transforms().encode(observation(state=(-4.1, 0.4001))))


def test_cameras_come_in_the_order_of_the_schema_whatever_the_order_given():
    other = FRAME + 1
    robot = two_joints(cameras={slot: CameraSpec() for slot in reversed(CAMERAS)})
    inputs = transforms(robot).encode(observation(right_wrist_0_rgb=FRAME, base_0_rgb=other, left_wrist_0_rgb=FRAME))
    assert (inputs.frames[0][0] == other).all() and inputs.image_mask.all()


def test_a_camera_that_the_robot_does_not_have_is_masked_even_if_sent():
    inputs = transforms().encode(observation(base_0_rgb=FRAME, right_wrist_0_rgb=FRAME))
    assert inputs.frames[2] is None and not inputs.image_mask[0, 2]


def test_a_model_with_fewer_cameras_gets_the_first_ones():
    inputs = transforms(config=replace(CONFIG, num_cameras=1)).encode(observation())
    assert len(inputs.frames) == 1 and inputs.image_mask.shape == (1, 1)


def test_rotate_180_is_a_view():
    robot = two_joints(cameras={"base_0_rgb": CameraSpec(rotate_180=True)})
    frame = transforms(robot).encode(observation()).frames[0]
    assert (frame[0] == np.rot90(FRAME, 2)).all() and np.shares_memory(frame, FRAME)


def test_rejects_a_missing_required_camera_by_name():
    with pytest.raises(ObservationError, match="base_0_rgb.*requires"):
        transforms().encode(observation(left_wrist_0_rgb=FRAME))


def test_rejects_a_camera_name_that_is_no_slot():
    with pytest.raises(ObservationError, match="cam_high"):
        transforms().encode(observation(base_0_rgb=FRAME, cam_high=FRAME))


def test_rejects_a_frame_that_is_not_uint8_rgb():
    with pytest.raises(ObservationError, match="uint8"):
        transforms().encode(observation(base_0_rgb=FRAME.astype(np.float32)))


@pytest.mark.parametrize("state", [(1.0,), (1.0, 2.0, 3.0), ((1.0, 2.0),)])
def test_rejects_a_state_of_the_wrong_length(state):
    with pytest.raises(ObservationError, match="2 numbers of robot 'two'"):
        transforms().encode(observation(state=state))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rejects_a_nan_state(bad):
    with pytest.raises(ObservationError, match="at 1"):
        transforms().encode(observation(state=(0.0, bad)))
    with pytest.raises(ObservationError, match="finite"):
        transforms().decode(np.zeros((3, 32), np.float32), np.array([0.0, bad]))


def test_the_default_prompt_stands_in_for_an_empty_one():
    robot = two_joints(default_prompt="stack the cubes")
    assert text_of(transforms(robot).encode(observation(prompt=" "))).startswith("Task: stack the cubes, ")
    assert text_of(transforms(robot).encode(observation(prompt="pick"))).startswith("Task: pick, ")


def test_rejects_an_observation_without_any_prompt():
    with pytest.raises(ObservationError, match="default_prompt"):
        transforms().encode(observation(prompt=""))


def test_a_truncated_prompt_warns():
    with pytest.warns(PromptTruncated, match="at most 8 tokens.*pick up the red block"):
        inputs = transforms(max_token_len=8).encode(observation(prompt="pick up the red block"))
    assert inputs.token_mask.all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transforms().encode(observation(prompt="pick up the red block"))


def test_the_robot_file_chooses_the_prompt_format_of_openpi_checkpoints_only():
    robot = two_joints(prompt_format="pi0")
    assert text_of(transforms(robot).encode(observation())) == "pick\n"
    lerobot = Conventions(trainer="lerobot", prompt_format="pi0_joined")
    assert text_of(transforms(robot, lerobot).encode(observation(prompt="pick_it"))) == "pick_it\n"
    assert text_of(transforms(robot, replace(lerobot, prompt_format="pi05")).encode(observation())).startswith("Task: ")
    assert text_of(transforms(conventions=Conventions(prompt_format="pi0")).encode(observation())) == "pick\n"


# ---------------------------------------------------------------- decode


def test_decode_unnormalises_adds_the_state_scales_and_slices():
    normalised = np.zeros((2, 32), np.float32)
    normalised[1, :2] = [0.5, 1.0]
    actions = transforms().decode(normalised, np.array([3.0, 0.1], np.float32))
    assert actions.shape == (2, 2) and actions.dtype == np.float32
    # lift: 3 + 2 * (0, 0.5); grip: 0.8 * (0.5, 1), not a difference
    np.testing.assert_allclose(actions, [[3.0, 0.4], [4.0, 0.8]], atol=1e-5)


def test_the_checkpoint_decides_on_deltas_before_the_robot_file():
    conventions = Conventions(delta_actions=(False, True))
    actions = transforms(conventions=conventions).decode(np.zeros((1, 32), np.float32), np.array([3.0, 0.4]))
    np.testing.assert_allclose(actions, [[0.0, 0.8]], atol=1e-5)  # grip: 0.8 * (0.5 + 0.4 / 0.8)


def test_a_delta_mask_may_be_padded_with_false():
    transforms(conventions=Conventions(delta_actions=(True, False) + 30 * (False,)))
    transforms(conventions=Conventions(delta_actions=(True,)))


def test_rejects_a_delta_beyond_the_robots_state():
    with pytest.raises(ConfigError, match="True for action 2"):
        transforms(conventions=Conventions(delta_actions=(True, False, True)))


def test_rejects_a_delta_of_a_velocity():
    spin = JointSpec("lift", -3.0, 3.0, 1.0, action="velocity")
    robot = two_joints(action_meaning="joint_velocity", joints=(spin, GRIP))
    with pytest.raises(ConfigError, match="True for action 0"):
        transforms(robot, Conventions(delta_actions=(True, False)))


@pytest.mark.parametrize("shape", [(3, 2), (32,), (1, 3, 32)])
def test_decode_rejects_other_shapes(shape):
    with pytest.raises(ConfigError, match=r"\[H, 32\]"):
        transforms().decode(np.zeros(shape, np.float32), np.zeros(2))


def test_encode_actions_rejects_other_widths():
    with pytest.raises(ConfigError, match=r"\[H, 2\]"):
        transforms().encode_actions(np.zeros((3, 32)), np.zeros(2))


@settings(max_examples=50)
@given(normalised=hnp.arrays(np.float32, (3, 32), elements=st.floats(-2, 2, width=32)),
       state=hnp.arrays(np.float64, 2, elements=st.floats(-3, 3)))
def test_encode_actions_inverts_decode(normalised, state):
    both = transforms()
    again = both.encode_actions(both.decode(normalised, state), state)
    np.testing.assert_allclose(again[:, :2], normalised[:, :2], atol=1e-5)


# ---------------------------------------------------------------- what does not belong together


def test_no_statistics_are_refused_unless_nothing_is_normalised():
    with pytest.raises(ConfigError, match="norm_stats.state.q01"):
        transforms(stats=None)
    identity = Conventions(state_norm="identity", action_norm="identity")
    actions = transforms(conventions=identity, stats=None).decode(np.full((1, 32), 0.5, np.float32), np.zeros(2))
    np.testing.assert_allclose(actions, [[0.5, 0.4]])


def test_a_tokenizer_larger_than_the_vocabulary_is_refused():
    small = replace(CONFIG, prefix=replace(CONFIG.prefix, vocab_size=511))
    with pytest.raises(ConfigError, match="at most 511 pieces.*512"):
        transforms(config=small)


@pytest.mark.parametrize("max_token_len", [49, None])
def test_a_tokenizer_with_more_slots_than_the_model_is_refused(max_token_len):
    with pytest.raises(ConfigError, match="max_token_len of at most 48"):
        transforms(max_token_len=max_token_len)


def test_a_model_that_cannot_see_a_required_camera_is_refused():
    robot = two_joints(cameras={"right_wrist_0_rgb": CameraSpec()})
    with pytest.raises(ConfigError, match="2, without right_wrist_0_rgb"):
        transforms(robot, config=replace(CONFIG, num_cameras=2))
    with pytest.raises(ConfigError, match="1 to 3"):
        transforms(config=replace(CONFIG, num_cameras=4))


def test_a_lerobot_checkpoint_gets_its_cameras_in_its_own_order():
    robot = load_robot("arm6")
    keys = ("observation.images.wrist", "observation.images.front", "observation.images.empty_camera_0")
    assert camera_order(robot, keys, 3) == ("left_wrist_0_rgb", "base_0_rgb", None)
    assert camera_order(robot, (), 3) == CAMERAS


def test_rejects_a_lerobot_camera_that_the_robot_file_does_not_name():
    with pytest.raises(ConfigError, match="the key 'observation.images.rear'"):
        camera_order(load_robot("arm6"), ("observation.images.front", "observation.images.rear"), 3)


def test_rejects_a_checkpoint_that_never_sees_a_required_camera():
    with pytest.raises(ConfigError, match="left_wrist_0_rgb"):
        camera_order(load_robot("arm6"), ("observation.images.front",), 3)
