"""How chunks join is a parameter: it takes effect between chunks, and provenance and diagnostics tell."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rclpy.parameter import Parameter
from robot_stand_in import provenance_of

from pi05_ros.runtime.inference_loop import Delivery
from pi05_ros.schema import Observation


def last_of(robot):
    return provenance_of(robot.provenance[-1]) if robot.provenance else {}


def test_the_last_chunk_guides_the_next_one_as_soon_as_the_delay_is_known(active, robot):
    robot.next_trajectory()
    robot.until(lambda: last_of(robot).get("chunk_mode") == "delay_aware", robot.send, "a chunk's provenance")
    assert last_of(robot)["guidance"] == "none" and active.parts.policy.guidance == [None] * len(
        active.parts.policy.guidance)
    assert robot.set_parameter("chunk_mode", "guided").successful
    assert robot.set_parameter("guidance_schedule", "exp").successful
    robot.until(lambda: last_of(robot).get("guidance_schedule") == "exp", robot.send, "a guided chunk")
    told = last_of(robot)
    assert told["chunk_mode"] == "guided" and told["guidance"] == "identity"
    assert int(told["guidance_previous_index"]) < int(told["chunk_index"])
    assert 0 < int(told["guidance_delay"]) <= int(told["guidance_end"])
    said = robot.next_diagnostics()
    assert float(said["inference_delay_s"]) > 0 and int(said["inference_delay"]) >= 1
    assert robot.set_parameter("chunk_mode", "plain").successful
    robot.until(lambda: last_of(robot)["chunk_mode"] == "plain", robot.send, "a plain chunk")
    assert last_of(robot)["guidance"] == "none" and active.parts.policy.guidance[-1] is None


def test_after_a_hold_nothing_is_continued(active, robot):
    robot.set_parameter("chunk_mode", "guided")
    robot.until(lambda: any(active.parts.policy.guidance), robot.send, "a guided chunk")
    robot.until(lambda: not (active.parts.mailbox.complete() or active.parts.loop.busy_s() or active._outbox),
                what="the last chunk")
    active.parts.motion.hold("test")
    seen = len(active.parts.policy.guidance)
    robot.until(lambda: len(active.parts.policy.guidance) > seen, robot.send, "the next chunk")
    assert active.parts.policy.guidance[seen] is None


@pytest.mark.parametrize(("held", "least", "most"), [(True, 0.0, 0.006), (False, 0.012, 0.03)])
def test_a_robot_that_was_held_begins_with_the_first_actions_of_an_old_observation(active, robot, held, least, most):
    """An action a 20 ms, each 1 mrad further: 15 of them have passed after 0.3 s."""
    policy, motion = active.parts.policy, active.parts.motion
    policy.wanted, policy.slope = 0.0, 0.001
    robot.set_parameter("fade_s", 0.0)
    robot.next_trajectory()
    if held:
        motion.hold("test")
    else:
        active.parts.commands.last = replace(active.parts.commands.last, rests_until_ns=0)  # it moves already
    chunk = policy.infer(Observation({}, robot.positions, "p", robot.now_ns() - 300_000_000), 10, chunk_index=9)
    motion.publish(Delivery(chunk, 1, {}, 0, 0))
    plan = active.parts.commands.last
    soon = plan.times_s > 0.38  # after the stamp: when it has joined
    moved = plan.positions[soon][0, 0] - robot.positions[0]
    assert least < moved < most


def test_a_checkpoint_that_was_not_trained_for_it_is_refused(node):
    assert node.set_parameters([Parameter("chunk_mode", value="trained")])[0].successful  # not known yet
    assert node.trigger_configure().name == "FAILURE"
    assert node.set_parameters([Parameter("chunk_mode", value="guided")])[0].successful
    assert node.trigger_configure().name == "SUCCESS"
    refused = node.set_parameters([Parameter("chunk_mode", value="trained")])[0]
    assert not refused.successful and "rtc_training_max_delay" in refused.reason


@pytest.mark.parametrize("mode", ["ensembled", "plain"])
def test_every_mode_moves_the_robot(active, robot, mode):
    robot.set_parameter("chunk_mode", mode)
    robot.until(lambda: last_of(robot).get("chunk_mode") == mode, robot.send, f"a chunk in mode {mode}")
    moved = robot.trajectories[-1]
    assert len(moved.points) > 1 and moved.points[-1].positions[0] > robot.positions[0]


def test_what_cannot_be_is_refused_with_the_reason(node):
    def reason(**values):
        answer = node.set_parameters_atomically([Parameter(name, value=value) for name, value in values.items()])
        return "" if answer.successful else answer.reason

    assert "'plain', 'delay_aware', 'guided', 'trained', 'ensembled'" in reason(chunk_mode="smooth")
    assert "backend 'cuda'" in reason(backend="cuda", chunk_mode="guided", guidance_jacobian="vjp")
    assert "backend 'cuda'" in reason(backend="cuda", chunk_mode="trained")
    assert reason(backend="vision=cuda", chunk_mode="guided", guidance_jacobian="vjp") == ""
