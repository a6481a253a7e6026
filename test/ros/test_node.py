"""The node in this process, with real messages over DDS and a policy that the test controls."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from rclpy.parameter import Parameter
from robot_stand_in import PATIENCE_S, provenance_of
from std_msgs.msg import String

from pi05_ros.errors import CheckpointError
from pi05_ros.ros.lifecycle_client import LifecycleClient
from pi05_ros.ros.policy_node import PolicyNode
from pi05_ros.schema import ActionChunk


class FakePolicy:
    """Wants every joint at its present position plus 0.01; records observations; may fail or wait."""

    def __init__(self, robot):
        self.robot, self.seen, self.error, self.gate = robot, [], None, None
        self.entered = threading.Semaphore(0)

    def summary(self):
        return "fake"

    def infer(self, observation, num_steps, *, chunk_index):
        self.seen.append(observation)
        self.entered.release()
        if self.gate is not None:
            assert self.gate.acquire(timeout=PATIENCE_S)
        if self.error is not None:
            raise self.error
        actions = np.tile(observation.state + 0.01, (50, 1)).astype(np.float32)
        return ActionChunk(actions, np.zeros((50, 32), np.float32), observation.stamp_ns, 0.02, observation.prompt,
                           num_steps, 0, chunk_index, stage_times_ms={"total": 1.0})


@pytest.fixture
def node(executor):
    made = []

    def load(**kwargs):
        made.append(FakePolicy(kwargs["robot"]))
        return made[-1]

    node = PolicyNode(load_policy=load)
    node.made = made
    executor.add_node(node)
    yield node
    if node.parts is not None and node.parts.policy.gate is not None:
        node.parts.policy.gate.release(1000)
    if node.state_label in ("active", "inactive"):
        node.trigger_shutdown()


@pytest.fixture
def active(node, robot):
    assert node.trigger_configure().name == "SUCCESS"
    assert node.trigger_activate().name == "SUCCESS"
    robot.connect()
    return node


def test_a_set_of_inputs_becomes_a_trajectory_stamped_by_its_newest_camera(active, robot):
    message = robot.next_trajectory()
    seen = active.parts.policy.seen[0]
    assert message.joint_names == robot.names
    assert message.header.stamp.sec * 10**9 + message.header.stamp.nanosec == seen.stamp_ns
    times = [p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in message.points]
    assert times == sorted(set(times)) and times[0] > 0
    assert list(message.points[-1].velocities) == [0.0] * 7
    np.testing.assert_allclose(message.points[-2].positions, robot.positions + 0.01, atol=1e-6)
    assert {c: f.shape for c, f in seen.images.items()} == {c: (48, 64, 3) for c in robot.robot.cameras}
    np.testing.assert_array_equal(seen.images["left_wrist_0_rgb"], robot.frames[1])


def test_joints_are_mapped_by_name_whatever_their_order_and_company(active, robot):
    order = [6, 0, 5, 1, 4, 2, 3]
    mixed = lambda: robot.send(joints=robot.joints(  # noqa: E731
        name=["wheel", *(robot.names[i] for i in order)], position=[99.0, *(float(robot.positions[i]) for i in order)]))
    robot.next_trajectory(mixed)
    np.testing.assert_allclose(active.parts.policy.seen[0].state, robot.positions, atol=1e-6)


def test_other_encodings_arrive_as_rgb(active, robot):
    bgr = robot.frames[0][:, :, ::-1].tobytes()

    def send():
        robot.send([robot.image(0, encoding="bgr8", data=bgr), robot.image(1), robot.image(2)])

    robot.next_trajectory(send)
    np.testing.assert_array_equal(active.parts.policy.seen[0].images["base_0_rgb"], robot.frames[0])


def test_an_optional_camera_that_is_silent_is_left_out(active, robot):
    robot.next_trajectory(lambda: robot.send([robot.image(0), robot.image(1), None]))
    assert set(active.parts.policy.seen[0].images) == {"base_0_rgb", "left_wrist_0_rgb"}


def test_absent_cameras_are_not_waited_for(node, robot):
    node.set_parameters([Parameter("absent_cameras", value="left_wrist, right_wrist")])
    assert node.trigger_configure().name == "SUCCESS" and node.trigger_activate().name == "SUCCESS"
    robot.next_trajectory(lambda: robot.send([robot.image(0), None, None]))
    assert set(node.parts.policy.seen[0].images) == {"base_0_rgb"}


BAD_INPUTS = {
    "encoding": lambda r: r.send([r.image(0, encoding="yuv422"), r.image(1), r.image(2)]),
    "image size": lambda r: r.send([r.image(0, width=0, height=0, step=0, data=b""), r.image(1), r.image(2)]),
    "missing joint": lambda r: r.send(joints=r.joints(name=r.names[1:], position=r.positions[1:].tolist())),
    "joint count": lambda r: r.send(joints=r.joints(position=r.positions[1:].tolist())),
    "non-finite joint": lambda r: r.send(joints=r.joints(position=[float("nan")] * 7)),
    "stale input": lambda r: r.send([r.image(c, age_s=0.6) for c in range(3)], r.joints(age_s=0.6)),
    "unusable left_wrist_0_rgb": lambda r: r.send([r.image(0), r.image(1, age_s=3.0), r.image(2)]),  # old
    "unusable right_wrist_0_rgb": lambda r: r.send([r.image(0), r.image(1), r.image(2, age_s=0.3)]),  # lags behind
    "unusable base_0_rgb": lambda r: r.send([r.image(0, age_s=-3.0), r.image(1), r.image(2)]),  # in the future
}


@pytest.mark.parametrize("cause", BAD_INPUTS)
def test_a_bad_input_is_named_once_nothing_is_published_and_good_input_goes_on(active, robot, cause, capfd):
    def bad():
        BAD_INPUTS[cause](robot)

    robot.until(lambda: active.diagnostics.refused[cause] >= 3, bad, cause)
    assert robot.trajectories == [] and active.state_label == "active"
    said = [line for line in capfd.readouterr().err.splitlines() if f"[{cause}," in line]
    assert len(said) == 1 and "expected" in said[0] and "received" in said[0]
    active.parts.mailbox.clear()
    robot.next_trajectory()


def test_silence_of_the_cameras_holds_the_robot_and_says_so(active, robot):
    robot.set_parameter("input_timeout_s", 0.3)
    chunk = robot.next_trajectory()
    robot.until(lambda: len(robot.trajectories) > 1 and len(robot.trajectories[-1].points) == 1,
                lambda: robot.send(images=[]), "a hold")
    hold = robot.trajectories[-1]
    assert len(chunk.points) > 1 and list(hold.points[0].velocities) == [0.0] * 7
    assert active.diagnostics.refused["unusable base_0_rgb"] >= 1
    robot.until(lambda: robot.next_diagnostics()["level"] == b"\x02", what="an ERROR in diagnostics")
    robot.next_trajectory()  # the cameras are back, the robot moves again
    assert active.state_label == "active"


def test_deactivation_holds_the_robot_and_nothing_of_the_old_activation_follows(active, robot):
    robot.next_trajectory()
    active.parts.policy.gate = threading.Semaphore(0)
    while active.parts.policy.entered.acquire(blocking=False):
        pass
    robot.until(lambda: active.parts.policy.entered.acquire(blocking=False), robot.send, "inference to start")
    in_the_making = active.parts.policy.seen[-1].stamp_ns
    assert active.trigger_deactivate().name == "SUCCESS"
    robot.until(lambda: len(robot.trajectories[-1].points) == 1, what="the hold")
    active.parts.policy.gate.release(1000)  # the chunk in the making comes out now
    active.parts.worker.call(lambda: None).result(PATIENCE_S)
    assert active.trigger_activate().name == "SUCCESS"
    robot.until(lambda: provenance_of(robot.provenance[-1])["epoch"] != provenance_of(robot.provenance[0])["epoch"],
                robot.send, "a chunk of the new activation")
    stamps = [m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for m in robot.trajectories]
    assert in_the_making not in stamps and stamps == sorted(stamps)


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
    ("max_input_age_s", -1.0, "range"), ("stop_time_s", 5.0, "expected stop_time_s < max_committed_s"),
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

    robot.next_trajectory()
    reset = robot.create_client(Trigger, "/pi05_policy/reset")
    robot.until(reset.service_is_ready)
    future = reset.call_async(Trigger.Request())
    robot.until(future.done)
    assert future.result().success
    before = len(robot.provenance)
    robot.until(lambda: len(robot.provenance) > before, robot.send)
    assert provenance_of(robot.provenance[-1])["chunk_index"] == "0"


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("robot", "libero", "inverse kinematics"), ("robot", "nobody", "expected one of"),
    ("absent_cameras", "rear", "expected names among"),
])
def test_a_configuration_that_cannot_work_is_refused_with_the_reason(node, capfd, name, value, reason):
    node.set_parameters([Parameter(name, value=value)])
    assert node.trigger_configure().name == "FAILURE"
    assert reason in capfd.readouterr().err and node.state_label == "unconfigured"
