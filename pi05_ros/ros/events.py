"""What the middleware tells of a subscription or publisher: messages lost, partners of another QoS or type.

rclpy has handlers that its executor calls. Here they are asked now and then: under EventsExecutor (rclpy 7.1.6) a
process ends with a segmentation fault where a handler goes while an event waits for it (ros2/rclpy, issue 1644).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rclpy.event_handler import EventHandler
from rclpy.impl.implementation_singleton import rclpy_implementation


class _AllReady:
    """A wait set in which everything is ready."""

    def add_event(self, event: object) -> int:
        return 0

    def is_ready(self, kind: str, index: int) -> bool:
        return True


class Events:
    """Handlers that no node knows. Theirs are the events that count: `total_count_change`.

    Args:
        warn: takes a line.
    """

    def __init__(self, warn: Callable[[str], object]) -> None:
        self._warn = warn
        self._handlers: list[EventHandler] = []

    def watch(self, handlers: Iterable[EventHandler]) -> None:
        """As `create_event_handlers` of rclpy makes them."""
        for handler in handlers:
            handler.add_to_wait_set(_AllReady())
            self._handlers.append(handler)

    def ask(self) -> None:
        """Calls back where something happened since the last time. A handler that fails is asked no more."""
        for handler in list(self._handlers):
            handler.is_ready(_AllReady())
            try:
                event = handler.take_data()
            except rclpy_implementation.RCLError as error:
                self._warn(f"middleware: expected word of {handler.event_type.name}, received an error ({error}). "
                           "These are counted no more, all else goes on; clean up and configure to count them again.")
                self._handlers.remove(handler)
                handler.destroy()
                continue
            if event is not None and event.total_count_change:
                handler.callback(event)

    def destroy(self) -> None:
        """Before what the handlers belong to."""
        for handler in self._handlers:
            handler.destroy()
        self._handlers.clear()
