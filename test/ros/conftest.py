"""Real rclpy over loopback; every test has nodes of its own."""

from __future__ import annotations

import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2 (pip install 'pi05_ros[ros]', or source a ROS installation)")

from fake_policy import FakePolicy  # noqa: E402
from rclpy.experimental import EventsExecutor  # noqa: E402
from robot_stand_in import RobotStandIn  # noqa: E402

from pi05_ros.ros.policy_node import PolicyNode  # noqa: E402


@pytest.fixture
def executor():
    rclpy.init()
    executor = EventsExecutor()
    yield executor
    for node in executor.get_nodes():
        node.destroy_node()
    executor.shutdown()
    rclpy.try_shutdown()


@pytest.fixture
def robot(executor):
    return RobotStandIn(executor)


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
