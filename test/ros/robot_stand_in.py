"""The other side of the wire in tests: a robot that sends what the test says and keeps what it receives."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.srv import SetParameters
from rclpy.executors import Executor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.ros.conversions import image_message
from pi05_ros.ros.policy_node import PolicyNode
from pi05_ros.ros.subscriptions import TOPICS
from pi05_ros.transforms.robot_loader import load_robot

MORE = 20  # EventsExecutor does one thing at a time: enough for what `keep` sends, and what comes of it
PATIENCE_S = 60.0  # a test that waits longer has failed; nothing ever waits for a fixed time


class RobotStandIn(Node):
    """Sends to /pi05_policy and keeps trajectories, provenance and diagnostics, oldest first."""

    def __init__(self, executor: Executor, target: str = "/pi05_policy") -> None:
        super().__init__("robot_stand_in")
        self._spin, self._target = executor, target
        self.robot = load_robot("arm6")
        self.names = [joint.name for joint in self.robot.joints]
        self.positions = np.array([0.3 * joint.lower + 0.7 * joint.upper for joint in self.robot.joints])
        self.trajectories: list[JointTrajectory] = []
        self.provenance: list[DiagnosticArray] = []
        self.diagnostics: list[DiagnosticArray] = []
        self.cameras = [self.create_publisher(Image, f"{target}/{t}", qos_profile_sensor_data) for t in TOPICS.values()]
        self._joints = self.create_publisher(JointState, f"{target}/joint_states", qos_profile_sensor_data)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.prompt = self.create_publisher(String, f"{target}/prompt", latched)
        self.create_subscription(JointTrajectory, f"{target}/trajectory", self.trajectories.append, 100)
        self.create_subscription(DiagnosticArray, f"{target}/provenance", self.provenance.append, 100)
        self.create_subscription(DiagnosticArray, "/diagnostics", self.diagnostics.append, 100)
        self._set = self.create_client(SetParameters, f"{target}/set_parameters")
        self.frames = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
        executor.add_node(self)

    # what it sends -----------------------------------------------------------------------------------------------

    def now_ns(self) -> int:
        return self.get_clock().now().nanoseconds

    def image(self, camera: int, age_s: float = 0.0, **fields) -> Image:
        stamp = rclpy_time(self.now_ns() - int(age_s * 1e9))
        message = image_message(self.frames[camera], stamp)
        for name, value in fields.items():
            setattr(message, name, value)
        return message

    def joints(self, age_s: float = 0.0, **fields) -> JointState:
        message = JointState(name=self.names, position=self.positions.tolist())
        message.header.stamp = rclpy_time(self.now_ns() - int(age_s * 1e9))
        for name, value in fields.items():
            setattr(message, name, value)
        return message

    def send(self, images: list[Image | None] | None = None, joints: JointState | None = None) -> None:
        """Three images and the joints; None in the list leaves a camera out. They may arrive in any order."""
        self._joints.publish(self.joints() if joints is None else joints)
        for camera, image in enumerate([self.image(c) for c in range(3)] if images is None else images):
            if image is not None:
                self.cameras[camera].publish(image)

    # what it waits for -------------------------------------------------------------------------------------------

    def until(self, holds: Callable[[], object], keep: Callable[[], object] = lambda: None, what: str = "") -> None:
        """Spin, doing `keep` again and again, until `holds`."""
        end = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < end, f"waited {PATIENCE_S} s in vain for {what or holds}"
            keep()
            self._spin.spin_once(timeout_sec=0.02)
            for _ in range(MORE):
                self._spin.spin_once(timeout_sec=0.0)

    def connect(self) -> None:
        """Until every topic has its other end."""
        self.until(lambda: all(p.get_subscription_count() for p in (*self.cameras, self._joints)), what="subscribers")
        self.until(lambda: self.count_publishers(f"{self._target}/trajectory"), what="the trajectory's publisher")

    def introduce_optional_camera(self, node: PolicyNode, **fields) -> None:
        """A `node` in this process waits from now on for the camera that may be absent; before, it did not know it."""
        assert node.parts is not None
        self.until(lambda: node.parts.mailbox.latest("right_wrist_0_rgb"),
                   lambda: self.cameras[2].publish(self.image(2, **fields)), "the camera")

    def next_trajectory(self, send: Callable[[], object] | None = None) -> JointTrajectory:
        """Send until one more trajectory has come."""
        seen = len(self.trajectories)
        self.until(lambda: len(self.trajectories) > seen, send or self.send, "a trajectory")
        return self.trajectories[seen]

    def next_diagnostics(self) -> dict[str, str]:
        """The next report of the node: its key-values, `level` and `message`."""
        seen = len(self.diagnostics)
        self.until(lambda: len(self.diagnostics) > seen, what="diagnostics")
        status = self.diagnostics[-1].status[0]
        return {pair.key: pair.value for pair in status.values} | {"level": status.level, "message": status.message}

    def set_parameter(self, name: str, value: object):
        """The answer of the node: successful, reason."""
        self.until(self._set.service_is_ready, what="the parameter service")
        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        future = self._set.call_async(request)
        self.until(future.done, what=f"the answer to setting {name}")
        return future.result().results[0]


def rclpy_time(ns: int):
    from rclpy.time import Time

    return Time(nanoseconds=ns).to_msg()


def provenance_of(message: DiagnosticArray) -> dict[str, str]:
    return {pair.key: pair.value for pair in message.status[0].values}
