"""`ros2 run pi05_ros sim_robot`: joint states and three camera images out, joint trajectories in.

Topics are those of the node it serves, under /pi05_policy. A physics robot will replace it; it stays small.
"""

from __future__ import annotations

import sys

import numpy as np
import rclpy
from builtin_interfaces.msg import Time
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image, JointState
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.sim.drawing import render
from pi05_ros.sim.joint_integrator import JointIntegrator
from pi05_ros.transforms.robot_loader import load_robot

IMAGE_TOPICS = ("base_image", "left_wrist_image", "right_wrist_image")


class SimRobot(Node):
    """Parameters: robot, policy (name of the policy node), image_rate_hz, joint_rate_hz."""

    def __init__(self, **kwargs) -> None:
        super().__init__("sim_robot", **kwargs)
        self.robot = load_robot(self.declare_parameter("robot", "arm6").value)
        policy = self.declare_parameter("policy", "/pi05_policy").value
        self._names = [joint.name for joint in self.robot.joints]
        middle = [0.5 * (joint.lower + joint.upper) for joint in self.robot.joints]
        self._groups = {c.topic: JointIntegrator([middle[self._names.index(n)] for n in c.joints])
                        for c in self.robot.controllers}
        self._images = [self.create_publisher(Image, f"{policy}/{topic}", qos_profile_sensor_data)
                        for topic in IMAGE_TOPICS]
        self._states = self.create_publisher(JointState, f"{policy}/joint_states", qos_profile_sensor_data)
        for controller in self.robot.controllers:
            self.create_subscription(JointTrajectory, f"{policy}/{controller.topic}", self._executor(controller), 10)
        self.create_timer(1.0 / self.declare_parameter("joint_rate_hz", 50.0).value, self._publish_joints)
        self.create_timer(1.0 / self.declare_parameter("image_rate_hz", 10.0).value, self._publish_images)

    def positions(self, now_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and velocities in the order of the robot's joints."""
        out = np.zeros((2, len(self._names)))
        for controller in self.robot.controllers:
            columns = [self._names.index(name) for name in controller.joints]
            out[0, columns], out[1, columns] = self._groups[controller.topic].at(now_ns)
        return out[0], out[1]

    def _executor(self, controller):
        def execute(message: JointTrajectory) -> None:
            order = [message.joint_names.index(name) for name in controller.joints]
            stamp = message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec
            now_ns = self.get_clock().now().nanoseconds
            plan = JointTrajectoryPlan(
                stamp or now_ns,
                np.array([p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in message.points]),
                np.array([p.positions for p in message.points])[:, order],
                np.array([p.velocities for p in message.points])[:, order])
            if not self._groups[controller.topic].execute(plan, now_ns):
                self.get_logger().error(f"{controller.topic}: trajectory refused (all past, not finite or not at rest)")

        return execute

    def _publish_joints(self) -> None:
        now = self.get_clock().now()
        positions, velocities = self.positions(now.nanoseconds)
        message = JointState(name=self._names, position=positions, velocity=velocities)
        message.header.stamp = now.to_msg()
        self._states.publish(message)

    def _publish_images(self) -> None:
        now = self.get_clock().now()
        positions, _ = self.positions(now.nanoseconds)
        for camera, publisher in enumerate(self._images):
            publisher.publish(image_message(render(camera, positions), now.to_msg()))


def image_message(frame: np.ndarray, stamp: Time) -> Image:
    """uint8 [h, w, 3] to rgb8; `tobytes` because assigning an array element by element takes 200 ms."""
    message = Image(height=frame.shape[0], width=frame.shape[1], encoding="rgb8", step=frame.shape[1] * 3)
    message.header.stamp = stamp
    message.data = frame.tobytes()
    return message


def main(args: list[str] | None = None) -> int:
    rclpy.init(args=args)
    node = SimRobot()
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass  # the way this node is meant to end
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
