"""How the simulated tabletop behaves as a ROS node: its parameters, read once, at the start."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from rcl_interfaces.msg import FloatingPointRange, ParameterDescriptor
from rclpy.node import Node

TEXT, HIGH = "text", "high"


def _number(default: float, high: float, text: str) -> float:
    return field(default=default, metadata={TEXT: text, HIGH: high})


def _other(default, text: str):
    return field(default=default, metadata={TEXT: text})


@dataclass(frozen=True)
class TabletopParameters:
    """The texts are those of `ros2 param describe`."""

    policy: str = _other("/pi05_policy", "Name of the policy node; topics are its private ones.")
    seed: int = _other(0, "Episode to begin with: places, colours, light, task.")
    speed: float = _number(1.0, 1000.0, "Simulated seconds in a second; 0: as fast as it goes.")
    joint_rate_hz: float = _number(50.0, 400.0, "Joint states, in simulated time.")
    image_rate_hz: float = _number(10.0, 400.0, "Images, rounded to every so many joint states.")
    lockstep: bool = _other(False, "Time stands still from each set of images until the policy's trajectory for it.")
    answer_timeout_s: float = _number(20.0, 3600.0, "In lockstep, real seconds after which a set counts as unanswered "
                                                    "and time goes on.")
    sensor_delay_s: float = _number(0.0, 10.0, "From the moment a sensor shows to its message.")
    command_delay_s: float = _number(0.0, 10.0, "From a trajectory's arrival to its execution.")
    drop_share: float = _number(0.0, 1.0, "Share of messages that are lost, by the seed.")
    say_prompt: bool = _other(False, "Tell the policy each episode's task on ~/prompt.")
    hear_prompt: bool = _other(True, "Judge by what the policy is told, as its provenance says, not by the episode's "
                                     "task.")

    @property
    def images_every(self) -> int:
        """Joint states from one set of images to the next."""
        return max(1, round(self.joint_rate_hz / self.image_rate_hz))


def declare(node: Node) -> TabletopParameters:
    """The node's parameters; rclpy raises for one that is out of range or of another type."""
    values = {}
    for spec in fields(TabletopParameters):
        descriptor = ParameterDescriptor(name=spec.name, description=spec.metadata[TEXT], read_only=True)
        if HIGH in spec.metadata:
            low = 1.0 if spec.name.endswith("_hz") else 0.0
            descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=spec.metadata[HIGH])]
        values[spec.name] = node.declare_parameter(spec.name, spec.default, descriptor).value
    return TabletopParameters(**values)
