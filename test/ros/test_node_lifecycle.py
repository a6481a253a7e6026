"""Lifecycle, failures and parameters: the node in this process, with real messages over DDS and a fake policy."""

from __future__ import annotations

import threading

import pytest
from rclpy.parameter import Parameter
from robot_stand_in import PATIENCE_S, provenance_of
from std_msgs.msg import String

from pi05_ros.errors import CheckpointError
from pi05_ros.ros.lifecycle_client import LifecycleClient
from pi05_ros.ros.policy_node import PolicyNode


def test_deactivation_holds_the_robot_and_nothing_of_the_old_activation_follows(active, robot):
    robot.set_parameter("max_committed_s", 30.0)  # so that a late chunk would have time left
    robot.next_trajectory()
    active.parts.policy.gate = threading.Semaphore(0)
    while active.parts.policy.entered.acquire(blocking=False):
        pass
    robot.until(lambda: active.parts.policy.entered.acquire(blocking=False), robot.send, "inference to start")
    robot.until(lambda: not active._outbox, what="the chunk before to be published")
    in_the_making = active.parts.policy.seen[-1].stamp_ns
    assert active.trigger_deactivate().name == "SUCCESS"
    robot.until(lambda: len(robot.trajectories[-1].points) == 1, what="the hold")
    active.parts.policy.gate.release(1000)  # the chunk in the making comes out now
    active.parts.worker.call(lambda: None).result(PATIENCE_S)
    handled = []
    active.executor.create_task(lambda: handled.append(True))  # behind the one that empties the outbox
    robot.until(lambda: handled and not active._outbox, robot.send, "the outbox to be emptied")
    assert active.diagnostics.counted["dropped.activation ended"] == 1
    assert len(robot.trajectories[-1].points) == 1  # the hold is the last word
    assert active.trigger_activate().name == "SUCCESS"
    robot.until(lambda: provenance_of(robot.provenance[-1])["epoch"] != provenance_of(robot.provenance[0])["epoch"],
                robot.send, "a chunk of the new activation")
    stamps = [m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for m in robot.trajectories]
    assert in_the_making not in stamps and stamps == sorted(stamps)


def test_counts_outlive_a_configuration(active, robot):
    robot.next_trajectory()
    assert not robot.set_parameter("denoising_steps", 0).successful
    active.trigger_deactivate()
    active.trigger_cleanup()
    report = robot.next_diagnostics()
    while report["state"] != "unconfigured":  # of before
        report = robot.next_diagnostics()
    assert int(report["received.joint_states"]) >= int(report["taken.state"]) >= int(report["chunks"]) >= 1
    assert report["activations"] == report["refused.parameter"] == "1"
    over = ("taken.base_0_rgb", "dropped.base_0_rgb", "dropped.base_0_rgb forgotten")
    assert int(report["received.base_image"]) == sum(int(report.get(key, 0)) for key in over)


def test_a_clock_set_back_forgets_inputs_and_the_trajectory_of_the_old_time(active, robot):
    robot.next_trajectory()
    active._now_seen_ns = robot.now_ns() + 10**10  # as if the clock had been ten seconds ahead
    active._watch()
    assert active.parts.mailbox.latest("state") is None and active.parts.commands.last is None
    robot.until(lambda: active.parts.commands.last is not None, robot.send, "a trajectory of the new time")
    assert active.state_label == "active"


def test_a_corrected_clock_leaves_the_robot_held(active, robot):
    robot.set_parameter("max_committed_s", 30.0)
    robot.next_trajectory()
    before = len(robot.trajectories)
    active._now_seen_ns = robot.now_ns() + 2 * 10**8  # as if the clock had been 0.2 seconds ahead
    active._watch()
    assert active.parts.commands.last is None and active.parts.motion.held
    robot.until(lambda: any(len(t.points) == 1 for t in robot.trajectories[before:]), what="the hold")


def test_a_controller_that_cannot_be_reached_does_not_cost_the_others_their_hold(active, robot, monkeypatch):
    robot.next_trajectory()
    commands, (first, *_) = active.parts.commands, active.parts.commands._controllers

    class Unreachable:
        def publish(self, message):
            raise RuntimeError("no route to the controller")

    reached = len(robot.trajectories)
    monkeypatch.setattr(commands, "_controllers", [(Unreachable(), *first[1:]), (Unreachable(), ["claw"], [0]), first])
    with pytest.raises(RuntimeError, match="no route") as caught:
        active.parts.motion.hold("test")
    assert [note.startswith("and for claw: RuntimeError") for note in caught.value.__notes__] == [True]
    assert not active.parts.motion.held  # it is tried again
    robot.until(lambda: len(robot.trajectories) > reached, what="the other one's hold")
    active.parts.motion.deadline_misses = 0
    monkeypatch.undo()


def test_going_on_after_a_deactivation_is_no_missed_deadline(active, robot):
    for _ in range(2):
        robot.next_trajectory()
        assert active.trigger_deactivate().name == "SUCCESS" and active.trigger_activate().name == "SUCCESS"
    robot.next_trajectory()
    assert active.parts.motion.deadline_misses == 0


def test_activations_are_never_numbered_twice(active, robot):
    seen = {active._epoch}
    for transition in ("deactivate", "cleanup", "configure", "activate"):
        assert getattr(active, f"trigger_{transition}")().name == "SUCCESS"
    assert active._epoch not in seen


def test_a_broken_policy_deactivates_the_node_which_can_be_activated_again(active, robot, capfd):
    robot.next_trajectory()
    active.parts.policy.error = RuntimeError("CUDA error: out of memory")
    robot.until(lambda: active.state_label == "inactive", robot.send, "deactivation")
    log = capfd.readouterr().err
    assert "out of memory" in log and "Traceback" in log
    active.parts.policy.error = None
    assert active.trigger_activate().name == "SUCCESS"
    robot.next_trajectory()


def test_an_expected_error_while_configuring_leaves_the_node_unconfigured(node, capfd):
    def load(**kwargs):
        raise CheckpointError("tensor 'x'", expected="it", received="nothing", way_out="Download it again.")

    node._load_policy = load
    assert node.trigger_configure().name == "FAILURE" and node.state_label == "unconfigured"
    assert "Download it again." in capfd.readouterr().err


def test_an_exception_inside_a_transition_is_logged_and_recovered_from(node, capfd):
    good = node._load_policy

    def load(**kwargs):
        raise ZeroDivisionError("surprise")

    node._load_policy = load
    assert node.trigger_configure().name == "ERROR" and node.state_label == "unconfigured"
    log = capfd.readouterr().err
    assert "surprise" in log and "Traceback" in log
    node._load_policy = good
    assert node.trigger_configure().name == "SUCCESS"


def test_an_illegal_transition_is_answered_and_the_node_lives(node, robot, executor, capfd):
    client = LifecycleClient(robot, executor, "/pi05_policy")
    client.wait(PATIENCE_S)
    assert client.change("activate") is False and client.change(99) is False
    assert client.state() == "unconfigured"
    assert "expected a transition allowed in state 'unconfigured'" in capfd.readouterr().err
    assert client.change("configure") is True


def test_a_request_to_stop_interrupts_loading(node):
    loading = threading.Event()

    def load(on_progress, **kwargs):
        loading.set()
        while True:  # as loading tensor after tensor does
            on_progress(1, 2)

    def ask():
        assert loading.wait(PATIENCE_S)
        node.stop_requested = True

    node._load_policy = load
    threading.Thread(target=ask).start()
    assert node.trigger_configure().name == "FAILURE"
    assert not [t for t in threading.enumerate() if t.name == "pi05_worker"]


def test_every_transition_and_back(node, robot):
    for _ in range(3):
        for transition in ("configure", "activate", "deactivate", "cleanup"):
            assert getattr(node, f"trigger_{transition}")().name == "SUCCESS"
    assert node.state_label == "unconfigured" and len(node.made) == 3
    assert not [t for t in threading.enumerate() if t.name == "pi05_worker"]


def test_shutdown_from_active_frees_everything(active, robot):
    robot.next_trajectory()
    assert active.trigger_shutdown().name == "SUCCESS" and active.state_label == "finalized"
    robot.until(lambda: len(robot.trajectories[-1].points) == 1, what="the hold")
    assert not [t for t in threading.enumerate() if t.name == "pi05_worker"]


def test_denoising_steps_from_outside_take_effect_in_the_next_chunk(active, robot):
    robot.next_trajectory()
    assert robot.set_parameter("denoising_steps", 3).successful
    before = len(robot.provenance)
    robot.until(lambda: len(robot.provenance) > before + 1, robot.send)
    assert provenance_of(robot.provenance[-1])["denoising_steps"] == "3"
    assert provenance_of(robot.provenance[0])["denoising_steps"] == "10"
    robot.until(lambda: robot.next_diagnostics()["denoising_steps"] == "3")


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("denoising_steps", 0, "range"), ("denoising_steps", 51, "range"), ("denoising_steps", "many", "type"),
    ("max_input_age_s", -1.0, "range"), ("stop_time_s", 5.0, "expected the sum of the first two"),
    ("stop_time_s", 0.03, "at least twice command_lead_s"),
    ("checkpoint", "/elsewhere", "only while unconfigured"),
])
def test_a_bad_value_is_refused_with_the_reason(active, robot, name, value, reason):
    answer = robot.set_parameter(name, value)
    assert not answer.successful and reason in answer.reason.lower()


def test_a_word_that_is_no_choice_is_refused(node, robot):
    answer = robot.set_parameter("dtype", "float16")
    assert not answer.successful and "expected one of 'float32', 'bfloat16'" in answer.reason


def test_the_prompt_topic_changes_the_next_chunk(active, robot):
    robot.next_trajectory()
    assert active.parts.policy.seen[0].prompt == robot.robot.default_prompt
    robot.prompt.publish(String(data="put the block in the bowl"))
    robot.until(lambda: active.parts.policy.seen[-1].prompt == "put the block in the bowl", robot.send)
    assert active.get_parameter("prompt").value == "put the block in the bowl"


def test_reset_starts_anew(active, robot):
    from std_srvs.srv import Trigger

    def since():  # what was published before may still be on its way
        return [one for one in map(provenance_of, robot.provenance) if one["epoch"] != epoch]

    epoch = str(active._epoch)
    robot.next_trajectory()
    reset = robot.create_client(Trigger, "/pi05_policy/reset")
    robot.until(reset.service_is_ready)
    future = reset.call_async(Trigger.Request())
    robot.until(future.done)
    assert future.result().success
    robot.until(since, robot.send)
    assert since()[0]["chunk_index"] == "0"


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("robot", "libero", "inverse kinematics"), ("robot", "nobody", "expected one of"),
    ("absent_cameras", "rear", "expected names among"),
])
def test_a_configuration_that_cannot_work_is_refused_with_the_reason(node, capfd, name, value, reason):
    node.set_parameters([Parameter(name, value=value)])
    assert node.trigger_configure().name == "FAILURE"
    assert reason in capfd.readouterr().err and node.state_label == "unconfigured"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_died_deactivates_the_node(active, robot, capfd):
    robot.next_trajectory()
    active.parts.worker.repeat(lambda: 1 / 0, lambda: None)
    robot.until(lambda: active.state_label == "inactive", robot.send, "deactivation")
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert active.trigger_activate().name == "FAILURE"
    assert active.trigger_cleanup().name == "SUCCESS" and active.trigger_configure().name == "SUCCESS"


def test_parameters_that_contradict_each_other_at_the_start_are_refused(executor, capfd):
    node = PolicyNode(parameter_overrides=[Parameter("stop_time_s", value=3.0)])
    executor.add_node(node)
    assert node.trigger_configure().name == "FAILURE"
    assert "stop_time_s, command_lead_s and max_committed_s: expected" in capfd.readouterr().err


def test_a_node_configured_anew_knows_that_the_robot_still_brakes(active, robot):
    """It would start from rest where the robot was measured, and carry it beyond a limit."""
    robot.set_parameter("stop_time_s", 0.9)
    robot.next_trajectory()
    active.trigger_deactivate()
    hold = active.parts.commands.last
    assert len(hold.times_s) == 1 and hold.end_ns > robot.now_ns()
    for transition in ("cleanup", "configure"):
        assert getattr(active, f"trigger_{transition}")().name == "SUCCESS"
    assert active.parts.commands.last is hold
    active.trigger_cleanup()
    active.set_parameters([Parameter("robot", value="droid_jointpos")])
    active.trigger_configure()
    assert active.parts.commands.last is None  # another robot's
