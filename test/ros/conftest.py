"""Real rclpy over loopback; every test has nodes of its own."""

from __future__ import annotations

import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2 (pip install 'pi05_ros[ros]', or source a ROS installation)")

from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from robot_stand_in import RobotStandIn  # noqa: E402


@pytest.fixture
def executor():
    rclpy.init()
    executor = SingleThreadedExecutor()
    yield executor
    for node in executor.get_nodes():
        node.destroy_node()
    executor.shutdown()
    rclpy.try_shutdown()


@pytest.fixture
def robot(executor):
    return RobotStandIn(executor)
