"""Camera frames to 224x224 with padding, as openpi's server does it: PIL, antialiased, uint8 (PI05_SPEC section 8)."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pi05_ros.errors import ObservationError

MAX_PIXELS = 2**25  # of a compressed picture: far above any camera


@dataclass(frozen=True)
class Letterbox:
    """Where a resized frame lies in the square: sizes and offsets in pixels."""

    height: int
    width: int
    top: int
    left: int


def letterbox(height: int, width: int, size: int) -> Letterbox:
    """Keep the aspect ratio, truncate to whole pixels, centre; the odd pixel goes to the bottom or right."""
    ratio = max(width / size, height / size)
    new_height, new_width = int(height / ratio), int(width / ratio)
    if new_height < 1 or new_width < 1:
        raise ObservationError("image", expected="an aspect ratio that leaves a pixel", received=f"{width}x{height}",
                               way_out="Check the camera's resolution.", cause="image size")
    return Letterbox(new_height, new_width, (size - new_height) // 2, (size - new_width) // 2)


def check_frame(name: str, frame: np.ndarray) -> None:
    """Refuse anything but non-empty uint8 [h, w, 3]."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ObservationError(f"image '{name}'", expected="uint8 [h, w, 3] RGB with h, w >= 1",
                               received=f"{frame.dtype} {list(frame.shape)}", way_out="Check the camera driver.",
                               cause="image shape")


def resize_with_pad(frame: np.ndarray, size: int) -> np.ndarray:
    """uint8 [h, w, 3] to uint8 [size, size, 3], black padding; a frame of that size passes unchanged.

    Across first, then down, as Pillow did by itself before version 13, which turns that round for tall frames.
    """
    if frame.shape[:2] == (size, size):
        return frame
    box = letterbox(frame.shape[0], frame.shape[1], size)
    resized = Image.fromarray(np.ascontiguousarray(frame))
    for shape in ((box.width, resized.height), (box.width, box.height)):
        resized = resized.resize(shape, Image.Resampling.BILINEAR)
    out = np.zeros((size, size, 3), np.uint8)
    out[box.top:box.top + box.height, box.left:box.left + box.width] = np.asarray(resized)
    return out


def decompress(data: bytes | memoryview, encoding: str, name: str) -> np.ndarray:
    """JPEG or PNG to uint8 [h, w, 3] RGB, at most MAX_PIXELS. Raises ObservationError."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:  # others may start programs
            if math.prod(picture.size) > MAX_PIXELS:  # a few bytes may unpack to gigabytes
                raise ValueError(f"{picture.size} pixels, more than {MAX_PIXELS}")
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # damaged files make Pillow raise anything: OSError, SyntaxError, ValueError, ...
        raise ObservationError(f"image '{name}'", expected="a compressed picture, JPEG or PNG", cause="encoding",
                               received=f"{len(data)} bytes of '{encoding}': {error}",
                               way_out="Check the publisher's image_transport.") from error
