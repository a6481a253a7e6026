"""Messages to arrays and back, without a node."""

import io
import sys
import types

import numpy as np
import pytest
from PIL import Image as Picture
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image

from pi05_ros.errors import ObservationError
from pi05_ros.ros import conversions
from pi05_ros.ros.image_encodings import ENCODINGS, to_rgb
from pi05_ros.ros.wire_images import read_compressed_image, read_image


def wire(message):
    """As a subscription with raw=True hands it over."""
    cdr = serialize_message(message)
    return read_image(cdr) if isinstance(message, Image) else read_compressed_image(cdr)


FRAME = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize(("encoding", "stored", "expected"), [
    ("rgb8", FRAME, FRAME),
    ("bgr8", FRAME[:, :, ::-1], FRAME),
    ("rgba8", np.dstack([FRAME, FRAME[:, :, :1]]), FRAME),
    ("bgra8", np.dstack([FRAME[:, :, ::-1], FRAME[:, :, :1]]), FRAME),
    ("mono8", FRAME[:, :, :1], np.repeat(FRAME[:, :, :1], 3, axis=2)),
])
@pytest.mark.parametrize("padding", [0, 5])
def test_common_encodings_become_rgb_with_or_without_row_padding(encoding, stored, expected, padding):
    rows = stored.reshape(5, -1)
    data = np.pad(rows, ((0, 0), (0, padding))).tobytes()
    found = to_rgb(encoding, data, 5, 7, rows.shape[1] + padding, "cam")
    np.testing.assert_array_equal(found, expected)


def test_rgb8_is_a_view():
    data = bytearray(FRAME.tobytes())
    view = to_rgb("rgb8", data, 5, 7, 21, "cam")
    data[0] ^= 0xFF
    assert view[0, 0, 0] != FRAME[0, 0, 0]


@pytest.mark.parametrize(("encoding", "height", "step", "data", "cause"), [
    ("yuv422", 5, 21, b"\0" * 105, "encoding"), ("rgb8", 0, 21, b"", "image size"),
    ("rgb8", 5, 20, b"\0" * 105, "image size"), ("rgb8", 5, 21, b"\0" * 104, "image size"),
])
def test_what_cannot_be_an_image_is_refused_by_cause(encoding, height, step, data, cause):
    with pytest.raises(ObservationError) as caught:
        to_rgb(encoding, data, height, 7, step, "cam")
    assert caught.value.cause == cause


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_compressed_images_are_decoded(kind):
    buffer = io.BytesIO()
    Picture.fromarray(np.full((8, 8, 3), (200, 100, 50), np.uint8)).save(buffer, kind)
    decode, _ = conversions.image_decoder()
    found = decode(wire(CompressedImage(format=kind.lower(), data=buffer.getvalue())), "cam")
    np.testing.assert_allclose(found, np.full((8, 8, 3), (200, 100, 50)), atol=3)


def test_a_damaged_compressed_image_is_refused():
    with pytest.raises(ObservationError, match="JPEG or PNG"):
        conversions.decode_plain(wire(CompressedImage(format="jpeg", data=b"\xff\xd8nothing")), "cam")


@pytest.fixture
def cv_bridge(monkeypatch):
    """A stand-in with cv_bridge's interface that knows one unusual encoding."""
    module = types.ModuleType("cv_bridge")

    class CvBridgeError(TypeError):
        pass

    class CvBridge:
        def imgmsg_to_cv2(self, message, desired_encoding):
            assert desired_encoding == "rgb8" and isinstance(message, Image)
            if message.encoding != "yuv422":
                raise CvBridgeError("unknown")
            return FRAME

    module.CvBridge, module.CvBridgeError = CvBridge, CvBridgeError
    monkeypatch.setitem(sys.modules, "cv_bridge", module)


def test_cv_bridge_converts_where_it_is_installed(cv_bridge):
    decode, name = conversions.image_decoder()
    assert name == "cv_bridge"
    message = Image(encoding="yuv422", height=5, width=7, step=14, data=bytes(70))
    np.testing.assert_array_equal(decode(wire(message), "cam"), FRAME)
    plain = Image(encoding="rgb8", height=5, width=7, step=21, data=FRAME.tobytes())
    np.testing.assert_array_equal(decode(wire(plain), "cam"), FRAME)


def test_an_encoding_that_cv_bridge_does_not_know_is_refused(cv_bridge):
    decode, _ = conversions.image_decoder()
    with pytest.raises(ObservationError, match="cv_bridge converts"):
        decode(wire(Image(encoding="odd", height=5, width=7, step=14, data=bytes(70))), "cam")


def test_every_encoding_of_the_table_is_eight_bit_colour():
    assert all(max(order) < pixel for pixel, order in ENCODINGS.values())
