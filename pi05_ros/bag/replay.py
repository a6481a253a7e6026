"""Recorded chunks made again: the inputs that each one consumed, through the code of the node, with its noise."""

from __future__ import annotations

import json
import struct
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import ParameterEvent
from rclpy.parameter import parameter_value_to_python
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from pi05_ros.bag.reader import Recorded, read_messages
from pi05_ros.bag.topics import PARAMETERS, PROVENANCE, STATE
from pi05_ros.errors import BagError
from pi05_ros.ros import parameters
from pi05_ros.ros.conversions import JointReader, image_decoder
from pi05_ros.ros.subscriptions import assembler
from pi05_ros.ros.wire_images import Reader, read_compressed_image, read_image
from pi05_ros.runtime.chunking import JointLimits
from pi05_ros.runtime.joining import tail_of
from pi05_ros.runtime.mailbox import Stamped
from pi05_ros.runtime.policy import Policy
from pi05_ros.schema import CAMERAS, ActionChunk, Guidance, Jacobian, Observation, Schedule

STAMP = "input_stamp_ns."


@dataclass(frozen=True)
class Made:
    """A recorded chunk: what made it, stamps [ns] of its inputs by slot, actions float32 [H, robot_action_dim]."""

    values: Mapping[str, str]
    stamps_ns: Mapping[str, int]
    actions: np.ndarray

    @property
    def name(self) -> str:
        return f"chunk {self.values['chunk_index']} of activation {self.values['epoch']}"


@dataclass
class Run:
    """What a bag says besides its inputs.

    values: the node's parameters, None if the bag lacks them. made: chunks in order. unreadable: provenance without
    what replaying needs, by cause.
    """

    values: dict[str, Any] | None = None
    made: list[Made] = field(default_factory=list)
    unreadable: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Replayed:
    """A recorded chunk and the same made again; None and the reason if that is not possible."""

    made: Made
    chunk: ActionChunk | None
    why: str = ""


def read_run(bag: Path, topics: Mapping[str, str], node: str = "/pi05_policy") -> Run:
    """Raises BagError: no chunks, or a model that changed on the way."""
    run = Run()
    for message in read_messages(bag):
        if message.topic == topics[PROVENANCE]:
            _add_chunk(run, message.data)
        elif message.topic == topics[PARAMETERS]:
            run.values = _snapshot(message)
        elif message.topic == "/parameter_events":
            event = deserialize_message(message.data, ParameterEvent)
            if event.node == node:
                _change(run, event)
    if not run.made:
        raise BagError(f"bag {bag}", expected=f"chunks with their actions on {topics[PROVENANCE]}",
                       received=f"{sum(run.unreadable.values())} messages without them",
                       way_out="Record with `pi05 record`; name the topics with --topics if they were remapped.")
    return run


def _add_chunk(run: Run, cdr: bytes) -> None:
    for status in deserialize_message(cdr, DiagnosticArray).status:
        values = {pair.key: pair.value for pair in status.values}
        try:
            shape = tuple(int(size) for size in values["actions_shape"].split("x"))
            actions = np.frombuffer(b64decode(values["actions_float32"], validate=True), "<f4").reshape(shape)
            for key in ("seed", "chunk_index", "denoising_steps", "epoch", "observation_stamp_ns"):
                int(values[key])
            if values.get("guidance", "none") != "none":
                [float(values[f"guidance_{key}"]) for key in ("delay", "end", "beta", "previous_stamp_ns")]
            stamps = {key.removeprefix(STAMP): int(ns) for key, ns in values.items() if key.startswith(STAMP)}
            run.made.append(Made({"prompt": values["prompt"], **values}, stamps, actions))
        except (KeyError, ValueError) as error:
            run.unreadable[f"{type(error).__name__}: {error}"] += 1


def _snapshot(message: Recorded) -> dict[str, Any]:
    """The node's parameters as our recorder wrote them: a std_msgs/String with JSON."""
    try:
        found = json.loads(deserialize_message(message.data, String).data)
        return {name: value for name, value in found.items() if name in parameters.SPECS}
    except (ValueError, AttributeError, RuntimeError) as error:
        raise BagError(message.topic, expected="a std_msgs/String with parameters in JSON", received=str(error),
                       way_out="Correct the topic map.") from error


def _change(run: Run, event: ParameterEvent) -> None:
    """Those before the snapshot are in it already."""
    if run.values is None:
        return
    for parameter in (*event.new_parameters, *event.changed_parameters):
        name, value = parameter.name, parameter_value_to_python(parameter.value)
        if name not in parameters.SPECS:
            continue
        if run.made and not parameters.SPECS[name].live and run.values.get(name) != value:
            raise BagError("bag", expected="one model in a recording",
                           received=f"{name} = {value!r} after {run.values.get(name)!r}, between chunks",
                           way_out="Record each configuration in a bag of its own.")
        run.values[name] = value


def replay(bag: Path, topics: Mapping[str, str], run: Run, policy: Policy,
           num_steps: int | None = None) -> Iterator[Replayed]:
    """Every chunk of the run, in the order in which its inputs are complete; those without them last.

    Args:
        num_steps: other than recorded.
    """
    waiting = {id(made): made for made in run.made}
    users: dict[tuple[str, int], list[Made]] = {}
    for made in run.made:
        for slot, stamp in made.stamps_ns.items():
            users.setdefault((slot, stamp), []).append(made)
    held: dict[tuple[str, int], Recorded] = {}
    ambiguous: set[tuple[str, int]] = set()
    slots = input_slots(topics)
    make = _Maker(policy, run.made)
    for message in read_messages(bag):
        if message.topic not in slots:
            continue
        key = slots[message.topic], stamp_of(message)
        if key not in users:
            continue
        if key in held and held[key].data != message.data:
            ambiguous.add(key)
        held.setdefault(key, message)
        for made in [made for made in users[key] if id(made) in waiting]:
            keys = [(slot, stamp) for slot, stamp in made.stamps_ns.items()]
            if ambiguous.isdisjoint(keys) and all(key in held for key in keys):
                del waiting[id(made)]
                yield make(made, {slot: held[slot, stamp] for slot, stamp in keys}, num_steps)
                for key in keys:
                    if not any(id(user) in waiting for user in users[key]):
                        held.pop(key, None)
    for made in waiting.values():
        lacking = [f"{slot} stamped {stamp}" + (" (two that differ)" if (slot, stamp) in ambiguous else "")
                   for slot, stamp in made.stamps_ns.items()
                   if (slot, stamp) not in held or (slot, stamp) in ambiguous]
        yield Replayed(made, None, "the bag lacks " + ", ".join(lacking))


class _Maker:
    """Does for a recorded chunk what the node's subscriptions and loop did."""

    def __init__(self, policy: Policy, made: Sequence[Made]) -> None:
        self._policy = policy
        robot = policy.robot
        self._joints = JointReader([joint.name for joint in robot.joints], JointLimits(robot))
        self._assemble = assembler(image_decoder()[0])
        self._made = {(one.values["epoch"], one.values["chunk_index"]): one for one in made}

    def __call__(self, made: Made, inputs: Mapping[str, Recorded], num_steps: int | None) -> Replayed:
        taken = {slot: Stamped(self._read(slot, message), made.stamps_ns[slot], message.time_ns)
                 for slot, message in inputs.items()}
        observation, guidance = self._assemble(taken, made.values["prompt"]), None
        if made.values.get("guidance", "none") != "none":
            before = self._made.get((made.values["epoch"], made.values.get("guidance_previous_index", "")))
            if before is None:
                return Replayed(made, None, "guided by a chunk that is not in the bag")
            guidance = self._guidance(made.values, before, observation)
        chunk = self._policy.infer(observation, num_steps or int(made.values["denoising_steps"]),
                                   seed=int(made.values["seed"]), chunk_index=int(made.values["chunk_index"]),
                                   guidance=guidance)
        return Replayed(made, chunk)

    def _guidance(self, values: Mapping[str, str], before: Made, observation: Observation) -> Guidance:
        """As the loop made it: from the chunk before as it was recorded."""
        config = self._policy.config
        normalised = np.zeros((config.action_horizon, config.action_dim), np.float32)
        previous = ActionChunk(before.actions, normalised, int(values["guidance_previous_stamp_ns"]),
                               self._policy.robot.control_period_s, "", 0, 0, 0)
        tail, _ = tail_of(previous, observation, self._policy.transforms.encode_actions)
        kind, schedule = values["guidance"], values["guidance_schedule"]
        if kind not in (*get_args(Jacobian), "trained") or schedule not in get_args(Schedule):
            raise BagError("provenance", expected="guidance as the node writes it", received=f"{kind}, {schedule}",
                           way_out="Replay with the version that recorded.")
        return Guidance(tail, int(values["guidance_delay"]), int(values["guidance_end"]), cast(Schedule, schedule),
                        float(values["guidance_beta"]), cast(Jacobian, "identity" if kind == "trained" else kind),
                        trained=kind == "trained")

    def _read(self, slot: str, message: Recorded) -> Any:
        if slot == STATE:
            return self._joints.read(deserialize_message(message.data, JointState))
        return (read_compressed_image if message.type.endswith("CompressedImage") else read_image)(message.data)


def input_slots(topics: Mapping[str, str]) -> dict[str, str]:
    """{topic: slot} of cameras, compressed or not, and joints."""
    slots = {topic: slot for slot, topic in topics.items() if slot in (*CAMERAS, STATE)}
    return slots | {f"{topic}/compressed": slot for topic, slot in slots.items() if slot in CAMERAS}


def stamp_of(message: Recorded) -> int:
    """ns. Both kinds of image and JointState begin with a header."""
    try:
        return Reader(message.data).stamp_ns()
    except (ValueError, struct.error) as error:
        raise BagError(message.topic, expected="an image or joint states, with a header", received=str(error),
                       way_out="Correct the topic map.") from error
