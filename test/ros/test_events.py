"""What the middleware tells is asked for, and nothing that comes and goes with a configuration is a Waitable."""

from types import SimpleNamespace

import pytest
from rclpy.event_handler import QoSSubscriptionEventType
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.ros.events import Events


class Handler:
    """An rclpy EventHandler whose middleware has `events` to tell."""

    def __init__(self, *events):
        self.events, self.heard, self.destroyed, self._ready = list(events), [], False, False
        self.event_type = QoSSubscriptionEventType.RCL_SUBSCRIPTION_MESSAGE_LOST

    def add_to_wait_set(self, wait_set):
        self.index = wait_set.add_event(self)

    def is_ready(self, wait_set):
        self._ready = wait_set.is_ready("event", self.index)

    def take_data(self):
        assert self._ready and not self.destroyed
        event = self.events.pop(0)
        if isinstance(event, Exception):
            raise event
        return event

    def callback(self, event):
        self.heard.append(event)

    def destroy(self):
        self.destroyed = True


def happened(change):
    return SimpleNamespace(total_count_change=change)


def test_only_what_happened_is_told():
    events, handler = Events(pytest.fail), Handler(happened(0), None, happened(3), happened(0))
    events.watch([handler])
    for _ in range(4):
        events.ask()
    assert [event.total_count_change for event in handler.heard] == [3]
    events.destroy()
    events.ask()
    assert handler.destroyed


def test_a_handler_that_fails_is_warned_of_and_the_others_are_asked_on():
    said = []
    events = Events(said.append)
    broken, well = Handler(rclpy_implementation.RCLError("no")), Handler(happened(1), happened(2))
    events.watch([broken, well])
    events.ask(), events.ask()
    assert len(said) == 1 and "RCL_SUBSCRIPTION_MESSAGE_LOST, received an error (no)" in said[0] and broken.destroyed
    assert [event.total_count_change for event in well.heard] == [1, 2]


def test_lost_messages_are_counted_by_topic_also_those_before_the_end(active, monkeypatch):
    inputs = active.parts.inputs
    lost = [handler for handler in inputs._events._handlers if "message_lost" in str(handler.event_type).lower()]
    assert len(lost) == len(inputs.made)
    second = list(inputs.made)[1]
    monkeypatch.setattr(lost[1], "take_data", lambda: happened(3))
    inputs.ask()
    assert inputs.lost == {second: 3}
    active.trigger_deactivate(), active.trigger_cleanup()
    assert inputs.lost == {second: 6} and active.diagnostics.counted[f"lost.{second}"] == 6


def test_what_the_executor_had_in_hand_at_the_end_is_not_stored(active, robot):
    inputs = active.parts.inputs
    active.trigger_deactivate(), active.trigger_cleanup()
    before = inputs.received.copy()
    for receive in inputs.receive.values():
        assert receive(None) == 0
    assert inputs.received == before


def test_publishers_and_subscribers_that_do_not_fit_are_warned_of(node, robot, capfd):
    unreliable = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    node.set_parameters([Parameter("reliable_images", value=True)])
    assert node.trigger_configure().name == "SUCCESS"
    robot.create_publisher(Image, "/pi05_policy/base_image", unreliable)
    robot.create_subscription(JointTrajectory, "/pi05_policy/trajectory", lambda message: None,
                              QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL))
    said = []

    def warned(topic):
        node.parts.inputs.ask(), node.parts.commands.ask()
        said.extend(line for line in capfd.readouterr().err.splitlines() if "incompatible QoS" in line)
        return any(f"'{topic}'" in line for line in said)

    robot.until(lambda: warned("/pi05_policy/base_image"))
    robot.until(lambda: warned("~/trajectory"))


def test_a_configuration_adds_no_waitable(node):
    before = list(node.waitables)
    assert node.trigger_configure().name == "SUCCESS"
    assert list(node.waitables) == before
    assert node.trigger_cleanup().name == "SUCCESS" and list(node.waitables) == before
