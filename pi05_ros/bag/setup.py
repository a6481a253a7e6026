"""The policy of a recorded run, loaded as the node loaded it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pi05_ros.bag.replay import Run
from pi05_ros.errors import BagError
from pi05_ros.ros import parameters
from pi05_ros.ros.loading import load
from pi05_ros.ros.subscriptions import without_cameras
from pi05_ros.runtime.policy import Policy
from pi05_ros.transforms.robot_loader import load_robot


def load_policy(run: Run, changed: Mapping[str, Any], say: Callable[[str], object]) -> Policy:
    """`changed`: parameters of the node to replace.

    Raises:
        BagError: the bag lacks the parameters, and `changed` does not even name the robot.
        ConfigError, CheckpointError, BackendError, WorkerError: as the node.
    """
    values = run.values
    if values is None:
        if "robot" not in changed:
            raise BagError("bag", expected="the node's parameters", received="none",
                           way_out="Give --robot, and the model where it was not the default.")
        values = {}
    values = {spec.name: spec.default for spec in parameters.PARAMETERS} | values | dict(changed)
    parameters.check(values)
    robot = without_cameras(load_robot(values["robot"]), values["absent_cameras"])
    return load(Policy.load, robot, values, say, lambda: False).policy
