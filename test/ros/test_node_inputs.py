"""What comes in and what goes out: the node in this process, with real messages over DDS and a fake policy."""

from __future__ import annotations

import numpy as np
import pytest
from fake_policy import FakePolicy
from rclpy.parameter import Parameter
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.errors import ObservationError
from pi05_ros.ros.policy_node import PolicyNode
from pi05_ros.ros.subscriptions import TOPICS


def test_a_set_of_inputs_becomes_a_trajectory_stamped_by_its_newest_camera(active, robot):
    robot.introduce_optional_camera(active)
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


def test_planning_is_rehearsed_when_the_policy_says_that_a_chunk_is_near(active, robot, monkeypatch):
    patient = [Parameter(name, value=60.0) for name in ("max_input_age_s", "input_timeout_s")]
    assert all(answer.successful for answer in active.set_parameters(patient))
    rehearsed = []
    monkeypatch.setattr(active.parts.commands, "rehearse", rehearsed.append)
    active.parts.policy.soon()
    robot.next_trajectory()
    assert not rehearsed  # nothing was executed before the first one
    active.parts.policy.soon()
    robot.until(lambda: rehearsed)
    (plan,) = rehearsed
    np.testing.assert_allclose(plan.positions[-2], robot.positions + 0.01, atol=1e-6)


def test_a_rehearsal_that_breaks_is_told_of_once_and_stops_nothing(active, robot, monkeypatch):
    said = []
    monkeypatch.setattr(active.get_logger(), "error", said.append)
    monkeypatch.setattr(active.parts.motion, "rehearse", lambda: 1 / 0)
    active.parts.policy.soon()
    robot.until(lambda: said)
    robot.next_trajectory()
    assert active.state_label == "active" and active.parts.policy.soon is None
    assert len(said) == 1 and "ZeroDivisionError" in said[0]


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


def test_pixels_wait_where_the_policy_wants_them(node, robot, monkeypatch):
    """As in a GPU's pinned memory; those of other encodings are made anew anyway."""
    given = []

    def frame_memory(self, size):
        given.append(np.empty(size, np.uint8))
        return given[-1]

    monkeypatch.setattr(FakePolicy, "frame_memory", frame_memory)
    assert node.trigger_configure().name == "SUCCESS" and node.trigger_activate().name == "SUCCESS"
    bgr = robot.frames[2][:, :, ::-1].tobytes()
    third = {"encoding": "bgr8", "data": bgr}
    robot.introduce_optional_camera(node, **third)
    robot.next_trajectory(lambda: robot.send([robot.image(0), robot.image(1), robot.image(2, **third)]))
    seen = node.parts.policy.seen[0].images
    for camera, frame in zip(seen, robot.frames, strict=True):
        np.testing.assert_array_equal(seen[camera], frame)
    assert [any(np.shares_memory(image, memory) for memory in given) for image in seen.values()] == [True, True, False]


def test_frames_without_memory_are_refused_and_counted_until_there_is_some(node, robot, monkeypatch):
    full = [True]

    def frame_memory(self, size):
        if full and size > 100:
            raise ObservationError("image", expected="room", received="none", way_out="none", cause="pinned memory")
        return np.empty(size, np.uint8)

    monkeypatch.setattr(FakePolicy, "frame_memory", frame_memory)
    assert node.trigger_configure().name == "SUCCESS" and node.trigger_activate().name == "SUCCESS"
    robot.until(lambda: node.diagnostics.refused["pinned memory"] > 2, robot.send, "a refusal")
    received = node.parts.inputs.received
    assert sum(received[topic] for topic in TOPICS.values()) == node.diagnostics.refused["pinned memory"]
    full.clear()
    robot.next_trajectory()


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
    "implausible joint": lambda r: r.send(joints=r.joints(position=[1000.0, *r.positions[1:]])),
    "stale input": lambda r: r.send([r.image(c, age_s=0.6) for c in range(3)], r.joints(age_s=0.6)),
    "unusable left_wrist_0_rgb": lambda r: r.send([r.image(0), r.image(1, age_s=3.0), r.image(2)]),  # old
    "unusable right_wrist_0_rgb": lambda r: r.send([r.image(0), r.image(1), r.image(2, age_s=0.3)]),  # lags behind
    "unusable base_0_rgb": lambda r: r.send([r.image(0, age_s=0.3), r.image(1), r.image(2)]),  # the same
    "future stamp": lambda r: r.send([r.image(0, age_s=-3600.0), r.image(1), r.image(2)]),
}


@pytest.mark.parametrize("cause", BAD_INPUTS)
def test_a_bad_input_is_named_once_nothing_is_published_and_good_input_goes_on(active, robot, cause, capfd):
    def bad():
        BAD_INPUTS[cause](robot)

    if cause == "unusable right_wrist_0_rgb":
        robot.introduce_optional_camera(active, age_s=0.3)
    robot.until(lambda: active.diagnostics.refused[cause] >= 3, bad, cause)
    assert robot.trajectories == [] and active.state_label == "active"
    said = [line for line in capfd.readouterr().err.splitlines() if f"[{cause}," in line]
    assert len(said) == 1 and "expected" in said[0] and "received" in said[0]
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


def test_bad_input_that_lasts_holds_the_robot(active, robot):
    robot.set_parameter("max_committed_s", 30.0)
    robot.set_parameter("input_timeout_s", 0.3)
    robot.next_trajectory()
    robot.until(lambda: len(robot.trajectories[-1].points) == 1, lambda: BAD_INPUTS["encoding"](robot), "a hold")
    robot.next_trajectory()


def test_actions_that_are_not_finite_hold_the_robot_at_once(active, robot):
    robot.set_parameter("max_committed_s", 30.0)
    robot.next_trajectory()
    active.parts.policy.wanted = np.nan
    robot.until(lambda: len(robot.trajectories[-1].points) == 1, robot.send, "a hold")
    assert active.diagnostics.refused["non-finite command"] >= 1 and active.state_label == "active"


def test_joint_velocities_are_not_needed(active, robot):
    robot.next_trajectory(lambda: robot.send(joints=robot.joints(velocity=[float("nan")] * 7)))


def test_compressed_images_follow_the_remapped_image_topic(executor, robot):
    remap = ["--ros-args", "-r", "~/base_image:=/front/image_raw"]
    node = PolicyNode(load_policy=lambda **kwargs: FakePolicy(kwargs["robot"]), cli_args=remap)
    executor.add_node(node)
    node.set_parameters([Parameter("compressed_images", value=True)])
    assert node.trigger_configure().name == "SUCCESS"
    topics = {s.topic_name for s in node.subscriptions}
    assert {"/front/image_raw/compressed", "/pi05_policy/left_wrist_image/compressed"} <= topics
    node.trigger_shutdown()


def test_a_robot_with_several_controllers_gets_a_trajectory_and_a_hold_on_each(executor, robot, node):
    node.set_parameters([Parameter("robot", value="aloha")])
    assert node.trigger_configure().name == "SUCCESS" and node.trigger_activate().name == "SUCCESS"
    aloha = node.parts.policy.robot
    got = {c.topic: [] for c in aloha.controllers}
    for controller in aloha.controllers:
        robot.create_subscription(JointTrajectory, f"/pi05_policy/{controller.topic}", got[controller.topic].append, 10)
    names = [j.name for j in aloha.joints]
    middle = [0.5 * (j.lower + j.upper) for j in aloha.joints]
    robot.until(lambda: all(len(m) > 1 for m in got.values()),
                lambda: robot.send(joints=robot.joints(name=names, position=middle)), "trajectories")
    assert {t: tuple(m[0].joint_names) for t, m in got.items()} == {c.topic: c.joints for c in aloha.controllers}
    node.trigger_deactivate()
    robot.until(lambda: all(len(m[-1].points) == 1 for m in got.values()), what="a hold on every topic")
