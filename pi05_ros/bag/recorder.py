"""`pi05 record`: everything that goes into the policy node and comes out of it, serialised as it is on the wire.

Runs beside the node, in a process of its own, so that recording cannot slow it down or stop it.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import ParameterEvent
from rcl_interfaces.srv import GetParameters, ListParameters
from rclpy.event_handler import SubscriptionEventCallbacks, UnsupportedEventTypeError
from rclpy.executors import ExternalShutdownException
from rclpy.experimental import EventsExecutor
from rclpy.node import Node
from rclpy.parameter import parameter_value_to_python
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.bag.topics import PARAMETERS, PROMPT, PROVENANCE, STATE
from pi05_ros.bag.writer import Topic
from pi05_ros.bag.writing import WriterThread
from pi05_ros.schema import CAMERAS

KINDS = {"sensor_msgs/msg/Image": Image, "sensor_msgs/msg/CompressedImage": CompressedImage,
         "sensor_msgs/msg/JointState": JointState, "std_msgs/msg/String": String,
         "trajectory_msgs/msg/JointTrajectory": JointTrajectory, "diagnostic_msgs/msg/DiagnosticArray": DiagnosticArray,
         "rcl_interfaces/msg/ParameterEvent": ParameterEvent}
SENSORS = {"sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/JointState"}
LOOK_EVERY_S = 0.2


class Recorder(Node):
    """Subscribes to `topics` at once, and to all else that `target` hears and says when it is seen.

    `lost` counts, by topic, messages that the middleware lost on the way here.
    """

    def __init__(self, target: str, topics: Mapping[str, str], out: WriterThread, **kwargs: Any) -> None:
        super().__init__("pi05_recorder", **kwargs)
        self._target, self._out = target, out
        self._parameters_topic = topics[PARAMETERS]
        self.lost: Counter[str] = Counter()
        self.subscribed: set[str] = set()
        self.parameters_known = False
        self._list = self.create_client(ListParameters, f"{target}/list_parameters")
        self._get = self.create_client(GetParameters, f"{target}/get_parameters")
        self._asked_s = -LOOK_EVERY_S
        for role, name in topics.items():
            if role in CAMERAS:
                self._subscribe(name, "sensor_msgs/msg/CompressedImage" if name.endswith("/compressed")
                                else "sensor_msgs/msg/Image")
        self._subscribe(topics[STATE], "sensor_msgs/msg/JointState")
        self._subscribe(topics[PROMPT], "std_msgs/msg/String", latched=True)
        self._subscribe(f"{target}/trajectory", "trajectory_msgs/msg/JointTrajectory")
        for name in (topics[PROVENANCE], "/diagnostics"):
            self._subscribe(name, "diagnostic_msgs/msg/DiagnosticArray")
        self._subscribe("/parameter_events", "rcl_interfaces/msg/ParameterEvent")
        self.create_timer(LOOK_EVERY_S, self._look)
        self._look()

    def _subscribe(self, name: str, kind: str, latched: bool = False) -> None:
        if name in self.subscribed:
            return
        self.subscribed.add(name)
        topic = Topic(name, kind, latched, reliable=kind not in SENSORS)
        quality = QoSProfile(
            depth=1 if latched else 100,
            reliability=ReliabilityPolicy.RELIABLE if topic.reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE)

        def store(cdr: bytes) -> None:
            self._out.put(topic, time.time_ns(), cdr)

        def count(event: Any) -> None:
            self.lost[name] += event.total_count_change

        try:
            self.create_subscription(KINDS[kind], name, store, quality, raw=True,
                                     event_callbacks=SubscriptionEventCallbacks(message_lost=count))
        except UnsupportedEventTypeError:
            self.get_logger().warning(f"{name}: this middleware does not count lost messages")
            self.create_subscription(KINDS[kind], name, store, quality, raw=True)

    def _look(self) -> None:
        """For topics of the node that are new, and until its parameters are known."""
        namespace, _, node = self._target.rpartition("/")
        for ask in (self.get_subscriber_names_and_types_by_node, self.get_publisher_names_and_types_by_node):
            try:
                found = ask(node, namespace or "/")
            except rclpy.node.NodeNameNonExistentError:
                return
            for name, kinds in found:
                if kinds[0] in KINDS:
                    self._subscribe(name, kinds[0], latched=kinds[0] == "std_msgs/msg/String")
        waited = time.monotonic() - self._asked_s > 2.0  # an answer can be lost while both ends meet
        if not self.parameters_known and waited and self._list.service_is_ready() and self._get.service_is_ready():
            self._asked_s = time.monotonic()
            self._list.call_async(ListParameters.Request()).add_done_callback(self._on_names)

    def _on_names(self, answer: Future) -> None:
        names = answer.result().result.names
        self._get.call_async(GetParameters.Request(names=names)).add_done_callback(
            lambda values: self._on_values(names, values))

    def _on_values(self, names: list[str], answer: Future) -> None:
        if self.parameters_known:
            return
        values = map(parameter_value_to_python, answer.result().values)
        text = json.dumps(dict(zip(names, values, strict=True)))
        topic = Topic(self._parameters_topic, "std_msgs/msg/String", latched=True)
        self._out.put(topic, time.time_ns(), serialize_message(String(data=text)))
        self.parameters_known = True


def record(target: str, topics: Mapping[str, str], out: WriterThread, duration_s: float,
           say: Callable[[str], object]) -> Recorder:
    """Until SIGINT, SIGTERM, the duration (0: none) or a failure of `out`; then the recorder, for what it counted.

    `out` stays open: the caller closes it.
    """
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    recorder = Recorder(target, topics, out)
    executor = EventsExecutor()
    executor.add_node(recorder)
    say(f"recording {target} to {out.writer.directory}")
    end_s = time.monotonic() + duration_s if duration_s else float("inf")
    try:
        while not stopped and out.failure is None and time.monotonic() < end_s:
            executor.spin_once(timeout_sec=0.1)
    except ExternalShutdownException:
        pass  # as good a reason to stop as a signal
    finally:
        executor.remove_node(recorder)
        recorder.destroy_node()
        rclpy.try_shutdown()
        for number, handler in former.items():
            signal.signal(number, handler)
    return recorder
