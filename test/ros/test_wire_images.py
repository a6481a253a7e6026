"""Messages read from their bytes: the same fields as rclpy's own, without copies, and no crash on damaged ones."""

import struct
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image

from pi05_ros.errors import ObservationError
from pi05_ros.ros.subscriptions import assembler
from pi05_ros.ros.wire_images import read_compressed_image, read_image
from pi05_ros.runtime.chunking import JointMeasurement
from pi05_ros.runtime.mailbox import Stamped

WORDS = st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF), max_size=9)


def message(kind, frame="cam", sec=7, nanosec=9, **fields):
    out = kind(**fields)
    out.header.frame_id, out.header.stamp.sec, out.header.stamp.nanosec = frame, sec, nanosec
    return out


@given(frame=WORDS, encoding=WORDS, sec=st.integers(-2**31, 2**31 - 1), nanosec=st.integers(0, 2**32 - 1),
       big=st.integers(0, 1), data=st.binary(max_size=40))
def test_an_image_has_the_fields_of_the_message(frame, encoding, sec, nanosec, big, data):
    sent = message(Image, frame, sec, nanosec, encoding=encoding, height=3, width=2, step=6, is_bigendian=big,
                   data=data)
    found = read_image(serialize_message(sent))
    assert (found.encoding, found.height, found.width, found.step) == (encoding, 3, 2, 6)
    assert found.stamp_ns == sec * 10**9 + nanosec and bytes(found.data) == data


@given(frame=WORDS, encoding=WORDS, data=st.binary(max_size=40))
def test_a_compressed_image_has_the_fields_of_the_message(frame, encoding, data):
    found = read_compressed_image(serialize_message(message(CompressedImage, frame, format=encoding, data=data)))
    assert (found.format, bytes(found.data), found.stamp_ns) == (encoding, data, 7 * 10**9 + 9)


def test_pixels_are_a_view_of_the_message():
    cdr = bytearray(serialize_message(message(Image, height=1, width=2, step=6, encoding="rgb8", data=bytes(range(6)))))
    found = read_image(cdr)
    cdr[-1] = 99
    assert found.data[5] == 99


def test_the_other_byte_order_is_read_too():
    little = serialize_message(message(Image, frame="", encoding="", height=3, width=2, step=6))
    swapped = b"\x00\x00\x00\x00" + struct.pack(">iII4sIIIcB2xII", 7, 9, 1, b"", 3, 2, 1, b"\0", 0, 6, 0)
    one, other = read_image(little), read_image(swapped)
    assert (one.stamp_ns, one.height, one.width, one.step) == (other.stamp_ns, other.height, other.width, other.step)


@given(cut=st.integers(0, 100), noise=st.binary(min_size=8, max_size=8))
@pytest.mark.parametrize("read", [read_image, read_compressed_image])
def test_damaged_messages_are_refused(read, cut, noise):
    kind = Image if read is read_image else CompressedImage
    whole = serialize_message(message(kind, data=bytes(60)))
    for damaged in (whole[:min(cut, len(whole) - 60)], b"\x00\x09" + whole[2:]):
        with pytest.raises(ObservationError, match="plain CDR") as caught:
            read(damaged)
        assert caught.value.cause == "wire format"
    try:
        read(whole[:12] + noise + whole[20:])  # may still be a message, of other numbers
    except ObservationError as error:
        assert error.cause == "wire format"


def test_a_message_cut_short_is_refused():
    with pytest.raises(ObservationError, match="of 60 bytes"):
        read_image(serialize_message(message(Image, data=bytes(60)))[:-30])


def test_compressed_cameras_are_decoded_side_by_side():
    from concurrent.futures import ThreadPoolExecutor

    together = threading.Barrier(3, timeout=60)  # broken if one waits for another

    def decode(picture, camera):
        together.wait()
        return np.full((2, 2, 3), picture, np.uint8)

    taken = {camera: Stamped(n, n, n) for n, camera in enumerate(("a", "b", "c"))}
    taken["state"] = Stamped(JointMeasurement(5, np.zeros(2)), 5, 5)
    with ThreadPoolExecutor(3) as pool:
        seen = assembler(decode, pool)(taken, "go")
    assert {camera: int(frame[0, 0, 0]) for camera, frame in seen.images.items()} == {"a": 0, "b": 1, "c": 2}
    assert seen.stamp_ns == 2
