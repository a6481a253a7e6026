"""ROS messages to the package's own types and back. No ROS node here, only messages."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import Image, JointState

from pi05_ros.errors import ObservationError
from pi05_ros.ros import image_encodings
from pi05_ros.ros.wire_images import WireCompressedImage, WireImage
from pi05_ros.runtime.chunking import JointLimits, JointMeasurement
from pi05_ros.runtime.inference_loop import Delivery
from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.schema import Guidance
from pi05_ros.transforms.images import decompress

WireFrame = WireImage | WireCompressedImage
ImageDecoder = Callable[[WireFrame, str], np.ndarray]  # (message, camera) -> uint8 [h, w, 3] RGB


def stamp_ns(stamp: Time) -> int:
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def to_time(ns: int) -> Time:
    return Time(sec=ns // 1_000_000_000, nanosec=ns % 1_000_000_000)


def image_message(frame: np.ndarray, stamp: Time) -> Image:
    """uint8 [h, w, 3] to rgb8; `tobytes` because assigning an array element by element takes 200 ms."""
    message = Image(height=frame.shape[0], width=frame.shape[1], encoding="rgb8", step=frame.shape[1] * 3)
    message.header.stamp = stamp
    message.data = frame.tobytes()
    return message


def image_decoder() -> tuple[ImageDecoder, str]:
    """cv_bridge where ROS provides it, otherwise our own few encodings; and the name of the one taken.

    Compressed images are decoded by Pillow either way.
    """
    try:
        from cv_bridge import CvBridge, CvBridgeError
    except ImportError:
        return decode_plain, "built-in encodings (cv_bridge is not installed)"
    bridge = CvBridge()

    def decode(message: WireFrame, camera: str) -> np.ndarray:
        if isinstance(message, WireCompressedImage) or message.encoding == "rgb8":  # for rgb8 a view is cheaper
            return decode_plain(message, camera)
        image_encodings.check_size(message.data, message.height, message.width, message.step, 1, camera)
        try:
            return bridge.imgmsg_to_cv2(deserialize_message(bytes(message.cdr), Image), desired_encoding="rgb8")
        except (CvBridgeError, ValueError, RuntimeError) as error:  # OpenCV's own errors are RuntimeErrors
            raise ObservationError(f"image '{camera}'", expected="an encoding that cv_bridge converts to rgb8",
                                   received=f"'{message.encoding}': {error}", cause="encoding",
                                   way_out="Have the driver publish rgb8 or bgr8.") from error

    return decode, "cv_bridge"


def decode_plain(message: WireFrame, camera: str) -> np.ndarray:
    if isinstance(message, WireCompressedImage):
        return decompress(message.data, message.format, camera)
    return image_encodings.to_rgb(message.encoding, message.data, message.height, message.width, message.step, camera)


class JointReader:
    """JointState to the robot's joints by name; the message's order and its other joints do not matter."""

    def __init__(self, joints: Sequence[str], limits: JointLimits) -> None:
        self._joints, self._limits = tuple(joints), limits
        self._names: Sequence[str] = ()
        self._index: list[int] = []

    def read(self, message: JointState) -> JointMeasurement:
        """Positions alone: drivers often give no velocity, or NaN, for a gripper.

        Raises:
            ObservationError: a missing joint, a wrong length, NaN or infinity, far outside the limits.
        """
        if message.name != self._names:
            self._remember(message.name)
        return JointMeasurement(stamp_ns(message.header.stamp), self._pick(message.position, len(message.name)))

    def _remember(self, names: Sequence[str]) -> None:
        missing = [joint for joint in self._joints if joint not in names]
        if missing:
            raise ObservationError("joint_states", expected="joints " + ", ".join(self._joints),
                                   received="no " + ", ".join(missing), cause="missing joint",
                                   way_out="Correct the joint names in the robot's YAML, or the publisher.")
        self._names, self._index = list(names), [list(names).index(joint) for joint in self._joints]

    def _pick(self, values: Sequence[float], length: int) -> np.ndarray:
        array = np.asarray(values, np.float64)
        if len(array) != length:
            raise ObservationError("joint_states.position", expected=f"{length} numbers, one a name",
                                   received=str(len(array)), way_out="Check the publisher.", cause="joint count")
        picked = array[self._index]
        if not np.isfinite(picked).all():
            bad = [joint for joint, value in zip(self._joints, picked, strict=True) if not np.isfinite(value)]
            raise ObservationError("joint_states.position", expected="finite numbers", cause="non-finite joint",
                                   received="NaN or infinity at " + ", ".join(bad),
                                   way_out="Check the robot's driver; nothing is commanded meanwhile.")
        if not (plausible := self._limits.plausible(picked)).all():
            far = [f"{joint} {value:.6g}" for joint, value, ok in zip(self._joints, picked, plausible, strict=True)
                   if not ok]
            raise ObservationError("joint_states.position", cause="implausible joint", received=", ".join(far),
                                   expected="positions in the robot file's limits, or a quarter of the range beyond",
                                   way_out="Check the robot's driver and its units, or the limits in the robot file.")
        return picked


def provenance_message(delivery: Delivery, planned_ns: int, published_ns: int, measured_ns: int,
                       plan: JointTrajectoryPlan) -> DiagnosticArray:
    """What made a chunk and its trajectory, stamped like it. planned_ns, published_ns: when; measured_ns: stamp of the
    joints it was planned from.

    The chunk itself is in it, bit for bit (little-endian float32, base64): a trajectory holds only what was left of it
    after limits and joining, and a message of its own could be lost without this one.
    """
    chunk = delivery.chunk
    values = {
        "prompt": chunk.prompt,
        "denoising_steps": chunk.num_steps,
        "seed": chunk.seed,
        "chunk_index": chunk.chunk_index,
        "epoch": delivery.epoch,
        "chunk_mode": delivery.join.mode,
        "guidance": guidance_kind(chunk.guidance),
        **guidance_values(chunk.guidance),
        "observation_stamp_ns": chunk.stamp_ns,
        "inputs_complete_ns": delivery.complete_ns,
        "inference_started_ns": delivery.started_ns,
        "planned_ns": planned_ns,
        "published_ns": published_ns,
        "planned_from_stamp_ns": measured_ns,
        "points": len(plan.times_s),
        "actions_shape": "x".join(map(str, chunk.actions.shape)),
        "actions_float32": b64encode(np.ascontiguousarray(chunk.actions, "<f4").tobytes()).decode(),
        **{f"input_stamp_ns.{slot}": ns for slot, ns in delivery.input_stamps_ns.items()},
        **{f"stage_ms.{stage}": f"{ms:.3f}" for stage, ms in chunk.stage_times_ms.items()},
    }
    message = DiagnosticArray(status=[status("pi05_policy: chunk", DiagnosticStatus.OK, "published", values)])
    message.header.stamp = to_time(chunk.stamp_ns)
    return message


def guidance_kind(guidance: Guidance | None) -> str:
    if guidance is None:
        return "none"
    return "trained" if guidance.trained else guidance.jacobian


def guidance_values(guidance: Guidance | None) -> dict[str, object]:
    """What is needed, with the previous chunk, to make the guidance again."""
    if guidance is None:
        return {}
    return {f"guidance_{name}": getattr(guidance, name) for name in ("schedule", "beta", "delay", "end",
                                                                      "previous_index", "previous_stamp_ns")}


def status(name: str, level: bytes, text: str, values: Mapping[str, object]) -> DiagnosticStatus:
    pairs = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
    return DiagnosticStatus(name=name, level=level, message=text, hardware_id="pi05_ros", values=pairs)
