"""A robot of two joints, chunks and measurements for it."""

import numpy as np

from pi05_ros.runtime.chunking import JointLimits, JointMeasurement
from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.schema import ActionChunk
from pi05_ros.transforms.robot_file import ControllerSpec, JointSpec, Robot

PERIOD = 0.02
NOW = 1_000_000_000_000


def robot(actions=("position", "position"), meaning="joint_position"):
    """Two joints; the second has wider limits."""
    joints = tuple(JointSpec(f"j{i}", -1.0, 1.0 + i, 2.0 + i, action=a) for i, a in enumerate(actions))
    return Robot("r", meaning, 1 / PERIOD, {}, len(joints), len(joints), joints,
                 (ControllerSpec("trajectory", tuple(j.name for j in joints)),))


LIMITS = JointLimits(robot())


def chunk(actions, age_s=0.1):
    return ActionChunk(np.asarray(actions, np.float32), np.zeros((len(actions), 32), np.float32),
                       NOW - int(age_s * 1e9), PERIOD, "p", 10, 0, 0)


def measured(positions, at=NOW):
    return JointMeasurement(at, np.asarray(positions, float))


def along(line, steps=40, age_s=0.1):
    """A trajectory that has followed the line since its stamp, for so many steps."""
    velocities = np.gradient(line[:steps], PERIOD, axis=0)
    velocities[-1] = 0
    return JointTrajectoryPlan(NOW - int(age_s * 1e9), np.arange(steps) * PERIOD, line[:steps], velocities)
