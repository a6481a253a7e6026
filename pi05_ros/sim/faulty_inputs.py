"""What a soak sends: pictures and joints as they should be or damaged, prompts and settings good and bad."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image, JointState

from pi05_ros.ros.conversions import to_time
from pi05_ros.transforms.robot_file import Robot

BESIDE = 0.005  # of its range: how far a joint is from where a second publisher says it is
PROMPTS = ("pick up the block", "", "\0", "\U0001f916" * 50, "\u6f22 \u202e\u0301", "x" * 100_000, "\n\n", " " * 1000)
SETTINGS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("denoising_steps", (1, 10, 20)), ("execution_horizon", (0, 5, 20)), ("max_rate_hz", (0.0, 7.0, 30.0)),
    ("max_input_age_s", (0.2, 0.5)), ("input_timeout_s", (0.3, 1.0)), ("stop_time_s", (0.1, 0.2)),
    ("on_fault", ("hold", "stop_publishing", "x")), ("max_committed_s", (0.8, 1.0, -1.0)), ("seed", (3,)))


def _image(encoding: str = "rgb8", step: int = 6) -> bytes:
    return serialize_message(Image(encoding=encoding, height=2, width=2, step=step, data=bytes(12)))


PICTURES = {"": _image(), "encoding": _image("16UC1"), "size": _image(step=1)}


def picture(stamp_ns: int, kinds: Collection[str] = ()) -> bytes:
    """Serialised; `kinds` of faults damage it."""
    cdr = bytearray(PICTURES[picture_damage(kinds)])
    struct.pack_into("<iI", cdr, 4, *divmod(stamp_ns, 1_000_000_000))
    return bytes(cdr)


def picture_damage(kinds: Collection[str]) -> str:
    return "encoding" if "encoding" in kinds else "size" if "size" in kinds else ""


def joints(robot: Robot, positions: np.ndarray, stamp_ns: int, kinds: Mapping[str, float]) -> JointState:
    """`kinds` of faults, with their amounts, damage it."""
    names, positions = [joint.name for joint in robot.joints], positions.copy()
    if "not_a_number" in kinds:
        positions[int(kinds["not_a_number"] * len(positions))] = np.nan
    first = int("missing_joint" in kinds)
    message = JointState(name=names[first:], position=positions[first:])
    message.header.stamp = to_time(stamp_ns)
    return message


def joint_damage(kinds: Collection[str]) -> str:
    """The cause for which such joints are refused."""
    return "missing joint" if "missing_joint" in kinds else "non-finite joint" if "not_a_number" in kinds else ""
