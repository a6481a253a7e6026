"""Drive a lifecycle node from another process through its services."""

from __future__ import annotations

import time
from concurrent.futures import TimeoutError as TooLate
from typing import Any

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.client import Client
from rclpy.executors import Executor
from rclpy.node import Node

from pi05_ros.errors import WorkerError

TRANSITIONS = {
    "configure": Transition.TRANSITION_CONFIGURE,
    "activate": Transition.TRANSITION_ACTIVATE,
    "deactivate": Transition.TRANSITION_DEACTIVATE,
    "cleanup": Transition.TRANSITION_CLEANUP,
}


class LifecycleClient:
    """Calls block while `executor` spins `node`; not for use inside a callback."""

    def __init__(self, node: Node, executor: Executor, target: str) -> None:
        self._executor, self._target = executor, target
        self._change = node.create_client(ChangeState, f"{target}/change_state")
        self._get = node.create_client(GetState, f"{target}/get_state")

    def wait(self, timeout_s: float) -> None:
        """Until the services are there and answer: a reply sent before both ends have met would be lost."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self._change.wait_for_service(1.0) and self._get.wait_for_service(1.0) and self._try_state(1.0):
                return
        raise WorkerError(self._target, expected=f"its lifecycle services within {timeout_s} s", received="no answer",
                          way_out="Look at the node's log; check ROS_DOMAIN_ID and the node's name.")

    def change(self, transition: str | int, timeout_s: float = 60.0) -> bool:
        """Ask for a transition by name or number; True if it succeeded."""
        request = ChangeState.Request()
        request.transition.id = TRANSITIONS[transition] if isinstance(transition, str) else transition
        return self._result(self._change, request, timeout_s).success

    def state(self, timeout_s: float = 10.0) -> str:
        """The label of the present state."""
        return self._result(self._get, GetState.Request(), timeout_s).current_state.label

    def _try_state(self, timeout_s: float) -> str | None:
        try:
            return self.state(timeout_s)
        except TooLate:
            return None

    def _result(self, client: Client, request: Any, timeout_s: float) -> Any:
        future = client.call_async(request)
        self._executor.spin_until_future_complete(future, timeout_s)
        if not future.done():
            client.remove_pending_request(future)
            raise TooLate(f"{self._target}: no answer within {timeout_s} s")
        return future.result()
