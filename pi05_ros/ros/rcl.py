"""Functions of rcl, the C library beneath rclpy, that rclpy does not offer: messages from and to memory of ours."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_int, c_size_t, c_void_p
from functools import cache

import numpy as np
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.publisher import Publisher

Allocate = CFUNCTYPE(c_void_p, c_size_t, c_void_p)
Deallocate = CFUNCTYPE(None, c_void_p, c_void_p)
Reallocate = CFUNCTYPE(c_void_p, c_void_p, c_size_t, c_void_p)
ZeroAllocate = CFUNCTYPE(c_void_p, c_size_t, c_size_t, c_void_p)


class Allocator(ctypes.Structure):
    """rcutils_allocator_t."""

    _fields_ = [("allocate", Allocate), ("deallocate", Deallocate), ("reallocate", Reallocate),
                ("zero_allocate", ZeroAllocate), ("state", c_void_p)]


class Message(ctypes.Structure):
    """rcl_serialized_message_t."""

    _fields_ = [("buffer", c_void_p), ("length", c_size_t), ("capacity", c_size_t), ("allocator", Allocator)]


@cache
def library() -> ctypes.CDLL:
    """Raises OSError or AttributeError where it has not what is needed here."""
    found = ctypes.CDLL(rclpy_implementation.__file__)  # finds the functions of all libraries that this one needs
    found.rcl_take_serialized_message.argtypes = [c_void_p, POINTER(Message), c_void_p, c_void_p]
    found.rcl_publish_serialized_message.argtypes = [c_void_p, POINTER(Message), c_void_p]
    found.rcutils_uint8_array_resize.argtypes = [POINTER(Message), c_size_t]
    for function in (found.rcl_take_serialized_message, found.rcl_publish_serialized_message,
                     found.rcutils_uint8_array_resize):
        function.restype = c_int
    found.rcutils_reset_error.argtypes, found.rcutils_reset_error.restype = [], None
    return found


def publisher_of(publisher: Publisher, serialised: bytearray) -> Callable[[], None]:
    """Publishes what `serialised` holds then, from where it is. Raises as `library`."""
    there, function = np.frombuffer(serialised, np.uint8), library().rcl_publish_serialized_message

    def publish() -> None:
        message = Message(there.ctypes.data, len(there), len(there))
        with publisher.handle:
            code = function(publisher.handle.pointer, ctypes.byref(message), None)
        if code:
            library().rcutils_reset_error()
            raise RuntimeError(f"rcl_publish_serialized_message: {code}")

    return publish
