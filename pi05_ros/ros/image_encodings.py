"""The common image encodings to RGB, for installations without cv_bridge."""

from __future__ import annotations

import numpy as np

from pi05_ros.errors import ObservationError

# encoding -> (bytes per pixel, channels of RGB within them; one channel is repeated)
ENCODINGS = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "8UC3": (3, (2, 1, 0)),  # OpenCV's order, as cv_bridge takes it
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "8UC4": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
    "8UC1": (1, (0, 0, 0)),
}


def to_rgb(encoding: str, data: bytes | memoryview, height: int, width: int, step: int, name: str) -> np.ndarray:
    """Raw rows of `step` bytes to uint8 [height, width, 3] RGB; rgb8 without padding is not copied.

    Raises:
        ObservationError: unknown encoding, empty image, or fewer bytes than the sizes say.
    """
    if encoding not in ENCODINGS:
        raise ObservationError(f"image '{name}'", expected="an encoding among " + ", ".join(ENCODINGS),
                               received=f"'{encoding}'", cause="encoding",
                               way_out="Have the driver publish rgb8 or bgr8, or install ROS's cv_bridge.")
    pixel, order = ENCODINGS[encoding]
    check_size(data, height, width, step, pixel, name)
    rows = np.frombuffer(data, np.uint8, count=height * step).reshape(height, step)
    pixels = rows[:, : width * pixel].reshape(height, width, pixel)
    return pixels if order == tuple(range(pixel)) else pixels[:, :, list(order)]


def check_size(data: bytes | memoryview, height: int, width: int, step: int, pixel: int, name: str) -> None:
    if height < 1 or width < 1:
        raise ObservationError(f"image '{name}'", expected="at least 1x1 pixels", received=f"{width}x{height}",
                               way_out="Check the camera driver.", cause="image size")
    if step < width * pixel or len(data) < height * step:
        raise ObservationError(f"image '{name}'", expected=f"{height} rows of step >= {width * pixel} bytes",
                               received=f"step {step} and {len(data)} bytes", way_out="Check the camera driver.",
                               cause="image size")
