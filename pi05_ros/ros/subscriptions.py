"""Inputs of the node: topics to mailbox. Callbacks only store; decoding happens on the worker's side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np
from rclpy.callback_groups import CallbackGroup
from rclpy.event_handler import SubscriptionEventCallbacks, UnsupportedEventTypeError
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from pi05_ros.errors import ConfigError, ObservationError
from pi05_ros.ros.clock import now_ns
from pi05_ros.ros.conversions import ImageDecoder, JointReader, WireFrame
from pi05_ros.ros.events import Events
from pi05_ros.ros.frame_subscription import FrameSubscription, take_frames_directly
from pi05_ros.ros.wire_images import WireImage, read_compressed_image, read_image
from pi05_ros.runtime.chunking import JointLimits, JointMeasurement
from pi05_ros.runtime.mailbox import Mailbox, Stamped
from pi05_ros.schema import CAMERAS, Observation
from pi05_ros.transforms.robot_file import Robot

TOPICS = dict(zip(CAMERAS, ("base_image", "left_wrist_image", "right_wrist_image"), strict=True))


class Subscriptions:
    """Subscribes while it exists; `destroy` ends it.

    Args:
        cameras: the cameras of `schema.CAMERAS` to listen to.
        compressed: to CompressedImage on `<topic>/compressed`, as image_transport names it.
        frame_memory: gives so many bytes, where pixels shall wait for the worker.
        report: takes an ObservationError for a message that was refused.
        on_prompt: takes the text of ~/prompt.

    By topic: `made` has the subscriptions, `receive` what takes their messages (images serialised), `received` counts
    them, `lost` those that the middleware lost on the way here.
    """

    def __init__(self, node: Node, group: CallbackGroup, robot: Robot, cameras: tuple[str, ...], mailbox: Mailbox,
                 reliable: bool, compressed: bool, frame_memory: Callable[[int], np.ndarray],
                 report: Callable[[ObservationError], None], on_prompt: Callable[[str], None]) -> None:
        self._node, self._group, self._mailbox, self._report, self._on_prompt = node, group, mailbox, report, on_prompt
        self.lost: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self._events = Events(node.get_logger().warning)
        self.made: dict[str, Subscription] = {}
        self.receive: dict[str, Callable[[Any], Any]] = {}
        self._joints = JointReader([joint.name for joint in robot.joints], JointLimits(robot))
        self._frame_memory = frame_memory
        self._told = self._over = False
        images = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE if reliable
                            else ReliabilityPolicy.BEST_EFFORT)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        for camera in cameras:
            topic = node.resolve_topic_name(f"~/{TOPICS[camera]}")  # remap the image topic, not its variants
            if compressed:
                self._subscribe(CompressedImage, f"{topic}/compressed", self._store(camera, read_compressed_image),
                                images, TOPICS[camera], raw=True)
            else:
                self._subscribe_frames(camera, topic, images)
        self._subscribe(JointState, "~/joint_states", self._on_joints, qos_profile_sensor_data, "joint_states")
        self._subscribe(String, "~/prompt", self._on_text, latched, "prompt")

    def ask(self) -> None:
        """The middleware, for messages that it lost and publishers that do not fit; those it warns of."""
        self._events.ask()
        for name, made in self.made.items():
            if isinstance(made, FrameSubscription) and self.received[name] and not made.taken:
                self._copied("its executor takes messages before it asks whether they are raw")

    def destroy(self) -> None:
        self._over = True
        self._events.ask()
        self._events.destroy()
        for made in self.made.values():
            self._node.destroy_subscription(made)
        self.made.clear()

    def _subscribe_frames(self, camera: str, topic: str, qos: QoSProfile) -> None:
        """Taken straight into their memory, or copied there where rclpy is not as this needs it."""
        name = TOPICS[camera]
        self._subscribe(Image, topic, self._store(camera, self._placed), qos, name, raw=True)
        receive, refuse = self._counted(name, self._store(camera, read_image)), self._counted(name, self._report)
        try:
            take_frames_directly(self.made[name], self._frame_memory, receive, refuse)
        except (AttributeError, OSError, TypeError) as error:
            self._copied(f"{type(error).__name__}: {error}")
        else:
            self.receive[name] = receive

    def _copied(self, why: str) -> None:
        if not self._told:
            self._node.get_logger().warning("frames take longer: this rclpy does not let them be taken into memory of "
                                            f"ours ({why})")
        self._told = True

    def _subscribe(self, kind: type, topic: str, callback: Callable[[Any], Any], qos: QoSProfile, name: str,
                   raw: bool = False) -> None:
        def count(event: Any) -> None:
            self.lost[name] += event.total_count_change

        receive = self._counted(name, callback)
        made = self._node.create_subscription(kind, topic, receive, qos, raw=raw, callback_group=self._group,
                                              event_callbacks=SubscriptionEventCallbacks(use_default_callbacks=False))
        self.made[name], self.receive[name] = made, receive
        try:
            handlers = SubscriptionEventCallbacks(message_lost=count).create_event_handlers(
                self._group, made.handle, topic)
        except UnsupportedEventTypeError as error:
            self._node.get_logger().warning(f"{topic}: this middleware does not count lost messages ({error})")
            handlers = SubscriptionEventCallbacks().create_event_handlers(self._group, made.handle, topic)
        self._events.watch(handlers)

    def _counted(self, name: str, callback: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def receive(message: Any) -> Any:
            if self._over:  # the executor had it in hand
                return 0
            self.received[name] += 1
            return callback(message)

        return receive

    def _store(self, camera: str, read: Callable[[Any], WireFrame]) -> Callable[[bytes | memoryview], int]:
        def store(cdr: bytes | memoryview) -> int:
            """Gives where the pixels begin."""
            try:
                message = read(cdr)
            except ObservationError as error:
                self._report(error)
                return 0
            self._put(camera, message, message.stamp_ns)
            return message.data_at

        return store

    def _placed(self, cdr: bytes) -> WireImage:
        """With pixels that need no conversion in their memory; the others are made anew on the worker's side."""
        image = read_image(cdr)
        if image.encoding != "rgb8":
            return image
        memory = self._frame_memory(len(image.data))
        np.copyto(memory, np.frombuffer(image.data, np.uint8))
        return replace(image, data=memory.data, cdr=b"")

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
            self._mailbox.put(slot, value, stamp, now_ns(self._node.get_clock()))
        except ObservationError as error:
            self._report(error)


Assembler = Callable[[Mapping[str, Stamped], str], Observation]


def assembler(decode: ImageDecoder, pool: Executor | None = None) -> Assembler:
    """A set of messages and a prompt to an Observation stamped by its newest camera (or, without one, its joints).

    `pool`: decodes the cameras side by side; for compressed images, where that takes milliseconds.
    """

    def assemble(taken: Mapping[str, Stamped], prompt: str) -> Observation:
        state: JointMeasurement = taken[Mailbox.STATE].value
        cameras = {slot: stamped for slot, stamped in taken.items() if slot != Mailbox.STATE}
        run = pool.map if pool is not None else map
        decoded = run(decode, (stamped.value for stamped in cameras.values()), cameras)
        images = dict(zip(cameras, decoded, strict=True))
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
