"""A bag of a robot that somebody else drove: at each moment, what its joints did next stands for the recorded chunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from pi05_ros.bag.reader import read_messages
from pi05_ros.bag.replay import Made, Run, input_slots, stamp_of
from pi05_ros.bag.topics import PROMPT, STATE
from pi05_ros.errors import BagError, ConfigError, ObservationError
from pi05_ros.ros.conversions import JointReader
from pi05_ros.runtime.chunking import JointLimits
from pi05_ros.runtime.mailbox import Mailbox
from pi05_ros.transforms.robot_file import Robot


def driven_run(bag: Path, topics: Mapping[str, str], robot: Robot, horizon: int, prompt: str | None = None,
               every_s: float = 0.5) -> Run:
    """Sets of inputs as the node would have paired them, `every_s` apart at least, each with the positions that the
    joints had at its stamp + k * control period, k < horizon.

    Args:
        prompt: instead of the bag's.

    Raises:
        ConfigError: actions that are not positions of joints.
        BagError: no set of inputs, or none that the recording goes on after for a whole chunk; no prompt.
    """
    if robot.action_meaning == "end_effector" or any(joint.action != "position" for joint in robot.joints):
        raise ConfigError(f"robot '{robot.name}'", expected="joint positions as actions, to compare with the joints",
                          received=robot.action_meaning, way_out="Replay a recording of the policy node instead.")
    required = tuple(camera for camera, spec in robot.cameras.items() if spec.required)
    mailbox = Mailbox(required, tuple(camera for camera in robot.cameras if camera not in required))
    reader, slots = JointReader([joint.name for joint in robot.joints], JointLimits(robot)), input_slots(topics)
    sets: list[tuple[dict[str, int], str]] = []
    moves: dict[int, np.ndarray] = {}
    skipped, told, now_ns, last_ns = Counter[str](), prompt, 0, -(10**18)
    for message in read_messages(bag):
        if message.topic == topics[PROMPT] and prompt is None:
            told = deserialize_message(message.data, String).data
        if (slot := slots.get(message.topic)) not in (*robot.cameras, STATE):
            continue
        stamp = stamp_of(message)
        now_ns = max(now_ns, stamp)  # the clock of the stamps, which need not be the recorder's
        try:
            if slot == STATE:
                moves[stamp] = reader.read(deserialize_message(message.data, JointState)).positions
            mailbox.put(slot, None, stamp, now_ns)
            if (taken := mailbox.take(now_ns)) is None:
                continue
        except ObservationError as error:
            skipped[error.cause] += 1
            continue
        stamps = {slot: stamped.stamp_ns for slot, stamped in taken.items()}
        if told is not None and _newest(stamps) - last_ns >= every_s * 1e9:
            last_ns = _newest(stamps)
            sets.append((stamps, told))
    if told is None:
        raise BagError(f"bag {bag}", expected=f"a prompt on {topics[PROMPT]}", received="none",
                       way_out="Give --prompt.")
    return Run(None, _chunks(bag, sets, moves, horizon, robot.control_period_s, skipped))


def _chunks(bag: Path, sets: list[tuple[dict[str, int], str]], moves: dict[int, np.ndarray], horizon: int,
            period_s: float, skipped: Counter[str]) -> list[Made]:
    times = np.array(sorted(moves))
    ahead_ns = np.rint(np.arange(horizon) * period_s * 1e9).astype(np.int64)
    made: list[Made] = []
    for stamps, prompt in sets:
        wanted = _newest(stamps) + ahead_ns
        if wanted[-1] > times[-1]:
            break
        begin = times[0]  # float64 holds nanoseconds of a recording, not those since 1970
        columns = np.array([moves[t] for t in times.tolist()]).T
        actions = np.stack([np.interp(wanted - begin, times - begin, column) for column in columns], axis=1)
        values = {"epoch": "0", "chunk_index": str(len(made)), "seed": "0", "denoising_steps": "10", "prompt": prompt,
                  "observation_stamp_ns": str(_newest(stamps))}
        made.append(Made(values, stamps, actions.astype(np.float32)))
    if not made:
        raise BagError(f"bag {bag}", expected=f"sets of inputs with {horizon * period_s:.1f} s of joints after them",
                       received=f"{len(sets)} sets, {len(moves)} joint states, refused: {dict(skipped) or 'none'}",
                       way_out="Name the topics with --topics, the robot with --robot; see `mcap info`.")
    return made


def _newest(stamps: Mapping[str, int]) -> int:
    """The stamp of the observation: of its newest camera."""
    return max((ns for slot, ns in stamps.items() if slot != STATE), default=stamps[STATE])
