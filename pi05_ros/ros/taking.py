"""Messages taken as they came over the wire (CDR) into memory of ours.

rclpy makes new bytes of each, with the interpreter's lock held. With the C function beneath it the middleware copies
the message to where it shall stay, and other threads run meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from pi05_ros.errors import ObservationError
from pi05_ros.ros.rcl import Allocate, Allocator, Deallocate, Message, Reallocate, ZeroAllocate, library

ALIGNMENT = 64  # of the pixels: a cache line
NO_MESSAGE = 401  # RCL_RET_SUBSCRIPTION_TAKE_FAILED

# Nobody else asks this allocator for memory, or may free ours.
NONE, NONE_OF_ZEROS = Allocate(lambda size, state: None), ZeroAllocate(lambda number, size, state: None)
KEEP = Deallocate(lambda pointer, state: None)


def plain_memory(size: int) -> np.ndarray:
    return np.empty(size, np.uint8)


class Taker:
    """Takes the messages of one subscription, each into new memory with room for one like the last.

    Args:
        memory: gives so many bytes that nobody has; raises ObservationError where there are none.

    `lead`: bytes in front of a message's pixels, where they shall be aligned.
    """

    def __init__(self, memory: Callable[[int], np.ndarray]) -> None:
        """Raises OSError or AttributeError where rclpy's library is another than this file knows."""
        self._memory: Callable[[int], np.ndarray] = plain_memory
        self._library = library()
        self.lead = 0
        self._size = 0  # of the last message
        self._held, self._start = plain_memory(0), 0
        self._failure: Exception | None = None
        self._message = Message(allocator=Allocator(NONE, KEEP, Reallocate(self._reallocate), NONE_OF_ZEROS))
        self._check()
        self._memory = memory

    def take(self, subscription: int) -> memoryview | None:
        """The next message of the rcl_subscription_t at this address, or None.

        Raises:
            ObservationError: there was no memory for it, or the middleware failed; it is gone.
        """
        if self._size:
            try:
                self._reserve(self._size)
            except ObservationError:
                pass  # asked again by the middleware, which must be rid of the message
        code = self._library.rcl_take_serialized_message(subscription, ctypes.byref(self._message), None, None)
        held, failure, length = self._held[self._start:], self._failure, self._message.length
        self._release()
        if code == NO_MESSAGE:
            return None
        if code:
            self._library.rcutils_reset_error()
            raise failure or ObservationError(
                "image message", expected="the middleware to hand it over", received=f"error {code} of rcl",
                way_out="If it goes on, restart the publisher and this node.", cause="middleware")
        self._size = length
        return held[:length].data

    def _check(self) -> None:
        """That the library has these structures: it resizes a message through them."""
        code = self._library.rcutils_uint8_array_resize(ctypes.byref(self._message), 3)
        found = code, self._message.capacity, self._message.buffer
        wanted = 0, 3, self._held.ctypes.data + self._start
        self._release()
        if found != wanted:
            self._library.rcutils_reset_error()
            raise AttributeError(f"a message resized to 3 bytes is {found}, not {wanted}")

    def _release(self) -> None:
        self._held, self._start, self._failure = plain_memory(0), 0, None
        self._message.buffer, self._message.capacity, self._message.length = None, 0, 0

    def _reserve(self, size: int) -> int:
        """Memory for a message of this size; gives its address."""
        self._held = self._memory(size + ALIGNMENT - 1)
        address = self._held.ctypes.data
        self._start = -(address + self.lead) % ALIGNMENT
        self._message.buffer, self._message.capacity = address + self._start, size
        return address + self._start

    def _reallocate(self, pointer: int | None, size: int, state: int | None) -> int | None:
        """Called by the middleware for a message of another size; nothing is in its memory yet."""
        try:
            if pointer and size <= len(self._held) - self._start:
                return pointer
            return self._reserve(size)
        except Exception as error:  # no exception passes through C: `take` raises it
            self._failure = error
            return None
