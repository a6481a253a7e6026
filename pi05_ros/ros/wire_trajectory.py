"""JointTrajectory as it goes over the wire (CDR), written from arrays at once: rclpy's own messages, a point at a time,
take ten times as long, and the robot waits meanwhile."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache

import numpy as np

from pi05_ros.runtime.trajectory import JointTrajectoryPlan

LITTLE_ENDIAN = b"\x00\x01\x00\x00"  # plain CDR; alignment counts from behind these bytes


def trajectory_cdr(plan: JointTrajectoryPlan, names: Sequence[str], columns: Sequence[int]) -> bytes:
    """trajectory_msgs/JointTrajectory: the plan's `columns`, as joints `names`; no frame, accelerations or efforts."""
    body = struct.pack("<iI", *divmod(plan.stamp_ns, 1_000_000_000)) + _header(tuple(names))
    body += struct.pack("<I", len(plan.times_s))
    points = _points(plan, columns)
    if len(body) % 8:  # the first positions follow their number at once
        return LITTLE_ENDIAN + body + points[:4] + points[8:]
    return LITTLE_ENDIAN + body + points


@cache
def _header(names: tuple[str, ...]) -> bytes:
    """What stands between the stamp and the number of points."""
    stamp = bytes(8)
    body = stamp + _text("") + _padding(13, 4) + struct.pack("<I", len(names))
    for name in names:
        body += _padding(len(body), 4) + _text(name)
    return (body + _padding(len(body), 4))[len(stamp):]


def _points(plan: JointTrajectoryPlan, columns: Sequence[int]) -> bytes:
    """Each from a multiple of 8 on, where doubles must lie: so 4 bytes of padding stand before them."""
    joints = len(columns)
    points = np.zeros(len(plan.times_s), _layout(joints))
    points["positions"] = points["velocities"] = joints
    points["position"], points["velocity"] = plan.positions[:, columns], plan.velocities[:, columns]
    points["s"], points["ns"] = np.divmod(plan.offsets_ns, 1_000_000_000)
    return points.tobytes()


@cache
def _layout(joints: int) -> np.dtype:
    return np.dtype([("positions", "<u4"), ("pad", "<u4"), ("position", "<f8", (joints,)),
                     ("velocities", "<u4"), ("pad_", "<u4"), ("velocity", "<f8", (joints,)),
                     ("accelerations", "<u4"), ("effort", "<u4"), ("s", "<i4"), ("ns", "<u4")])


def _text(text: str) -> bytes:
    data = text.encode() + b"\0"
    return struct.pack("<I", len(data)) + data


def _padding(length: int, to: int) -> bytes:
    return bytes(-length % to)
