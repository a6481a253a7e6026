"""Camera frames from the middleware to where they wait for the worker, in one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from rclpy.exceptions import InvalidHandle
from rclpy.subscription import Subscription

from pi05_ros.errors import ObservationError
from pi05_ros.ros.taking import Taker


class FrameSubscription(Subscription):
    """rclpy's subscription, but its messages are taken into memory of ours; `take_frames_directly` makes one.

    An executor reads `raw` just before it takes a message. The message is taken then, and the executor finds none.
    What comes in between goes through rclpy to the callback. `taken` counts what did not.

    (A Waitable would say this plainly, but EventsExecutor of rclpy 7.1.6 makes an event loop for each of its messages,
    and ends the process with a segmentation fault where one is taken away while a message waits for it.)
    """

    taken: int
    _taker: Taker
    _receive: Callable[[memoryview], int]
    _refuse: Callable[[ObservationError], None]
    _address: int

    @property
    def raw(self) -> bool:  # type: ignore[override]
        try:
            with self.handle:
                message = self._taker.take(self._address)
        except InvalidHandle:  # destroyed while it was ready
            return True
        except ObservationError as error:
            self.taken += 1
            self._refuse(error)
            return True
        if message is not None:
            self.taken += 1
            self._taker.lead = self._receive(message)
        return True


def take_frames_directly(subscription: Subscription, memory: Callable[[int], np.ndarray],
                         receive: Callable[[memoryview], int], refuse: Callable[[ObservationError], None]) -> None:
    """Make a FrameSubscription of one that takes serialised messages.

    Args:
        memory: as `Taker` wants it.
        receive: takes a serialised message and gives how many bytes are in front of its pixels.
        refuse: takes the error of a message that there was no memory for.

    Raises:
        OSError, AttributeError, TypeError: rclpy is another than this file knows; the subscription is as it was.
    """
    made: Any = subscription
    taker, address = Taker(memory), made.handle.pointer
    made.taken, made._address, made._taker, made._receive, made._refuse = 0, address, taker, receive, refuse
    made.__class__ = FrameSubscription  # Node.create_subscription knows only its own class
