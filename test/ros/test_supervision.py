"""Watchdog, faults and diagnostics: the node in this process with a fake policy that hangs, fails or is slow."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from pi05_ros.errors import ObservationError
from pi05_ros.runtime.trajectory import JointTrajectoryPlan


def hang(active, robot):
    """Inference begins and does not end before the test releases the gate."""
    active.parts.policy.gate = threading.Semaphore(0)
    while active.parts.policy.entered.acquire(blocking=False):
        pass
    robot.until(lambda: active.parts.policy.entered.acquire(blocking=False), robot.send, "inference to start")


def test_a_worker_that_hangs_deactivates_the_node_with_a_hold_and_the_reason(active, robot):
    robot.set_parameter("max_committed_s", 30.0)
    robot.next_trajectory()
    robot.set_parameter("worker_timeout_s", 0.2)
    hang(active, robot)
    robot.until(lambda: active.state_label == "inactive", robot.send, "deactivation")
    robot.until(lambda: len(robot.trajectories[-1].points) == 1, what="the hold")
    report = robot.next_diagnostics()
    assert report["level"] == b"\x02" and "worker_timeout_s" in report["message"] and report["held"] == "True"
    assert active.trigger_activate().name == "FAILURE"  # it still hangs
    active.parts.policy.gate.release(1000)
    active.parts.worker.call(lambda: None).result(60)
    assert active.trigger_activate().name == "SUCCESS"
    robot.next_trajectory()
    robot.until(lambda: robot.next_diagnostics()["level"] == b"\x00", robot.send, "diagnostics to recover")


@pytest.mark.parametrize(("error", "cause", "says"), [
    (RuntimeError("CUDA error: an illegal memory access\nmore"), "CUDA error", "GPU: expected to compute"),
    (RuntimeError("CUDA error: out of memory"), "CUDA out of memory", "GPU memory: expected enough"),
    (ZeroDivisionError("surprise"), "inference failed", "inference: expected a chunk"),
])
def test_a_failure_is_named_in_diagnostics_and_cleanup_recovers(active, robot, error, cause, says):
    robot.next_trajectory()
    active.parts.policy.error = error
    robot.until(lambda: active.state_label == "inactive", robot.send, "deactivation")
    report = robot.next_diagnostics()
    assert report["level"] == b"\x02" and report[f"refused.{cause}"] == "1"
    assert (says in report["message"]) or cause == "inference failed"
    for transition in ("cleanup", "configure", "activate"):
        assert getattr(active, f"trigger_{transition}")().name == "SUCCESS"
    robot.next_trajectory()
    assert len(active.made) == 2


def test_too_little_gpu_memory_while_configuring_leaves_the_node_unconfigured(node, capfd):
    def load(**kwargs):
        raise RuntimeError("CUDA error: out of memory")

    good, node._load_policy = node._load_policy, load
    assert node.trigger_configure().name == "FAILURE" and node.state_label == "unconfigured"
    assert "GPU memory: expected enough" in capfd.readouterr().err
    node._load_policy = good
    assert node.trigger_configure().name == "SUCCESS"


@pytest.mark.parametrize("fault", ["silent inputs", "failure"])
def test_stop_publishing_leaves_the_running_trajectory_to_end_by_itself(active, robot, fault):
    assert not robot.set_parameter("on_fault", "jump").successful
    for name, value in (("on_fault", "stop_publishing"), ("max_committed_s", 30.0), ("input_timeout_s", 0.3)):
        assert robot.set_parameter(name, value).successful
    robot.next_trajectory()
    if fault == "failure":
        active.parts.policy.error = RuntimeError("broken")
        robot.until(lambda: active.state_label == "inactive", robot.send, "deactivation")
    else:
        robot.until(lambda: active.parts.motion.held, lambda: robot.send(images=[]), "the watchdog")
    robot.until(lambda: robot.next_diagnostics()["level"] == b"\x02", what="an ERROR in diagnostics")
    assert all(len(message.points) > 1 for message in robot.trajectories)
    if fault == "failure":
        active.parts.policy.error = None
        assert active.trigger_activate().name == "SUCCESS"
    robot.next_trajectory()
    active.trigger_deactivate()  # no fault: the robot is held
    robot.until(lambda: len(robot.trajectories[-1].points) == 1, what="the hold")


def test_a_latency_above_the_budget_is_counted_and_warned_of(active, robot, capfd):
    robot.next_trajectory()
    robot.until(lambda: robot.next_diagnostics()["over_budget"] == "0", robot.send)
    robot.set_parameter("latency_budget_s", 1e-6)
    robot.next_trajectory()
    robot.until(lambda: int(robot.next_diagnostics()["over_budget"]) >= 1, robot.send)
    robot.until(lambda: robot.next_diagnostics()["level"] == b"\x01", robot.send, "a WARN in diagnostics")
    assert "above latency_budget_s" in capfd.readouterr().err


def test_a_chunk_that_came_after_the_robot_had_begun_to_brake_is_a_missed_deadline(active, robot):
    robot.next_trajectory()
    before = active.parts.motion.deadline_misses
    last = active.parts.commands.last
    active.parts.commands.last = JointTrajectoryPlan(  # as if it had ended a second ago
        last.stamp_ns - 10**9 - int(1e9 * last.times_s[-1]), last.times_s, last.positions, last.velocities)
    robot.next_trajectory()
    robot.until(lambda: active.parts.motion.deadline_misses == before + 1, robot.send, "a missed deadline")
    assert int(robot.next_diagnostics()["deadline_misses"]) >= 1


def test_diagnostics_tell_ages_stages_drops_and_the_gpu(active, robot):
    robot.next_trajectory()
    hang(active, robot)
    robot.until(lambda: active.parts.mailbox.dropped["base_0_rgb"] >= 2, robot.send, "frames overwritten")
    active.parts.policy.gate.release(1000)
    report = robot.next_diagnostics()
    assert int(report["dropped.base_0_rgb"]) >= 2 and report["gpu_temperature_c"] == "40"
    assert 0 <= float(report["age_s.state"]) < 60 and float(report["stage_ms.queue"]) >= 0
    assert float(report["stage_ms.total"]) == 1.0 and float(report["latency_s"]) > 0


def test_steps_change_during_motion_in_the_next_chunk_and_in_diagnostics(active, robot):
    robot.next_trajectory()
    hang(active, robot)  # a chunk with the old number is in the making
    assert robot.set_parameter("denoising_steps", 3).successful
    active.parts.policy.gate.release(1000)
    robot.until(lambda: robot.next_diagnostics()["last_denoising_steps"] == "3", robot.send)
    steps = [int(next(v.value for v in m.status[0].values if v.key == "denoising_steps")) for m in robot.provenance]
    assert steps == sorted(steps, reverse=True) and set(steps) == {10, 3}  # old, old, new: none in between


@pytest.mark.parametrize("where", ["positions", "velocities"])
def test_numbers_that_are_not_finite_never_leave(active, where):
    parts = {"positions": np.zeros((1, 7)), "velocities": np.zeros((1, 7)), where: np.full((1, 7), np.inf)}
    with pytest.raises(ObservationError, match="finite"):
        active.parts.commands.publish(JointTrajectoryPlan(0, np.array([1.0]), **parts))
    assert active.parts.commands.last is None


