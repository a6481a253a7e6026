"""From a chunk to a trajectory: what the controller draws between the points counts, not the points alone."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi05_ros.errors import ConfigError, ObservationError
from pi05_ros.runtime.chunking import CommandLimits, JointLimits, JointMeasurement, plan_chunk, plan_hold
from pi05_ros.runtime.ensembling import TemporalEnsemble
from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.schema import ActionChunk
from pi05_ros.sim.joint_integrator import JointIntegrator
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


def measured(positions, at=NOW):
    return JointMeasurement(at, np.asarray(positions, float))


numbers = st.floats(-5, 5, width=32)
LEAD_NS = 20_000_000
LATENCIES = st.sampled_from([0.0, 0.003, 0.02, 0.05, 0.2])


def assert_same_motion(one, other):
    np.testing.assert_allclose(one[0], other[0], atol=1e-6)
    np.testing.assert_allclose(one[1], other[1], atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.tuples(numbers, numbers), min_size=4, max_size=4), st.floats(0.02, 0.3),
                          st.floats(0.03, 0.5)), min_size=2, max_size=6),
       st.tuples(st.floats(-1, 1), st.floats(-1, 2)), LATENCIES, st.sampled_from([0.0, 0.001, 0.004, 0.019]),
       st.sampled_from(["plain", "delay_aware", "ensembled"]))  # a guided chunk is planned as a delay-aware one
def test_whatever_the_model_says_the_executed_motion_keeps_every_limit(chunks, start, latency, delay, mode):
    """Chunk after chunk on a controller, with late joint states and commands: positions and speeds as it draws them.
    Up to where a chunk joins, and there, the curve and its velocity are those of the one before."""
    controller, running, now, ensemble = JointIntegrator(start), None, NOW, TemporalEnsemble()
    samples = []
    for corners, age, pause in chunks:
        ages = np.linspace(0, 3, 50)
        actions = np.stack([np.interp(ages, np.arange(4), np.array(corners)[:, j]) for j in range(2)], axis=1)
        made = replace(chunk(actions), stamp_ns=now - int(age * 1e9))
        seen = measured(controller.at(now - int(latency * 1e9))[0] if running else start, now - int(latency * 1e9))
        if mode == "ensembled":
            made = ensemble.add(made, 0.01)
        before = running
        running = plan_chunk(made, LIMITS, seen, now, CommandLimits(max_committed_s=0.8), running, mode != "plain")
        assert (np.diff(running.times_s) > 0).all() and (running.velocities[-1] == 0).all()
        assert running.times_s[0] * 1e9 + running.stamp_ns > now and running.end_ns <= now + 0.8e9 + 1
        for t in np.arange(0, delay, 0.0005):  # the command travels
            samples.append(controller.at(now + int(t * 1e9)))
        assert controller.execute(running, now + int(delay * 1e9))
        if before is not None and before.end_ns > now + LEAD_NS:
            just_before = now + LEAD_NS - 1000
            assert_same_motion(controller.at(just_before), before.at(just_before))
        for t in np.arange(delay, pause, 0.0005):
            samples.append(controller.at(now + int(t * 1e9)))
        now += int(pause * 1e9)
    hold = plan_hold(running, None, now, LIMITS, 0.2)
    assert controller.execute(hold, now)
    samples += [controller.at(now + int(t * 1e9)) for t in np.arange(0, 0.3, 0.0005)]
    positions, velocities = np.array([p for p, _ in samples]), np.array([v for _, v in samples])
    assert (positions >= LIMITS.lower - 2e-3).all() and (positions <= LIMITS.upper + 2e-3).all()
    assert (np.abs(velocities) <= LIMITS.velocity * 1.02).all()
    assert (velocities[-1] == 0).all()


def along(line, steps=40, age_s=0.1):
    """A trajectory that has followed the line since its stamp, for so many steps."""
    velocities = np.gradient(line[:steps], PERIOD, axis=0)
    velocities[-1] = 0
    return JointTrajectoryPlan(NOW - int(age_s * 1e9), np.arange(steps) * PERIOD, line[:steps], velocities)


def test_a_trajectory_has_its_velocity_at_its_first_point_already():
    """A chunk that joins there went on from rest, and overtook itself by a third of the speed limit."""
    plan = JointTrajectoryPlan(NOW, np.array([0.04, 0.06, 0.1]), np.array([[0.04], [0.08], [0.1]]),
                               np.array([[2.0], [2.0], [0.0]]))
    (first, at_first), (end, at_end) = plan.at(NOW + 40_000_000), plan.at(NOW + 100_000_000)
    assert (first, at_first, end, at_end) == (0.04, 2.0, 0.1, 0.0)
    assert plan.at(NOW + 39_999_999)[1] == 0.0


def test_a_slow_motion_passes_unchanged_with_matching_velocities():
    line = np.stack([np.arange(40) * 0.01, np.arange(40) * -0.01], axis=1)
    plan = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits(lead_s=0.005), along(line))
    np.testing.assert_allclose(plan.positions[:-1], line[6:6 + len(plan.positions) - 1], atol=1e-6)
    np.testing.assert_allclose(plan.velocities[1:-1], np.tile([0.5, -0.5], (len(plan.times_s) - 2, 1)), atol=1e-4)
    np.testing.assert_allclose(plan.times_s[:-1], np.arange(6, 6 + len(plan.times_s) - 1) * PERIOD)


def test_drops_the_actions_whose_time_has_passed():
    plan = plan_chunk(chunk(np.zeros((30, 2)), age_s=0.2), LIMITS, measured([0, 0]), NOW, CommandLimits(lead_s=0.005),
                      along(np.zeros((40, 2)), age_s=0.2))
    assert plan.times_s[0] == pytest.approx(0.22)


@pytest.mark.parametrize(("ended", "consumed"), [(None, 0), (0, 0), (2, 2), (5, 5)])
def test_a_robot_that_stood_still_drops_no_more_actions_than_it_consumed(ended, consumed):
    """The last trajectory ended so many steps after the stamp; the chunk goes on from there when it begins to act."""
    line = np.stack([np.arange(40) * 0.01, np.arange(40) * -0.01], axis=1)
    before = line - line[9] + line[consumed]  # it ends where the new chunk begins to act
    running = None if ended is None else along(before, 10, age_s=0.1 + PERIOD * (9 - ended))
    plan = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[consumed]), NOW, CommandLimits(), running)
    assert plan.times_s[:2] == pytest.approx(0.12 + (0.2 if ended is None else 0.0) + np.array([0, PERIOD]))
    np.testing.assert_allclose(plan.positions[:-1], line[consumed:consumed + len(plan.positions) - 1], atol=1e-6)


def test_a_robot_that_waited_before_its_first_motion_consumed_nothing_meanwhile():
    """The next chunk was seen while it stood: it goes on where the first one leaves off, and not ahead of it."""
    line = np.stack([np.arange(60) * 0.01, np.arange(60) * -0.01], axis=1)
    first = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[0]), NOW, CommandLimits())
    later, again = NOW + 200_000_000, replace(chunk(line), stamp_ns=NOW)
    plan = plan_chunk(again, LIMITS, measured(line[0], later), later, CommandLimits(), first)
    for ms in range(230, 700, 20):
        np.testing.assert_allclose(plan.at(NOW + ms * 10**6)[0], first.at(NOW + ms * 10**6)[0], atol=2e-3)


def test_a_chunk_that_drops_nothing_begins_with_its_first_action_where_the_running_trajectory_is_left():
    line = np.stack([np.arange(40) * 0.01, np.arange(40) * -0.01], axis=1)
    plan = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits(lead_s=0.005),
                      along(line), drop_elapsed=False)
    join, position = plan.times_s[0], plan.positions[0]
    assert join == pytest.approx(0.12) and position == pytest.approx(line[6])
    np.testing.assert_allclose(plan.times_s[1:4], join + np.array([1, 2, 3]) * PERIOD)
    ahead = plan.positions[1:-1, 0]  # it goes back to line[1], but keeps a third of its velocity on the first step
    assert ahead[0] == pytest.approx(position[0] + 0.01 / 3) and ahead[4:] == pytest.approx(line[5:len(ahead) + 1, 0])


def test_keeps_the_running_trajectory_up_to_its_next_point():
    line = np.stack([np.arange(50) * 0.02, np.zeros(50)], axis=1)
    running = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits())
    later = NOW + 405_000_000
    behind = measured(running.at(later - 50_000_000)[0], later - 50_000_000)  # joint states are 50 ms old
    plan = plan_chunk(replace(chunk(line[::-1]), stamp_ns=later - 100_000_000), LIMITS, behind, later, CommandLimits(),
                      running)
    kept = [k for k, t in enumerate(plan.points_ns()) if t in running.points_ns()]
    assert kept == list(range(len(kept))) and plan.points_ns()[kept[-1]] >= later + 20_000_000
    for k in kept:
        position, velocity = running.at(plan.points_ns()[k])
        np.testing.assert_allclose(plan.positions[k], position, atol=1e-6)
        np.testing.assert_allclose(plan.velocities[k], velocity, atol=1e-4)


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
    first_span = plan.times_s[0] - 0.1  # from now on
    assert plan.positions[0, 0] - -1.0 <= LIMITS.velocity[0] * first_span


def test_leads_a_robot_back_that_stands_outside_its_limits():
    plan = plan_chunk(chunk(np.zeros((40, 2))), LIMITS, measured([1.3, 0.0]), NOW, CommandLimits())
    assert (np.diff(plan.positions[:, 0], prepend=1.3) <= 1e-12).all() and plan.positions[-1, 0] < 1.0


def test_velocity_actions_are_integrated_from_the_measured_position():
    limits = JointLimits(robot(("velocity", "position"), "joint_velocity"))
    actions = np.stack([np.full(30, 0.5), np.full(30, 0.3)], axis=1)
    plan = plan_chunk(chunk(actions, age_s=0.1), limits, measured([0.2, 0.3]), NOW, CommandLimits())
    expected = 0.2 + 0.5 * (plan.times_s[:-1] - 0.32)  # it begins to move 220 ms from now
    np.testing.assert_allclose(plan.positions[:-1, 0], expected, atol=1e-6)
    np.testing.assert_allclose(plan.positions[:-1, 1], 0.3, atol=1e-6)


def test_a_robot_with_end_effector_actions_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="inverse kinematics"):
        JointLimits(Robot("libero", "end_effector", 20.0, {}, 8, 7))


def test_a_hold_brakes_from_the_running_trajectory():
    line = np.stack([np.arange(40) * 0.02, np.zeros(40)], axis=1)
    running = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits())
    later = NOW + 400_000_000
    position, velocity = running.at(later)
    hold = plan_hold(running, measured(position, later), later, LIMITS, 0.2)
    np.testing.assert_allclose(hold.positions[0], position + 0.1 * velocity)
    assert hold.positions[0, 0] > position[0] and (hold.velocities == 0).all() and hold.times_s.tolist() == [0.2]


def test_a_hold_leaves_a_blocked_joint_where_it_is_and_brakes_the_others():
    line = np.stack([np.arange(40) * 0.02, np.arange(40) * 0.02], axis=1)
    running = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits())
    later = NOW + 400_000_000
    position, velocity = running.at(later)
    hold = plan_hold(running, measured([-0.9, position[1]], later), later, LIMITS, 0.2)
    assert hold.positions[0, 0] == -0.9
    np.testing.assert_allclose(hold.positions[0, 1], position[1] + 0.5 * hold.times_s[0] * velocity[1])
    assert (np.abs(hold.positions[0] - position) / hold.times_s[0] <= LIMITS.velocity / 1.5 + 1e-9).all()


def test_a_hold_with_old_joints_trusts_the_trajectory():
    """A measurement from a second ago must not send the robot back to where it was then."""
    line = np.stack([np.arange(80) * 0.02, np.zeros(80)], axis=1)
    running = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits())
    later = NOW + 400_000_000
    assert plan_hold(running, None, later, LIMITS, 0.2).positions[0, 0] > running.at(later)[0][0]
    just_late = measured(running.at(later - 300_000_000)[0], later - 300_000_000)
    assert plan_hold(running, just_late, later, LIMITS, 0.2).positions[0, 0] > running.at(later)[0][0]


def test_a_chunk_that_follows_a_hold_at_once_joins_the_braking():
    """The hold is one point, its end: who joins before it must know where the robot is on the way there."""
    line = np.stack([np.arange(40) * 0.02, np.zeros(40)], axis=1)
    running = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits())
    controller, later = JointIntegrator(line[5]), NOW + 200_000_000
    controller.execute(running, NOW)
    hold = plan_hold(running, None, later, LIMITS, 0.2)
    controller.execute(hold, later)
    for ms in range(0, 200, 10):
        now = later + ms * 10**6
        np.testing.assert_allclose(hold.at(now), controller.at(now), atol=1e-9)
    now = later + 10_000_000
    seen = measured(controller.at(now)[0], now)
    controller.execute(plan_chunk(replace(chunk(line), stamp_ns=now), LIMITS, seen, now, CommandLimits(), hold), now)
    speeds = [np.abs(controller.at(now + us * 1000)[1]) for us in range(0, 300_000, 500)]
    assert (np.array(speeds) <= LIMITS.velocity).all()


def test_a_chunk_after_a_hold_starts_where_it_ended_and_not_where_the_robot_was_measured_before():
    line = np.stack([np.arange(40) * 0.02, np.zeros(40)], axis=1)
    running = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits())
    stopped = NOW + 200_000_000
    hold = plan_hold(running, None, stopped, LIMITS, 0.2)
    old = measured(running.at(stopped)[0], stopped)
    controller, now = JointIntegrator(hold.positions[-1]), stopped + 260_000_000
    controller.execute(plan_chunk(replace(chunk(line), stamp_ns=stopped), LIMITS, old, now, CommandLimits(), hold), now)
    speeds = [np.abs(controller.at(now + us * 1000)[1]) for us in range(0, 300_000, 500)]
    assert (np.array(speeds) <= LIMITS.velocity).all()
    blocked = measured([-0.5, 0.0], stopped)  # it never followed: then what was measured counts
    plan = plan_chunk(replace(chunk(line), stamp_ns=stopped), LIMITS, blocked, now, CommandLimits(), hold)
    assert plan.positions[0, 0] < -0.4


@pytest.mark.parametrize("gap", [0.0, 0.03, 0.3, 0.7])
@pytest.mark.parametrize("told_the_truth", [True, False])
def test_a_robot_at_rest_keeps_its_speed_limit_whether_or_not_it_is_where_it_was_measured(gap, told_the_truth):
    """A second publisher lies about a joint; or a hand has moved it."""
    line = np.stack([np.arange(80) * 0.02, np.zeros(80)], axis=1)
    ended = JointTrajectoryPlan(NOW - 10**9, np.array([0.1]), np.array([[0.2, 0.0]]), np.zeros((1, 2)))
    said = np.array([0.2 - gap, 0.0])
    controller = JointIntegrator(said if told_the_truth else [0.2, 0.0])
    controller.execute(plan_chunk(replace(chunk(line), stamp_ns=NOW), LIMITS, measured(said), NOW,
                                  CommandLimits(), ended), NOW)
    speeds = [np.abs(controller.at(NOW + us * 1000)[1]) for us in range(0, 1_000_000, 500)]
    assert (np.array(speeds) <= LIMITS.velocity).all() and np.max(speeds) > 0.5


@pytest.mark.parametrize(("ended", "seen", "said"), [
    (JointTrajectoryPlan(NOW - 10**9, np.array([0.1]), np.array([[0.9, 0.0]]), np.zeros((1, 2))), [-0.9, 0.0],
     "'j0': expected at or near 0.900.*received -0.900.*reset"),
    (None, [0.0, 4.0], "'j1': expected at or near 2.000.*its limit is.*received 4.000"),
])
def test_a_robot_at_rest_far_from_where_it_should_be_is_not_driven(ended, seen, said):
    with pytest.raises(ObservationError, match=said) as error:
        plan_chunk(chunk(np.zeros((50, 2))), LIMITS, measured(seen), NOW, CommandLimits(), ended)
    assert error.value.cause == "robot displaced"


def test_a_hold_near_a_limit_ends_inside_it():
    line = np.stack([0.5 + np.arange(40) * 0.02, np.zeros(40)], axis=1)
    running = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits())
    for ms in range(0, 900, 50):
        now = NOW + ms * 10**6
        hold = plan_hold(running, measured(running.at(now)[0], now), now, LIMITS, 0.2)
        assert (hold.positions <= LIMITS.upper + 1e-9).all()
