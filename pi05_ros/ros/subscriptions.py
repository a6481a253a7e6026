"""Inputs of the node: topics to mailbox. Callbacks only store; decoding happens on the worker's thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from pi05_ros.errors import ConfigError, ObservationError
from pi05_ros.ros.conversions import ImageDecoder, JointReader, stamp_ns
from pi05_ros.runtime.chunking import JointMeasurement
from pi05_ros.runtime.mailbox import Mailbox, Stamped
from pi05_ros.schema import CAMERAS, Observation
from pi05_ros.transforms.robot_file import Robot

TOPICS = dict(zip(CAMERAS, ("base_image", "left_wrist_image", "right_wrist_image"), strict=True))


class Subscriptions:
    """Subscribes while it exists; `destroy` ends it.

    Args:
        cameras: the cameras of `schema.CAMERAS` to listen to.
        compressed: to CompressedImage on `<topic>/compressed`, as image_transport names it.
        report: takes an ObservationError for a message that was refused.
        on_prompt: takes the text of ~/prompt.
    """

    def __init__(self, node: Node, robot: Robot, cameras: tuple[str, ...], mailbox: Mailbox, reliable: bool,
                 compressed: bool, report: Callable[[ObservationError], None],
                 on_prompt: Callable[[str], None]) -> None:
        self._node, self._mailbox, self._report, self._on_prompt = node, mailbox, report, on_prompt
        self._joints = JointReader([joint.name for joint in robot.joints])
        images = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE if reliable
                            else ReliabilityPolicy.BEST_EFFORT)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        kind, suffix = (CompressedImage, "/compressed") if compressed else (Image, "")
        self._all = []
        for camera in cameras:
            topic = node.resolve_topic_name(f"~/{TOPICS[camera]}") + suffix  # remap the image topic, not its variants
            self._all.append(node.create_subscription(kind, topic, self._image_callback(camera), images))
        self._all.append(node.create_subscription(JointState, "~/joint_states", self._on_joints,
                                                  qos_profile_sensor_data))
        self._all.append(node.create_subscription(String, "~/prompt", self._on_text, latched))

    def destroy(self) -> None:
        for subscription in self._all:
            self._node.destroy_subscription(subscription)
        self._all.clear()

    def _image_callback(self, camera: str) -> Callable[[Image | CompressedImage], None]:
        return lambda message: self._put(camera, message, stamp_ns(message.header.stamp))

    def _on_text(self, message: String) -> None:
        self._on_prompt(message.data)

    def _on_joints(self, message: JointState) -> None:
        try:
            measured = self._joints.read(message)
        except ObservationError as error:
            self._report(error)
        else:
            self._put(Mailbox.STATE, measured, measured.stamp_ns)

    def _put(self, slot: str, value: Any, stamp: int) -> None:
        try:
            self._mailbox.put(slot, value, stamp, self._node.get_clock().now().nanoseconds)
        except ObservationError as error:
            self._report(error)


def assembler(decode: ImageDecoder) -> Callable[[Mapping[str, Stamped], str], Observation]:
    """A set of messages and a prompt to an Observation stamped by its newest camera (or, without one, its joints)."""

    def assemble(taken: Mapping[str, Stamped], prompt: str) -> Observation:
        state: JointMeasurement = taken[Mailbox.STATE].value
        cameras = {slot: stamped for slot, stamped in taken.items() if slot != Mailbox.STATE}
        images = {camera: decode(stamped.value, camera) for camera, stamped in cameras.items()}
        stamp = max((stamped.stamp_ns for stamped in cameras.values()), default=state.stamp_ns)
        return Observation(images, state.positions.astype(np.float32), prompt, stamp)

    return assemble


def without_cameras(robot: Robot, absent: str) -> Robot:
    """The robot less the cameras that the user says it does not have (comma-separated topic words: base, ...)."""
    short = {topic.removesuffix("_image"): camera for camera, topic in TOPICS.items()}
    names = {name.strip() for name in absent.split(",") if name.strip()}
    if unknown := names - set(short):
        raise ConfigError("absent_cameras", expected="names among " + ", ".join(short),
                          received=", ".join(sorted(unknown)), way_out="Correct the parameter.")
    gone = {short[name] for name in names}
    return replace(robot, cameras={camera: spec for camera, spec in robot.cameras.items() if camera not in gone})
