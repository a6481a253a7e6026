"""The other side of the wire for a soak: clock, sensors, prompt and requests to the node; what it says comes back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import TransitionEvent
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.srv import SetParameters
from rclpy.client import Client
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from rclpy.task import Future
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.ros.conversions import to_time
from pi05_ros.ros.lifecycle_client import TRANSITIONS
from pi05_ros.ros.subscriptions import TOPICS

TARGET = "/pi05_policy"
ANSWER_S = 5.0  # of real time; a request to a node that was killed is never answered


class Wire(Node):
    """Args: context: of rclpy; on_*: take what the node publishes."""

    def __init__(self, context: Any, slots: tuple[str, ...], on_trajectory: Callable[[JointTrajectory], None],
                 on_provenance: Callable[[DiagnosticArray], None], on_diagnostics: Callable[[DiagnosticArray], None],
                 on_transition: Callable[[TransitionEvent], None]) -> None:
        super().__init__("soak", context=context, enable_rosout=False, start_parameter_services=False)
        self._ticks = self.create_publisher(Clock, "/clock", 10)
        self._sensors = {slot: self._sensor(slot) for slot in slots}
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.prompt = self.create_publisher(String, f"{TARGET}/prompt", latched)
        for kind, name, take in ((JointTrajectory, f"{TARGET}/trajectory", on_trajectory),
                                 (DiagnosticArray, f"{TARGET}/provenance", on_provenance),
                                 (DiagnosticArray, "/diagnostics", on_diagnostics),
                                 (TransitionEvent, f"{TARGET}/transition_event", on_transition)):
            self.create_subscription(kind, name, take, 100)
        self._change = self.create_client(ChangeState, f"{TARGET}/change_state")
        self._state = self.create_client(GetState, f"{TARGET}/get_state")
        self._reset = self.create_client(Trigger, f"{TARGET}/reset")
        self._set = self.create_client(SetParameters, f"{TARGET}/set_parameters")
        self._asked: list[tuple[float, Client, Future]] = []

    def tick(self, now_ns: int) -> None:
        stamp: Time = to_time(now_ns)
        self._ticks.publish(Clock(clock=stamp))

    def publish(self, slot: str, message: Any) -> None:
        self._sensors[slot].publish(message)

    def restart_publisher(self, slot: str) -> None:
        self.destroy_publisher(self._sensors[slot])
        self._sensors[slot] = self._sensor(slot)

    def transition(self, name: str, then: Callable[[bool], None]) -> None:
        request = ChangeState.Request()
        request.transition.id = TRANSITIONS[name]
        self._ask(self._change, request, lambda answer: then(answer.success))

    def ask_state(self, then: Callable[[str], None]) -> None:
        self._ask(self._state, GetState.Request(), lambda answer: then(answer.current_state.label))

    def reset(self, then: Callable[[bool], None]) -> None:
        self._ask(self._reset, Trigger.Request(), lambda answer: then(answer.success))

    def storm(self, values: list[tuple[str, Any]], then: Callable[[list[bool]], None]) -> None:
        messages: list[ParameterMessage] = [Parameter(name, value=value).to_parameter_msg() for name, value in values]
        self._ask(self._set, SetParameters.Request(parameters=messages),
                  lambda answer: then([result.successful for result in answer.results]))

    def forget_requests(self, older_than_s: float = ANSWER_S) -> None:
        """Those that nobody will answer any more."""
        now_s = time.monotonic()
        for asked_s, client, future in self._asked:
            if not future.done() and now_s - asked_s >= older_than_s:
                client.remove_pending_request(future)
                future.cancel()
        self._asked = [one for one in self._asked if not one[2].done()]

    def _ask(self, client: Client, request: Any, then: Callable[[Any], None]) -> None:
        def answered(future: Future) -> None:
            if not future.cancelled() and (answer := future.result()) is not None:
                then(answer)

        future = client.call_async(request)
        future.add_done_callback(answered)
        self._asked.append((time.monotonic(), client, future))

    def _sensor(self, slot: str) -> Any:
        kind = JointState if slot == "state" else Image
        return self.create_publisher(kind, f"{TARGET}/{TOPICS.get(slot, 'joint_states')}", qos_profile_sensor_data)
