"""Messages broken at random: whatever arrives, the readers give numbers that the node may use, or refuse."""

import numpy as np
import pytest
from fuzzing import damaged, fuzz, refused_or_read
from hypothesis import given
from hypothesis import strategies as st
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image, JointState

from pi05_ros.errors import ObservationError
from pi05_ros.ros.conversions import JointReader, decode_plain
from pi05_ros.ros.image_encodings import ENCODINGS
from pi05_ros.ros.wire_images import read_compressed_image, read_image
from pi05_ros.runtime.chunking import JointLimits
from pi05_ros.transforms.robot_loader import load_robot

ROBOT = load_robot("arm6")
NAMES = [joint.name for joint in ROBOT.joints]
LIMITS = JointLimits(ROBOT)
SIZES = st.sampled_from((0, 1, 2, 3, 4, 6, 255, 2**16, 2**31, 2**32 - 1))
MOVING = st.lists(st.floats() | st.floats(-1, 1), min_size=len(NAMES), max_size=len(NAMES))


@fuzz(200)
@given(names=st.permutations(NAMES) | st.lists(st.sampled_from([*NAMES, "", "other"]), max_size=9),
       positions=MOVING | st.lists(st.floats(), max_size=9))
def test_joint_messages(names, positions):
    reader = JointReader(NAMES, LIMITS)
    for message in (JointState(name=NAMES, position=[0.0] * len(NAMES)), JointState(name=names, position=positions)):
        read = refused_or_read(reader.read, message)
        if not isinstance(read, ObservationError):
            assert read.positions.shape == (len(NAMES),) and LIMITS.plausible(read.positions).all()
    if not isinstance(read, ObservationError):
        assert read.positions.tolist() == [positions[names.index(name)] for name in NAMES]


def decoded(cdr, read):
    return decode_plain(read(cdr), "cam")


def check(cdr, read):
    frame = refused_or_read(decoded, cdr, read)
    assert isinstance(frame, ObservationError) or frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3


@fuzz(200)
@given(encoding=st.sampled_from([*ENCODINGS, "", "16UC1", "RGB8"]), height=SIZES, width=SIZES, step=SIZES,
       data=st.binary(max_size=40))
def test_images_whose_sizes_lie(encoding, height, width, step, data):
    check(serialize_message(Image(encoding=encoding, height=height, width=width, step=step, data=data)), read_image)


@pytest.mark.parametrize(("message", "read"), [
    (Image(encoding="rgb8", height=2, width=3, step=9, data=bytes(18)), read_image),
    (CompressedImage(format="jpeg", data=b"\xff\xd8\xff" + bytes(20)), read_compressed_image)])
@fuzz(150)
@given(data=st.data())
def test_damaged_image_messages(message, read, data):
    check(data.draw(damaged(serialize_message(message))), read)


@fuzz(100)
@given(noise=st.binary(max_size=60), read=st.sampled_from((read_image, read_compressed_image)))
def test_noise_as_image_messages(noise, read):
    check(b"\x00\x01\x00\x00" + noise, read)
