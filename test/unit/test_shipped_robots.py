"""What the numbers of a checkpoint become on each robot of config/robots."""

from dataclasses import replace

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from pi05_ros.config import tiny_config
from pi05_ros.schema import Conventions, FieldStats, NormStats, Observation
from pi05_ros.transforms.prompt import PromptTokenizer
from pi05_ros.transforms.robot import RobotTransforms
from pi05_ros.transforms.robot_file import JointSpec
from pi05_ros.transforms.robot_loader import list_robots, load_robot
from pi05_ros.transforms.tiny_tokenizer import tiny_tokenizer

FRAME = np.zeros((2, 3, 3), np.uint8)


def transforms(robot, trainer="openpi"):
    """With statistics from -1 to 1, so that the model's numbers are the training data's."""
    state, actions = np.ones(robot.state_dim), np.ones(robot.action_dim)
    stats = NormStats(state=FieldStats(q01=-state, q99=state), actions=FieldStats(q01=-actions, q99=actions))
    tokenizer = PromptTokenizer(tiny_tokenizer(), 48)
    return RobotTransforms(robot, Conventions(trainer=trainer), stats, tokenizer, tiny_config())


def observation(state, prompt):
    return Observation(images={"base_0_rgb": FRAME, "left_wrist_0_rgb": FRAME}, state=state, prompt=prompt)


@pytest.mark.parametrize("name", list_robots())
@pytest.mark.parametrize("trainer", ["openpi", "lerobot"])
def test_decode_inverts_encode_actions_for_every_robot(name, trainer):
    robot = load_robot(name)
    both = transforms(robot, trainer)
    random = np.random.default_rng(0)
    if robot.joints:
        low, high = np.array([(j.lower, j.upper) for j in robot.joints]).T
    else:
        low, high = -np.ones(robot.action_dim), np.ones(robot.action_dim)
    state = random.uniform(-1, 1, robot.state_dim) if not robot.joints else random.uniform(low, high)
    actions = random.uniform(low, high, (10, robot.action_dim))
    normalised = both.encode_actions(actions, state)
    assert normalised.shape == (10, 32) and (normalised[:, robot.action_dim:] == 0).all()
    np.testing.assert_allclose(both.decode(normalised, state), actions, atol=2e-5)


def test_droid_velocities_come_out_in_rad_per_second():
    robot = load_robot("droid")
    normalised = np.zeros((1, 32), np.float32)
    normalised[0, [0, 7]] = 1.0
    actions = transforms(robot).decode(normalised, np.zeros(8))
    np.testing.assert_allclose(actions[0], [3.0, 0, 0, 0, 0, 0, 0, 0.8], atol=1e-5)  # 0.2 rad in 1/15 s; closed


def test_droid_state_is_in_rad_with_the_gripper_as_a_share():
    robot = load_robot("droid")
    state = np.array([0.5, 0, 0, 0, 0, 0, 0, 0.4])
    inputs = transforms(robot).encode(observation(state, "pick"))
    np.testing.assert_allclose(inputs.state[0, [0, 7]], [0.5, 0.5], atol=1e-5)


def test_aloha_converts_between_deltas_and_joint_signs_in_this_order():
    """delta -> absolute in the model's signs, then the robot's: shoulder = -(0.25 + -(0.5)) = 0.25."""
    robot = load_robot("aloha")
    state = np.zeros(14)
    state[1], state[[6, 13]] = 0.5, 0.03
    normalised = np.zeros((1, 32), np.float32)
    normalised[0, 1], normalised[0, 6] = 0.25, 0.9434
    actions = transforms(robot).decode(normalised, state)
    np.testing.assert_allclose(actions[0, 1], 0.25, atol=1e-5)
    np.testing.assert_allclose(actions[0, 6], 0.058, atol=2e-4)  # the motor's 1.4910 rad: finger open
    # motor at 0 + 0.5476 rad: 0.022 * sin + sqrt(0.036^2 - (0.022 * cos)^2) = 0.011454 + 0.030712
    np.testing.assert_allclose(actions[0, 13], 0.042166, atol=1e-5)


def test_aloha_grippers_that_are_not_fingers_keep_openpis_numbers():
    robot = load_robot("aloha")
    joints = tuple(JointSpec(j.name, -9.0, 9.0, 1.0, delta=j.delta) for j in robot.joints)
    actions = transforms(replace(robot, joints=joints)).decode(np.zeros((1, 32), np.float32), np.zeros(14))
    np.testing.assert_allclose(actions[0, [6, 13]], 1.1689 / 2.1123, atol=1e-5)


def test_libero_passes_actions_through_and_has_no_state_in_its_prompt():
    robot = load_robot("libero")
    both = transforms(robot)
    inputs = both.encode(observation(np.zeros(8), "open_drawer"))
    words = SentencePieceProcessor(model_proto=tiny_tokenizer())
    assert words.decode([int(i) for i in inputs.tokens[inputs.token_mask][1:]]) == "open drawer\n"
    actions = both.decode(np.full((1, 32), 0.5, np.float32), np.zeros(8))
    np.testing.assert_allclose(actions, [7 * [0.5]], atol=2e-6)
