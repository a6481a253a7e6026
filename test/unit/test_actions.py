"""Expected numbers are worked out by hand from PI05_SPEC section 10."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pi05_ros.errors import ObservationError
from pi05_ros.transforms.actions import Delta, JointUnits, Pad
from pi05_ros.transforms.aloha import AlohaAdapter, FingerCommand, finger_to_motor, motor_to_finger
from pi05_ros.transforms.robot_file import JointSpec

NO_STATE = np.zeros(14)


def test_delta_subtracts_the_current_state_from_every_step_where_masked():
    delta, state = Delta((True, False, True)), np.array([1.0, 2.0, 3.0])
    actions = np.array([[1.5, 2.5, 3.5], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(delta.apply(actions, state), [[0.5, 2.5, 0.5], [-1.0, 0.0, -3.0]])
    np.testing.assert_array_equal(delta.invert(delta.apply(actions, state), state), actions)
    assert delta.encode_state(state) is state


def test_a_delta_mask_may_be_shorter_than_actions_and_state():
    np.testing.assert_array_equal(Delta((True,)).apply(np.ones((1, 7)), np.full(8, 0.25)), [[0.75] + 6 * [1.0]])


def test_delta_does_not_change_its_arguments():
    actions, state = np.ones((2, 3)), np.ones(3)
    Delta((True, True, True)).apply(actions, state)
    assert (actions == 1).all() and (state == 1).all()


def test_padding_adds_zeros_and_is_cut_off_again():
    pad, actions = Pad(32, 3), np.ones((2, 3))
    padded = pad.apply(actions, NO_STATE)
    assert padded.shape == (2, 32) and (padded[:, 3:] == 0).all()
    assert pad.encode_state(np.ones(8)).tolist() == 8 * [1.0] + 24 * [0.0]
    np.testing.assert_array_equal(pad.invert(padded, NO_STATE), actions)


def test_a_position_joint_scales_state_and_action_alike():
    gripper = JointSpec("gripper", 0.0, 0.8, 1.0, scale=0.8, offset=0.1)
    units = JointUnits.of((gripper,))
    np.testing.assert_allclose(units.encode_state(np.array([0.5])), [0.5])  # (0.5 - 0.1) / 0.8
    np.testing.assert_allclose(units.invert(np.array([[0.5]]), NO_STATE), [[0.5]])  # 0.1 + 0.8 * 0.5
    np.testing.assert_allclose(units.apply(np.array([[0.9]]), NO_STATE), [[1.0]])


def test_a_velocity_joint_scales_its_action_only():
    joint = JointSpec("joint", -3.0, 3.0, 2.0, action="velocity", velocity_scale=3.0)
    units = JointUnits.of((joint,))
    np.testing.assert_array_equal(units.encode_state(np.array([0.5])), [0.5])
    np.testing.assert_array_equal(units.invert(np.array([[-0.5]]), NO_STATE), [[-1.5]])
    np.testing.assert_array_equal(units.apply(np.array([[-1.5]]), NO_STATE), [[-0.5]])


# ---------------------------------------------------------------- ALOHA


def test_aloha_turns_the_signs_of_shoulder_and_elbow():
    state = np.array([1.0, 2, 3, 4, 5, 6, 0.5] * 2)
    out = AlohaAdapter().encode_state(state)
    assert out[[0, 1, 2, 3, 4, 5]].tolist() == out[[7, 8, 9, 10, 11, 12]].tolist() == [1, -2, -3, 4, 5, 6]
    back = AlohaAdapter().invert(state[None], state)[0]
    assert back[[0, 1, 2, 3, 4, 5]].tolist() == back[[7, 8, 9, 10, 11, 12]].tolist() == [1, -2, -3, 4, 5, 6]


@pytest.mark.parametrize("number, expected", [
    # p = 0.01844: arcsin((0.000484 + 0.0003400336 - 0.001296) / (0.044 * 0.01844)) = arcsin(-0.581698)
    (0.0, (-0.6208145 - 0.5476) / 1.082),
    # p = 0.03822: arcsin((0.000484 + 0.0014607684 - 0.001296) / (0.044 * 0.03822)) = arcsin(0.385786)
    (0.5, (0.3960595 - 0.5476) / 1.082),
    # p = 0.058: 0.002552 / 0.002552 = 1, whose arcsin is pi / 2
    (1.0, (1.570796 - 0.5476) / 1.082),
    # p = 0.06196: 1.1109, clipped to 1
    (1.1, (1.570796 - 0.5476) / 1.082),
])
def test_aloha_gripper_state_is_the_motor_angle_of_the_finger(number, expected):
    state = np.zeros(14)
    state[[6, 13]] = number
    np.testing.assert_allclose(AlohaAdapter().encode_state(state)[[6, 13]], expected, atol=2e-6)


@pytest.mark.parametrize("number, expected", [(0.0, 1.1689 / 2.1123), (-1.1689, 0.0), (0.9434, 1.0)])
def test_aloha_gripper_action_is_a_share_of_the_motor_range(number, expected):
    actions = np.zeros((2, 14))
    actions[:, [6, 13]] = number
    np.testing.assert_allclose(AlohaAdapter().invert(actions, NO_STATE)[:, [6, 13]], expected, atol=1e-12)


def test_rejects_an_aloha_finger_position_that_cannot_be():
    state = np.zeros(14)
    state[13] = -0.5  # -0.00134 m
    with pytest.raises(ObservationError, match="-0.0013 m"):
        AlohaAdapter().encode_state(state)


@given(hnp.arrays(np.float64, (3, 14), elements=st.floats(-2, 2)))
def test_the_aloha_adapter_inverts_on_actions(actions):
    adapter = AlohaAdapter()
    np.testing.assert_allclose(adapter.invert(adapter.apply(actions, NO_STATE), NO_STATE), actions, atol=1e-12)


def test_the_finger_is_where_the_motor_puts_it():
    # straight out: sin 0 = 0, so p = sqrt(0.036^2 - 0.022^2); straight up: 0.022 + 0.036
    np.testing.assert_allclose(motor_to_finger(np.array([0.0, np.pi / 2, 2.0])), [0.0284956, 0.058, 0.058], atol=1e-7)


@given(st.floats(-1.0, 1.5))
def test_finger_and_motor_invert(angle):
    np.testing.assert_allclose(finger_to_motor(motor_to_finger(np.array([angle]))), angle, atol=1e-6)


def test_a_finger_command_ends_where_the_motor_range_ends():
    actions = np.zeros((1, 14))
    actions[0, 6], actions[0, 13] = 0.0, 1.0
    out = FingerCommand((6, 13)).invert(actions, NO_STATE)
    np.testing.assert_allclose(out[0, [6, 13]], [0.0, 1.0], atol=3e-3)  # ALOHA's constants agree to 0.1 mm
    assert (np.delete(out, [6, 13]) == 0).all()


@given(hnp.arrays(np.float64, (2, 14), elements=st.floats(0.0, 0.99)))
def test_a_finger_command_inverts(actions):
    step = FingerCommand((6, 13))
    np.testing.assert_allclose(step.apply(step.invert(actions, NO_STATE), NO_STATE), actions, atol=1e-6)
