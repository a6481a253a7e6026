"""From a chunk to a trajectory: what the controller draws between the points counts, not the points alone."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from two_joints import LIMITS, NOW, PERIOD, along, chunk, measured, robot

from pi05_ros.errors import ConfigError, ObservationError
from pi05_ros.runtime.chunking import CommandLimits, JointLimits, plan_chunk, plan_hold
from pi05_ros.runtime.ensembling import TemporalEnsemble
from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.sim.joint_integrator import JointIntegrator
from pi05_ros.transforms.robot_file import Robot

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


def test_a_trajectory_has_its_velocity_at_its_first_point_already():
    """A chunk that joins there went on from rest, and overtook itself by a third of the speed limit."""
    plan = JointTrajectoryPlan(NOW, np.array([0.04, 0.06, 0.1]), np.array([[0.04], [0.08], [0.1]]),
                               np.array([[2.0], [2.0], [0.0]]))
    (first, at_first), (end, at_end) = plan.at(NOW + 40_000_000), plan.at(NOW + 100_000_000)
    assert (first, at_first, end, at_end) == (0.04, 2.0, 0.1, 0.0)
    assert plan.at(NOW + 39_999_999)[1] == 0.0


@pytest.mark.parametrize("origin", [None, (np.array([0.1, -0.2]), np.array([0.3, 0.0]))])
@pytest.mark.parametrize("points", [1, 2, 9])
def test_many_times_at_once_are_the_bits_of_each_time_alone(points, origin):
    rng = np.random.default_rng(points)
    plan = JointTrajectoryPlan(NOW, np.cumsum(rng.uniform(0.01, 0.1, points)), *rng.normal(size=(2, points, 2)), origin)
    ends = [NOW + ns for offset in plan.offsets_ns.tolist() for ns in (offset - 1, offset, offset + 1)]
    times = np.sort([*range(NOW - 50_000_000, plan.end_ns + 50_000_000, 7_654_321), *ends])
    np.testing.assert_array_equal(plan.along(times), np.stack([plan.at(int(t)) for t in times], axis=1))


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
    kept = [k for k, t in enumerate(plan.points_ns) if t in running.points_ns]
    assert kept == list(range(len(kept))) and plan.points_ns[kept[-1]] >= later + 20_000_000
    for k in kept:
        position, velocity = running.at(plan.points_ns[k])
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


def disagreeing(fade_s):
    """Two chunks at one speed, the second 0.05 rad beside the first: the new trajectory, and the third differences of
    what is commanded, sampled at the control period."""
    line = np.stack([np.arange(60) * 0.02, np.zeros(60)], axis=1)
    running = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits(2.0, fade_s=fade_s))
    later = NOW + 200_000_000
    position, _ = running.at(later)
    beside = replace(chunk(line[10:] + [0.0, 0.05]), stamp_ns=later - 100_000_000)
    plan = plan_chunk(beside, LIMITS, measured(position, later), later, CommandLimits(2.0, fade_s=fade_s), running)
    times = later + (np.arange(30) * 20_000_000)
    commanded = np.array([(running if t < plan.stamp_ns + plan.times_s[0] * 1e9 else plan).at(t)[0] for t in times])
    return plan, np.abs(np.diff(commanded[:, 1], n=3)).max(), commanded


def test_chunks_that_disagree_go_over_into_each_other():
    at_once, jerk_at_once, _ = disagreeing(0.0)
    faded_over, jerk, commanded = disagreeing(0.4)
    assert jerk < 0.05 * jerk_at_once
    assert (np.diff(commanded[:, 1]) >= -1e-9).all()  # no way back on the way over
    after = faded_over.times_s > faded_over.times_s[0] + 0.42
    assert after.sum() > 10
    np.testing.assert_allclose(faded_over.positions[after][:-1, 1], 0.05, atol=1e-6)  # then the new chunk alone
    np.testing.assert_allclose(at_once.positions[2:-1, 1], 0.05, atol=1e-6)


def test_a_fade_ends_before_the_running_trajectory_brakes():
    line = np.stack([np.arange(20) * 0.02, np.zeros(20)], axis=1)
    running = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits())
    later = NOW + 200_000_000
    plan = plan_chunk(replace(chunk(np.full((50, 2), 0.2)), stamp_ns=later), LIMITS,
                      measured(running.at(later)[0], later), later, CommandLimits(fade_s=5.0), running)
    last_action = running.stamp_ns + running.times_s[-2] * 1e9
    reached = plan.stamp_ns + plan.times_s[:-1] * 1e9 >= last_action + 1
    assert reached.any()
    np.testing.assert_allclose(plan.positions[:-1][reached, 0], 0.2, atol=1e-9)


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


def test_a_hold_near_a_limit_ends_inside_it():
    line = np.stack([0.5 + np.arange(40) * 0.02, np.zeros(40)], axis=1)
    running = plan_chunk(chunk(line, age_s=0.1), LIMITS, measured(line[5]), NOW, CommandLimits())
    for ms in range(0, 900, 50):
        now = NOW + ms * 10**6
        hold = plan_hold(running, measured(running.at(now)[0], now), now, LIMITS, 0.2)
        assert (hold.positions <= LIMITS.upper + 1e-9).all()
