"""From a chunk to a trajectory: what the controller draws between the points counts, not the points alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05_ros.errors import ConfigError, ObservationError
from pi05_ros.runtime.chunking import CommandLimits, JointLimits, JointMeasurement, plan_chunk, plan_hold
from pi05_ros.runtime.trajectory import hermite
from pi05_ros.schema import ActionChunk
from pi05_ros.transforms.robot_file import ControllerSpec, JointSpec, Robot

PERIOD = 0.02
NOW = 1_000_000_000_000


def robot(actions=("position", "position"), meaning="joint_position"):
    """Two joints; the second has wider limits."""
    joints = tuple(JointSpec(f"j{i}", -1.0, 1.0 + i, 2.0 + i, action=a) for i, a in enumerate(actions))
    return Robot("r", meaning, 1 / PERIOD, {}, len(joints), len(joints), joints,
                 (ControllerSpec("trajectory", tuple(j.name for j in joints)),))


LIMITS = JointLimits(robot())


def chunk(actions, age_s=0.1):
    return ActionChunk(np.asarray(actions, np.float32), np.zeros((len(actions), 32), np.float32),
                       NOW - int(age_s * 1e9), PERIOD, "p", 10, 0, 0)


def measured(positions, velocities=None, age_s=0.0):
    return JointMeasurement(NOW - int(age_s * 1e9), np.asarray(positions, float), velocities)


def executed(plan, start, samples=20):
    """Positions and velocities that a controller commands from now on: cubic from `start` at rest, then the plan."""
    age = (NOW - plan.stamp_ns) * 1e-9
    times = np.concatenate([[age], plan.times_s])
    positions = np.concatenate([[start], plan.positions])
    velocities = np.concatenate([[np.zeros_like(start)], plan.velocities])
    out = [hermite(u * (times[k + 1] - times[k]), times[k + 1] - times[k], positions[k], velocities[k],
                   positions[k + 1], velocities[k + 1])
           for k in range(len(plan.times_s)) for u in np.linspace(0, 1, samples)]
    return np.array([p for p, _ in out]), np.array([v for _, v in out])


numbers = st.floats(-5, 5, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=20, max_size=60), st.tuples(st.floats(-1, 1), st.floats(-1, 2)),
       st.floats(0.0, 0.3))
def test_whatever_the_model_says_the_executed_curve_keeps_every_limit(actions, start, age):
    plan = plan_chunk(chunk(actions, age), LIMITS, measured(start), NOW, CommandLimits(max_committed_s=0.8))
    positions, velocities = executed(plan, np.array(start))
    assert (positions >= LIMITS.lower - 1e-9).all() and (positions <= LIMITS.upper + 1e-9).all()
    assert (np.abs(velocities) <= LIMITS.velocity * (1 + 1e-9)).all()
    assert (np.diff(plan.times_s) > 0).all() and (plan.velocities[-1] == 0).all()
    assert plan.stamp_ns + plan.times_s[0] * 1e9 >= NOW and plan.end_ns <= NOW + 0.8e9 + 1


def test_a_slow_motion_passes_unchanged_with_matching_velocities():
    line = np.stack([np.arange(40) * 0.01, np.arange(40) * -0.01], axis=1)
    plan = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits())
    np.testing.assert_allclose(plan.positions[:-1], line[6:6 + len(plan.positions) - 1], atol=1e-6)
    np.testing.assert_allclose(plan.velocities[:-1], np.tile([0.5, -0.5], (len(plan.times_s) - 1, 1)), atol=1e-4)
    np.testing.assert_allclose(plan.times_s[:-1], np.arange(6, 6 + len(plan.times_s) - 1) * PERIOD)


def test_drops_the_actions_whose_time_has_passed():
    plan = plan_chunk(chunk(np.zeros((30, 2)), age_s=0.2), LIMITS, measured([0, 0]), NOW, CommandLimits())
    assert plan.times_s[0] == pytest.approx(0.22)


def test_ends_no_later_than_what_may_be_committed():
    plan = plan_chunk(chunk(np.zeros((500, 2))), LIMITS, measured([0, 0]), NOW, CommandLimits(0.5, 0.2))
    assert NOW < plan.end_ns <= NOW + 0.5e9


def test_refuses_a_chunk_that_is_all_past():
    with pytest.raises(ObservationError, match="observation 1.000 s old") as caught:
        plan_chunk(chunk(np.zeros((10, 2)), age_s=1.0), LIMITS, measured([0, 0]), NOW, CommandLimits())
    assert caught.value.cause == "late chunk"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_numbers_that_are_not_finite(bad):
    actions = np.zeros((10, 2))
    actions[3, 1] = bad
    with pytest.raises(ObservationError, match="finite"):
        plan_chunk(chunk(actions), LIMITS, measured([0, 0]), NOW, CommandLimits())
    with pytest.raises(ObservationError, match="finite"):
        plan_chunk(chunk(np.zeros((10, 2))), LIMITS, measured([0, bad]), NOW, CommandLimits())


def test_starts_from_where_the_robot_is_and_not_from_where_the_model_wants_it():
    plan = plan_chunk(chunk(np.ones((40, 2))), LIMITS, measured([-1.0, 0.0]), NOW, CommandLimits())
    first_span = plan.times_s[0] - 0.1
    assert plan.positions[0, 0] - -1.0 <= LIMITS.velocity[0] * first_span


def test_leads_a_robot_back_that_stands_outside_its_limits():
    plan = plan_chunk(chunk(np.zeros((40, 2))), LIMITS, measured([1.3, 0.0]), NOW, CommandLimits())
    assert (np.diff(plan.positions[:, 0], prepend=1.3) <= 1e-12).all() and plan.positions[-1, 0] < 1.0


def test_velocity_actions_are_integrated_from_the_measured_position():
    limits = JointLimits(robot(("velocity", "position"), "joint_velocity"))
    actions = np.stack([np.full(30, 0.5), np.full(30, 0.3)], axis=1)
    plan = plan_chunk(chunk(actions, age_s=0.1), limits, measured([0.2, 0.3], age_s=0.0), NOW, CommandLimits())
    expected = 0.2 + 0.5 * (plan.times_s[:-1] - 0.1)
    np.testing.assert_allclose(plan.positions[:-1, 0], expected, atol=1e-6)
    np.testing.assert_allclose(plan.positions[:-1, 1], 0.3, atol=1e-6)


def test_a_robot_with_end_effector_actions_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="inverse kinematics"):
        JointLimits(Robot("libero", "end_effector", 20.0, {}, 8, 7))


def test_a_hold_brakes_from_the_running_trajectory():
    line = np.stack([np.arange(40) * 0.02, np.zeros(40)], axis=1)
    running = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits())
    later = NOW + 200_000_000
    position, velocity = running.at(later)
    hold = plan_hold(running, measured(position), later, LIMITS, 0.2)
    np.testing.assert_allclose(hold.positions[0], position + 0.1 * velocity)
    assert hold.positions[0, 0] > position[0] and (hold.velocities == 0).all() and hold.times_s.tolist() == [0.2]


def test_a_hold_stays_with_a_robot_that_did_not_follow():
    line = np.stack([np.arange(40) * 0.02, np.zeros(40)], axis=1)
    running = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits())
    blocked = np.array([-0.9, 0.0])
    hold = plan_hold(running, measured(blocked), NOW + 400_000_000, LIMITS, 0.2)
    np.testing.assert_allclose(hold.positions[0], blocked)


def test_a_hold_near_a_limit_ends_inside_it():
    line = np.stack([0.5 + np.arange(40) * 0.02, np.zeros(40)], axis=1)
    running = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits())
    for ms in range(0, 900, 50):
        hold = plan_hold(running, measured(running.at(NOW + ms * 10**6)[0]), NOW + ms * 10**6, LIMITS, 0.2)
        assert (hold.positions <= LIMITS.upper + 1e-9).all()
