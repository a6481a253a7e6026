"""config/robots/<robot>.yaml as frozen, validated data: what a robot's cameras, joints and actions mean.

The keys of a file are the fields below, but for `name`, which is the file's. robot_loader.py reads it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pi05_ros.errors import ConfigError
from pi05_ros.schema import ACTION_DIM, CAMERAS, PromptFormat

ActionMeaning = Literal["joint_position", "joint_velocity", "end_effector"]
ALOHA_DIM = 14
_TOPIC = re.compile(r"[A-Za-z_]\w*(/[A-Za-z_]\w*)*", re.ASCII)


@dataclass(frozen=True)
class CameraSpec:
    """One camera slot of the model.

    Args:
        key: the trainer's name for it (`cam_high`, `observation.images.front`); used to order a lerobot
            checkpoint's cameras; empty if unknown.
        required: True: no inference without it. False: absent frames are masked.
        rotate_180: turn the frame before use (LIBERO).
    """

    key: str = ""
    required: bool = True
    rotate_180: bool = False


@dataclass(frozen=True)
class JointSpec:
    """One entry of the state and action vectors (same order in both).

    Args:
        name: the joint's name in JointState and JointTrajectory.
        unit: `rad` or `m`.
        lower, upper: position limits, in `unit`; enforced on everything that leaves the node.
        max_velocity: in `unit`/s; enforced likewise.
        action: `position`: command = offset + scale * action; `velocity`: speed = velocity_scale * action, integrated.
        scale, offset: state number = (position - offset) / scale; likewise a position action.
        delta: True if the openpi checkpoint's action is a difference from the current state.
        velocity_scale: of a velocity action, in `unit`/s per number.

    Raises:
        ConfigError: limits, speeds or scales that cannot be right.
    """

    name: str
    lower: float
    upper: float
    max_velocity: float
    unit: Literal["rad", "m"] = "rad"
    action: Literal["position", "velocity"] = "position"
    scale: float = 1.0
    offset: float = 0.0
    delta: bool = False
    velocity_scale: float = 1.0

    def __post_init__(self) -> None:
        what = f"joint '{self.name}'"
        _require(f"{what} name", bool(self.name), "a name", "none")
        for key in ("lower", "upper", "max_velocity", "scale", "offset", "velocity_scale"):
            _require(f"{what} {key}", math.isfinite(getattr(self, key)), "a finite number", getattr(self, key))
        _require(f"{what} upper", self.lower < self.upper, f"more than lower ({self.lower})", self.upper)
        _require(f"{what} max_velocity", self.max_velocity > 0, "more than 0", self.max_velocity)
        _require(f"{what} scale", self.scale != 0, "not 0", self.scale)
        _require(f"{what} velocity_scale", self.velocity_scale != 0, "not 0", self.velocity_scale)
        if self.action == "velocity":
            _require(f"{what} delta", not self.delta, "false for a velocity action", "true")
        else:
            _require(f"{what} velocity_scale", self.velocity_scale == 1, "none for a position action",
                     self.velocity_scale)


@dataclass(frozen=True)
class ControllerSpec:
    """One trajectory topic `~/<topic>` and the joints it commands (names of `Robot.joints`)."""

    topic: str
    joints: tuple[str, ...]

    def __post_init__(self) -> None:
        _require("controller topic", bool(_TOPIC.fullmatch(self.topic)), "a relative ROS name such as 'trajectory'",
                 repr(self.topic))
        _require(f"controller '{self.topic}' joints", bool(self.joints), "at least one joint", "none")


@dataclass(frozen=True)
class Robot:
    """All that differs from robot to robot.

    Args:
        action_meaning: `joint_position` and `joint_velocity` can be driven by the node; `end_effector` only
            works in `Policy.infer`.
        control_rate_hz: rate of the actions in a chunk.
        cameras: camera slot of `schema.CAMERAS` -> CameraSpec; a slot left out is always masked.
        joints: in the order of the state and action vectors; empty for `end_effector`.
        state_dim, action_dim: widths of the robot's state and of its actions; len(joints) where there are joints.
        controllers: who executes; every joint in exactly one.
        adapter: extra conversion between robot and model: `none` or `aloha`, whose gripper joints in `m` are fingers.
        asset_id: folder of the openpi norm stats under assets/; empty: the only one there is.
        prompt_format: overrides the checkpoint's; None keeps it (openpi's pi05_libero needs `pi0`, trap T5).
        default_prompt: used while the user gives none.

    Raises:
        ConfigError: anything above that does not fit together.
    """

    name: str
    action_meaning: ActionMeaning
    control_rate_hz: float
    cameras: Mapping[str, CameraSpec]
    state_dim: int
    action_dim: int
    joints: tuple[JointSpec, ...] = ()
    controllers: tuple[ControllerSpec, ...] = ()
    adapter: Literal["none", "aloha"] = "none"
    asset_id: str = ""
    prompt_format: PromptFormat | None = None
    default_prompt: str = ""
    description: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _require("control_rate_hz", math.isfinite(self.control_rate_hz) and self.control_rate_hz > 0, "more than 0 Hz",
                 self.control_rate_hz)
        for slot in self.cameras:
            _require(f"cameras '{slot}'", slot in CAMERAS, "a slot among " + ", ".join(CAMERAS), f"'{slot}'")
        for key in ("state_dim", "action_dim"):
            _require(key, 1 <= getattr(self, key) <= ACTION_DIM, f"1 to {ACTION_DIM}", getattr(self, key))
        if self.adapter == "aloha":
            _require("adapter 'aloha'", self.state_dim == self.action_dim == ALOHA_DIM,
                     f"state_dim and action_dim {ALOHA_DIM}", f"{self.state_dim} and {self.action_dim}")
        if self.action_meaning == "end_effector":
            _require("joints", not self.joints and not self.controllers, "no joints or controllers for end_effector "
                     "actions", f"{len(self.joints)} joints, {len(self.controllers)} controllers")
        else:
            self._check_joints()
            self._check_controllers()

    @property
    def control_period_s(self) -> float:
        return 1.0 / self.control_rate_hz

    def _check_joints(self) -> None:
        for name, count in Counter(joint.name for joint in self.joints).items():
            _require(f"joint '{name}'", count == 1, "once", f"{count} times")
        for key in ("state_dim", "action_dim"):
            _require(key, getattr(self, key) == len(self.joints), f"the number of joints ({len(self.joints)})",
                     getattr(self, key))
        velocities = sum(joint.action == "velocity" for joint in self.joints)
        if self.action_meaning == "joint_position":
            _require("joints", velocities == 0, "action: position for every joint, with joint_position",
                     f"{velocities} with action: velocity")
        else:
            _require("joints", velocities > 0, "action: velocity for at least one joint, with joint_velocity", "none")

    def _check_controllers(self) -> None:
        for topic, count in Counter(controller.topic for controller in self.controllers).items():
            _require(f"controller '{topic}'", count == 1, "each topic once", f"{count} times")
        commanded = Counter(name for controller in self.controllers for name in controller.joints)
        names = [joint.name for joint in self.joints]
        for name in commanded:
            _require("controllers", name in names, "joints among " + ", ".join(names), f"'{name}'")
        for name in names:
            _require(f"joint '{name}'", commanded[name] == 1, "exactly one controller", f"{commanded[name]}")


def _require(subject: str, holds: bool, expected: str, received: object) -> None:
    if not holds:
        raise ConfigError(subject, expected=expected, received=str(received), way_out="Correct the robot's YAML file.")
