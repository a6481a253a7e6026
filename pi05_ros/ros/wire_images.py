"""Image messages as they come over the wire (CDR), read without copying: rclpy's own messages cost twice the time.

They are taken serialised (frame_subscription.py, or `raw=True`); pixels are a view of them until they are converted.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pi05_ros.errors import ObservationError

HEADER_BYTES = 4  # of the encapsulation; alignment counts from behind it
# Numbers in the byte orders of plain CDR, the format of ROS 2's messages.
PLAIN_CDR = {start: {kind: struct.Struct(order + kind) for kind in "IiB"}
             for start, order in ((b"\x00\x00", ">"), (b"\x00\x01", "<"))}


@dataclass(frozen=True)
class WireImage:
    """sensor_msgs/Image; `cdr` is the whole message, in which the data begins at `data_at`."""

    stamp_ns: int
    height: int
    width: int
    encoding: str
    step: int
    data: memoryview
    data_at: int
    cdr: bytes | memoryview


@dataclass(frozen=True)
class WireCompressedImage:
    """sensor_msgs/CompressedImage."""

    stamp_ns: int
    format: str
    data: memoryview
    data_at: int = 0


class Reader:
    """Fields in their order."""

    def __init__(self, cdr: bytes | memoryview) -> None:
        kinds = PLAIN_CDR.get(bytes(cdr[:2]))
        if kinds is None:
            raise ValueError(f"representation {bytes(cdr[:2]).hex()}")
        self._body, self._kinds, self._at = memoryview(cdr)[HEADER_BYTES:], kinds, 0

    def number(self, kind: str = "I") -> int:
        """`kind` as in `struct`: I unsigned and i signed 32 bits, B one byte."""
        stored = self._kinds[kind]
        at = self._at + -self._at % stored.size
        self._at = at + stored.size
        return stored.unpack_from(self._body, at)[0]

    def sequence(self) -> memoryview:
        """Bytes with their number in front."""
        count = self.number()
        found = self._body[self._at:self._at + count]
        if len(found) < count:
            raise ValueError(f"{len(found)} of {count} bytes")
        self._at += count
        return found

    @property
    def end(self) -> int:
        """Of what was read, in the message."""
        return HEADER_BYTES + self._at

    def text(self) -> str:
        return bytes(self.sequence()).rstrip(b"\0").decode()

    def stamp_ns(self) -> int:
        """Of a std_msgs/Header; its frame is passed over."""
        seconds = self.number("i")
        nanoseconds = self.number()
        self.sequence()
        return seconds * 1_000_000_000 + nanoseconds


def read_image(cdr: bytes | memoryview) -> WireImage:
    """Raises ObservationError for what is no such message."""
    try:
        reader = Reader(cdr)
        stamp, height, width, encoding = reader.stamp_ns(), reader.number(), reader.number(), reader.text()
        reader.number("B")  # is_bigendian
        step, data = reader.number(), reader.sequence()
        return WireImage(stamp, height, width, encoding, step, data, reader.end - len(data), cdr)
    except (ValueError, struct.error) as error:
        raise _damaged("sensor_msgs/Image", cdr, error) from error


def read_compressed_image(cdr: bytes) -> WireCompressedImage:
    """Raises ObservationError for what is no such message."""
    try:
        reader = Reader(cdr)
        return WireCompressedImage(reader.stamp_ns(), reader.text(), reader.sequence())
    except (ValueError, struct.error) as error:
        raise _damaged("sensor_msgs/CompressedImage", cdr, error) from error


def _damaged(name: str, cdr: bytes | memoryview, error: Exception) -> ObservationError:
    return ObservationError("image message", expected=f"a {name} in plain CDR", received=f"{len(cdr)} bytes: {error}",
                            way_out="Check the publisher's ROS distribution and middleware.", cause="wire format")
