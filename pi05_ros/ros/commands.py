"""Outputs of the node: trajectories, one topic a controller, and the provenance of each chunk."""

from __future__ import annotations

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.callback_groups import CallbackGroup
from rclpy.duration import Duration
from rclpy.event_handler import PublisherEventCallbacks
from rclpy.node import Node
from rclpy.publisher import Publisher
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.errors import ObservationError
from pi05_ros.ros.conversions import provenance_message
from pi05_ros.ros.events import Events
from pi05_ros.ros.wire_trajectory import trajectory_cdr
from pi05_ros.runtime.chunking import NON_FINITE, JointLimits
from pi05_ros.runtime.inference_loop import Delivery
from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.transforms.robot_file import Robot


class Commands:
    """Publishes plans and remembers the last one."""

    def __init__(self, node: Node, robot: Robot, limits: JointLimits, group: CallbackGroup) -> None:
        self._node, self._limits, self._group = node, limits, group
        self._events = Events(node.get_logger().warning)
        order = [joint.name for joint in robot.joints]
        self._controllers = [
            (self._publisher(JointTrajectory, f"~/{controller.topic}"), controller.joints,
             [order.index(name) for name in controller.joints]) for controller in robot.controllers]
        self._provenance = self._publisher(DiagnosticArray, "~/provenance")
        self.last: JointTrajectoryPlan | None = None

    def _publisher(self, kind: type, topic: str) -> Publisher:
        made = self._node.create_publisher(kind, topic, 10, callback_group=self._group,
                                           event_callbacks=PublisherEventCallbacks(use_default_callbacks=False))
        self._events.watch(PublisherEventCallbacks().create_event_handlers(self._group, made.handle, topic))
        return made

    def ask(self) -> None:
        """The middleware, for subscribers that do not fit, which it warns of."""
        self._events.ask()

    def publish(self, plan: JointTrajectoryPlan) -> None:
        """To every controller, also where one cannot be reached: its error is raised when the others have theirs.

        Raises:
            ObservationError: numbers that are not finite, or positions far outside the limits: whatever made them, they
                stay here.
        """
        self._check(plan)
        failed: Exception | None = None
        self.last = plan  # the last one even if a controller cannot be reached: the others run it
        for publisher, names, columns in self._controllers:
            try:
                publisher.publish(trajectory_cdr(plan, names, columns))
            except Exception as error:  # the others must hear it first; the caller logs it, with those that follow
                if failed is None:
                    failed = error
                else:
                    failed.add_note(f"and for {', '.join(names)}: {error!r}")
        if failed is not None:
            raise failed

    def _check(self, plan: JointTrajectoryPlan) -> None:
        """Raises as `publish`."""
        if not (np.isfinite(plan.positions).all() and np.isfinite(plan.velocities).all()):
            raise ObservationError("trajectory", expected="finite positions and velocities", received="NaN or infinity",
                                   way_out="Report this: it should have been found before.", cause=NON_FINITE)
        if not self._limits.plausible(plan.positions).all():
            raise ObservationError("trajectory", expected="positions inside the joints' limits, or on the way back to "
                                   "them", received=f"{plan.positions.min():.6g} to {plan.positions.max():.6g}",
                                   way_out="Report this: it should have been found before.", cause=NON_FINITE)

    def rehearse(self, plan: JointTrajectoryPlan) -> None:
        """All of `publish` but what others hear."""
        self._check(plan)
        for _, names, columns in self._controllers:
            trajectory_cdr(plan, names, columns)

    def publish_provenance(self, delivery: Delivery, planned_ns: int, published_ns: int, measured_ns: int,
                           plan: JointTrajectoryPlan) -> None:
        self._provenance.publish(provenance_message(delivery, planned_ns, published_ns, measured_ns, plan))

    def destroy(self, timeout_s: float = 0.5) -> None:
        """Wait until reliable subscribers have the last command, so that a hold outlives this process; then end."""
        self._events.destroy()
        for publisher, _, _ in self._controllers:
            publisher.wait_for_all_acked(Duration(seconds=timeout_s))
            self._node.destroy_publisher(publisher)
        self._node.destroy_publisher(self._provenance)
        self._controllers = []
