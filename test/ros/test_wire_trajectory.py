"""What goes over the wire is read back as the message, whatever the alignment."""

import numpy as np
import pytest
from builtin_interfaces.msg import Duration
from rclpy.serialization import deserialize_message
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from pi05_ros.ros.wire_trajectory import trajectory_cdr
from pi05_ros.runtime.trajectory import JointTrajectoryPlan


@pytest.mark.parametrize("names", [["a"], ["grip"], ["shoulder", "elbow_12"], ["j1", "j2", "j3", "jaw", "über"]])
@pytest.mark.parametrize("count", [1, 2, 41])
def test_a_trajectory_is_read_back_as_the_message(names, count):
    rng = np.random.default_rng(count)
    plan = JointTrajectoryPlan(1_700_000_000_000_000_001, np.cumsum(rng.uniform(0.01, 0.9, count)),
                               rng.standard_normal((count, 7)), rng.standard_normal((count, 7)))
    columns = list(rng.permutation(7)[:len(names)])
    message = JointTrajectory(joint_names=names)
    message.header.stamp.sec, message.header.stamp.nanosec = 1_700_000_000, 1
    for time_s, position, velocity in zip(plan.times_s, plan.positions, plan.velocities, strict=True):
        sec, nanosec = divmod(int(round(time_s * 1e9)), 10**9)
        message.points.append(JointTrajectoryPoint(
            positions=position[columns].tolist(), velocities=velocity[columns].tolist(),
            time_from_start=Duration(sec=sec, nanosec=nanosec)))
    assert deserialize_message(trajectory_cdr(plan, names, columns), JointTrajectory) == message
