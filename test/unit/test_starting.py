"""A chunk for a robot at rest: where it begins, what it has consumed, and that it keeps its limits whoever is right."""

from dataclasses import replace

import numpy as np
import pytest
from two_joints import LIMITS, NOW, PERIOD, along, chunk, measured

from pi05_ros.errors import ObservationError
from pi05_ros.runtime.chunking import CommandLimits, JointMeasurement, plan_chunk, plan_hold
from pi05_ros.runtime.trajectory import Commanded, JointTrajectoryPlan
from pi05_ros.sim.joint_integrator import JointIntegrator


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


def test_starts_from_where_the_robot_is_and_not_from_where_the_model_wants_it():
    plan = plan_chunk(chunk(np.ones((40, 2))), LIMITS, measured([-1.0, 0.0]), NOW, CommandLimits())
    first_span = plan.times_s[0] - 0.1  # from now on
    assert plan.positions[0, 0] - -1.0 <= LIMITS.velocity[0] * first_span


def test_leads_a_robot_back_that_stands_outside_its_limits():
    plan = plan_chunk(chunk(np.zeros((40, 2))), LIMITS, measured([1.3, 0.0]), NOW, CommandLimits())
    assert (np.diff(plan.positions[:, 0], prepend=1.3) <= 1e-12).all() and plan.positions[-1, 0] < 1.0


@pytest.mark.parametrize(("beyond", "inside"), [(0.05, True), (0.4, False)])
def test_a_robot_that_is_found_outside_its_limits_before_it_begins_to_move_is_not_commanded_there(beyond, inside):
    """Its clock had jumped: nobody knew that it still moved. It waits to begin, and is led back meanwhile."""
    ended = JointTrajectoryPlan(NOW - 10**9, np.array([0.1]), np.array([[0.2, 0.0]]), np.zeros((1, 2)))
    waits = plan_chunk(chunk(np.zeros((40, 2))), LIMITS, measured([0.6, 0.0]), NOW, CommandLimits(), ended)
    assert waits.times_s[0] > 0.3
    later, found = NOW + 100_000_000, [1.0 + beyond, 0.0]
    plan = plan_chunk(replace(chunk(np.zeros((40, 2))), stamp_ns=later), LIMITS, measured(found, later), later,
                      CommandLimits(), waits)
    led_s = plan.times_s[0]
    assert (plan.positions[:, 0] <= 1.0).all() == inside
    assert plan.positions[0, 0] == pytest.approx(max(1.0, 1.0 + beyond - led_s * 2.0 * 2 / 3))
    assert (np.diff(plan.positions[:, 0]) <= 1e-12).all() and plan.positions[-1, 0] < 1.0


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


def test_a_measurement_older_than_the_running_trajectory_is_held_against_what_was_commanded_then():
    """Joints fell silent while the robot moved: it is not lost for being where it was. A blocked one is."""
    line = np.stack([np.arange(80) * 0.02, np.zeros(80)], axis=1)
    running = along(line, 60, age_s=-0.05)  # its first point lies ahead of the measurement
    now = NOW + 300_000_000
    for told, lost in (([-0.3, 0.0], False), (None, False), ([0.6, 0.0], True)):
        seen = JointMeasurement(NOW - 50_000_000, np.array([-0.3, 0.0]), None if told is None else np.array(told))
        controller = JointIntegrator(line[0])
        controller.execute(running, NOW)
        hold = plan_hold(running, seen, now, LIMITS, 0.2)
        assert (hold.positions[-1, 0] < 0) == lost
        if not lost:
            controller.execute(hold, now)
            speeds = [np.abs(controller.at(now + us * 1000)[1]) for us in range(0, 400_000, 500)]
            assert (np.array(speeds) <= LIMITS.velocity).all()


@pytest.mark.parametrize("age_ms", [0, 20, 60, 120])
def test_commands_do_not_run_away_from_a_blocked_robot_however_often_they_are_made_anew(age_ms):
    """Joints are older than the running trajectory, which is 16 ms old; it wants 0.9 rad more than there is."""
    wanted, running, commanded, away = np.tile([0.9, 0.0], (60, 1)), None, Commanded(), []
    for now in range(NOW, NOW + 2 * 10**9, 16_000_000):
        stamp = now - age_ms * 10**6
        seen = JointMeasurement(stamp, np.zeros(2), commanded.at(stamp))
        running = plan_chunk(replace(chunk(wanted), stamp_ns=now - 10**7), LIMITS, seen, now, CommandLimits(), running)
        commanded.add(now, running)
        away.append(running.positions[0, 0])
    assert 0.3 < max(away) < LIMITS.velocity[0] * (0.2 + (age_ms + 60) / 1000)  # stop_time_s, and until it is seen


def test_a_hold_before_a_trajectory_begins_brakes_from_the_one_that_still_runs():
    """Near a limit, where braking from rest at the new one's first point would overshoot."""
    line = np.stack([0.55 + np.arange(40) * 0.02, np.zeros(40)], axis=1)
    running, commanded, controller = along(line), Commanded(), JointIntegrator(line[0])
    controller.execute(running, NOW - 90_000_000)
    commanded.add(NOW - 90_000_000, running)
    again = NOW + 115_000_000
    newer = plan_chunk(replace(chunk(np.full((60, 2), 0.8)), stamp_ns=again - 10**7), LIMITS,
                       measured(running.at(again)[0], again), again, CommandLimits(), running)
    now = again + 2_000_000  # its first point lies 18 ms ahead
    controller.execute(newer, again)
    commanded.add(again, newer)
    assert newer.known_from_ns > now and commanded.running(now) is running
    hold = plan_hold(commanded.running(now), None, now, LIMITS, 0.2)
    np.testing.assert_allclose(hold.at(now), controller.at(now), atol=1e-9)
    controller.execute(hold, now)
    motion = [controller.at(now + us * 1000) for us in range(0, 400_000, 500)]
    assert max(position[0] for position, _ in motion) <= LIMITS.upper[0] + 1e-9
    assert all((np.abs(velocity) <= LIMITS.velocity).all() for _, velocity in motion)
    moved = [position[0] for position, _ in motion]
    assert (np.diff(moved) > -1e-9).all()  # it never turns back


def test_what_was_commanded_moves_with_the_clock():
    line = np.stack([np.arange(40) * 0.01, np.zeros(40)], axis=1)
    commanded = Commanded()
    commanded.add(NOW - 10**8, along(line))
    before = commanded.at(NOW)
    commanded.shift(-10**9)
    assert commanded.at(NOW - 2 * 10**9) is None
    np.testing.assert_allclose(commanded.at(NOW - 10**9), before)
