"""Camera frames from the middleware to where they wait for the worker, in one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from rclpy.callback_groups import CallbackGroup
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.exceptions import InvalidHandle
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.subscription import Subscription
from rclpy.type_support import check_for_type_support
from rclpy.waitable import NumberOfEntities, Waitable
from sensor_msgs.msg import Image

from pi05_ros.errors import ObservationError
from pi05_ros.ros.taking import Taker


class FrameSubscription(Waitable):
    """What Node.create_subscription makes, but the executor leaves the taking of a message to it.

    Args:
        memory: as `Taker` wants it.
        receive: takes a serialised message and gives how many bytes are in front of its pixels.
        refuse: takes the error of a message that there was no memory for.
    """

    def __init__(self, node: Node, topic: str, qos: QoSProfile, group: CallbackGroup,
                 events: SubscriptionEventCallbacks, memory: Callable[[int], np.ndarray],
                 receive: Callable[[memoryview], int], refuse: Callable[[ObservationError], None]) -> None:
        """Raises what `Taker` does, AttributeError or TypeError where rclpy is another; UnsupportedEventTypeError."""
        self._taker, self._receive, self._refuse = Taker(memory), receive, refuse
        self._node, self._index = node, 0
        check_for_type_support(Image)
        with node.handle:
            handle = rclpy_implementation.Subscription(node.handle, Image, topic, qos.get_c_qos_profile())
        try:
            self._address = handle.pointer
            self._made = Subscription(handle, Image, topic, receive, group, qos, True, events)
        except Exception:  # whatever it was, nobody else would end the subscription; raised again
            handle.destroy_when_not_in_use()
            raise
        super().__init__(group)
        for entity in (self, *self.event_handlers):
            node.add_waitable(entity)

    @property
    def topic_name(self) -> str:
        return self._made.topic_name

    @property
    def event_handlers(self) -> Any:
        return self._made.event_handlers

    def destroy(self) -> None:
        for entity in (self, *self.event_handlers):
            self._node.remove_waitable(entity)
        self._made.destroy()

    # ------------------------------------------------------------------ for the executor

    def __enter__(self) -> None:
        self._made.handle.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._made.handle.__exit__(*error)

    def get_num_entities(self) -> NumberOfEntities:
        return NumberOfEntities(num_subs=1)

    def add_to_wait_set(self, wait_set: Any) -> None:
        self._index = wait_set.add_subscription(self._made.handle)

    def is_ready(self, wait_set: Any) -> bool:
        return wait_set.is_ready("subscription", self._index)

    def take_data(self) -> None:
        """Here and not in `execute`, which an executor makes a task for later."""
        try:
            with self._made.handle:
                message = self._taker.take(self._address)
        except InvalidHandle:  # destroyed while it was ready
            return
        except ObservationError as error:
            self._refuse(error)
            return
        if message is not None:
            self._taker.lead = self._receive(message)

    async def execute(self, taken: None) -> None:
        pass
