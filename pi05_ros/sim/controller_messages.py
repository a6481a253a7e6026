"""JointTrajectory as Jazzy's joint_trajectory_controller reads it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.errors import ObservationError
from pi05_ros.ros.conversions import stamp_ns
from pi05_ros.runtime.trajectory import JointTrajectoryPlan


def read_trajectory(message: JointTrajectory, joints: Sequence[str], now_ns: int) -> JointTrajectoryPlan:
    """Columns in the order of `joints`, whatever the message's; a stamp of 0 is now.

    Raises:
        ObservationError: other joints, no points, or points without a position and a velocity for each joint.
    """
    if sorted(message.joint_names) != sorted(joints):
        raise ObservationError("trajectory", expected="exactly the joints " + ", ".join(joints),
                               received=", ".join(message.joint_names) or "none", way_out="Name them in the message.")
    for numbers in ("positions", "velocities"):
        lengths = {len(getattr(point, numbers)) for point in message.points}
        if lengths != {len(joints)}:
            raise ObservationError("trajectory", expected=f"points of {len(joints)} {numbers}",
                                   received=f"{sorted(lengths)} of {len(message.points)} points",
                                   way_out="Give all of them; this controller does not guess.")
    order = [message.joint_names.index(joint) for joint in joints]
    times = [point.time_from_start.sec + point.time_from_start.nanosec * 1e-9 for point in message.points]
    return JointTrajectoryPlan(
        stamp_ns(message.header.stamp) or now_ns, np.array(times),
        np.array([point.positions for point in message.points])[:, order],
        np.array([point.velocities for point in message.points])[:, order])
