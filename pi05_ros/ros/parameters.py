"""Every ROS parameter: declaration, limits, documentation. config/policy.yaml repeats names and defaults (tested)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter

from pi05_ros.errors import ConfigError, Pi05Error
from pi05_ros.runtime.chunking import CommandLimits
from pi05_ros.runtime.joining import CHUNK_MODES, JoinSettings, check_chunk_mode
from pi05_ros.runtime.mailbox import InputLimits
from pi05_ros.runtime.policy import MAX_DENOISING_STEPS
from pi05_ros.runtime.trigger import LoopSettings
from pi05_ros.schema import Jacobian, Schedule


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter; `low` and `high` bound numbers, `choices` bound words; `live` may change while running."""

    name: str
    default: Any
    text: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    live: bool = False

    def descriptor(self) -> ParameterDescriptor:
        out = ParameterDescriptor(name=self.name, description=self.text, read_only=False)
        constraints = ["one of " + ", ".join(map(repr, self.choices))] if self.choices else []
        constraints += [] if self.live else ["changes only while unconfigured"]
        out.additional_constraints = "; ".join(constraints)
        if isinstance(self.default, float) and self.low is not None:
            out.floating_point_range = [FloatingPointRange(from_value=self.low, to_value=self.high)]
        elif isinstance(self.default, int) and self.low is not None and self.high is not None:
            out.integer_range = [IntegerRange(from_value=int(self.low), to_value=int(self.high), step=1)]
        return out


PARAMETERS = (
    ParameterSpec("checkpoint", "", "Checkpoint directory (openpi or lerobot, safetensors), or tabletop, which comes "
                  "with the package; empty: the embedded tiny model."),
    ParameterSpec("size", "tiny", "Without a checkpoint: size of the embedded model with random weights.",
                  choices=("tiny", "full")),
    ParameterSpec("robot", "arm6", "Robot: a name from config/robots or the path of a YAML file."),
    ParameterSpec("tokenizer", "", "SentencePiece model; empty: the one in the checkpoint's directory."),
    ParameterSpec("backend", "eager", "Backend: eager, cuda, tensorrt, tensorrt_rtx or torch_tensorrt, or one a stage: "
                  "vision=cuda,expert=eager."),
    ParameterSpec("device", "auto", "auto, cpu, cuda or cuda:<number>."),
    ParameterSpec("dtype", "float32", "Precision of the weights.", choices=("float32", "bfloat16")),
    ParameterSpec("rope_inv_freq", "float32", "bfloat16 reproduces openpi's PyTorch in bf16; float32 is truer to "
                  "training.", choices=("float32", "bfloat16")),
    ParameterSpec("action_horizon", 0, "Actions in a chunk; 0: as the checkpoint says.", 0, 1000),
    ParameterSpec("prompt_format", "", "Form of the prompt, where the checkpoint cannot tell: pi05_padded_state for "
                  "lerobot 0.4, pi0 for openpi models without the state in it; empty: as checkpoint and robot say.",
                  choices=("", "pi05", "pi05_padded_state", "pi0", "pi0_joined")),
    ParameterSpec("overlap", False, "On a GPU: prepare the next chunk while the last is denoised."),
    ParameterSpec("seed", 0, "Seed of the noise; the noise of a chunk is a function of (seed, chunk index).",
                  0, 2**31 - 1, live=True),
    ParameterSpec("absent_cameras", "", "Comma-separated cameras that this robot does not have (base, left_wrist, "
                  "right_wrist); they are masked."),
    ParameterSpec("reliable_images", False, "Subscribe to images reliably instead of best effort."),
    ParameterSpec("compressed_images", False, "Subscribe to sensor_msgs/CompressedImage on <image topic>/compressed."),
    ParameterSpec("prompt", "", "Instruction; ~/prompt sets it too. Empty: the robot's default.", live=True),
    ParameterSpec("denoising_steps", 10, "Flow-matching steps of a chunk.", 1, MAX_DENOISING_STEPS, live=True),
    ParameterSpec("execution_horizon", 0, "The next chunk begins after so many actions [control periods] of the last "
                  "one; 0: at once.", 0, 1000, live=True),
    ParameterSpec("max_rate_hz", 0.0, "Chunks begin at this fixed rate [Hz]; 0: as fast as possible.", 0.0, 1000.0,
                  live=True),
    ParameterSpec("chunk_mode", "delay_aware", "How chunks join: plain plays each from its first action, delay_aware "
                  "drops actions whose time has passed, guided also guides the next chunk by the last (real-time "
                  "chunking), trained gives it the actions executed meanwhile (checkpoints trained so), ensembled "
                  "averages chunks.", choices=CHUNK_MODES, live=True),
    ParameterSpec("guidance_schedule", "linear", "Guided: how the weight of the last chunk falls.",
                  choices=get_args(Schedule), live=True),
    ParameterSpec("guidance_jacobian", "identity", "Guided: identity, or vjp, the true one, which backend eager has.",
                  choices=get_args(Jacobian), live=True),
    ParameterSpec("guidance_beta", 10.0, "Guided: upper bound of the strength.", 0.0, 100.0, live=True),
    ParameterSpec("guidance_horizon", 0, "Guided: actions of the next chunk that are guided at most; 0: as many as the "
                  "last one has left.", 0, 1000, live=True),
    ParameterSpec("ensemble_coefficient", 0.01, "Ensembled: weights are exp(-coefficient * i), i = 0 for the oldest "
                  "chunk.", -10.0, 10.0, live=True),
    ParameterSpec("max_input_age_s", 0.5, "Oldest input that may be used [s].", 0.001, 60.0, live=True),
    ParameterSpec("max_skew_s", 0.1, "Farthest the stamps of one set of inputs may lie apart [s].", 0.0, 60.0,
                  live=True),
    ParameterSpec("input_timeout_s", 1.0, "Silence of a required input after which the robot is held [s].", 0.05, 60.0,
                  live=True),
    ParameterSpec("worker_timeout_s", 5.0, "A chunk that takes longer means a stuck worker: the node deactivates [s].",
                  0.1, 600.0, live=True),
    ParameterSpec("on_fault", "hold", "On silent inputs and failures: bring the robot to rest at once, or publish "
                  "nothing more, so that the running trajectory ends at rest by itself.",
                  choices=("hold", "stop_publishing"), live=True),
    ParameterSpec("latency_budget_s", 0.0, "A latency from observation to trajectory above this is counted and warned "
                  "of [s]; 0: none.", 0.0, 60.0, live=True),
    ParameterSpec("max_committed_s", 1.0, "A trajectory ends at most this far ahead [s].", 0.1, 60.0, live=True),
    ParameterSpec("stop_time_s", 0.2, "Time in which the robot is brought to rest; at least twice command_lead_s [s].",
                  0.01, 10.0, live=True),
    ParameterSpec("command_lead_s", 0.02, "What is commanded for so long ahead does not change: longer than a "
                  "command takes to its controller [s].", 0.0, 1.0, live=True),
    ParameterSpec("fade_s", 0.5, "A trajectory goes over into the next one little by little in so long, or in what is "
                  "left of it; 0: at once [s].", 0.0, 10.0, live=True),
)
SPECS = {spec.name: spec for spec in PARAMETERS}


def declare(node: Node) -> None:
    """Declare all; a value given at start that is out of range raises with the reason."""
    for spec in PARAMETERS:
        node.declare_parameter(spec.name, spec.default, spec.descriptor())


def value(node: Node, name: str) -> Any:
    return node.get_parameter(name).value


def refuse(parameters: Sequence[Parameter], configured: bool, current: dict[str, Any],
           control_period_s: float | None = None, max_delay: int | None = None) -> SetParametersResult:
    """The one check for changes: fixed ones only while unconfigured, words among their choices, sums that make sense.

    Types and ranges are checked by rclpy from the descriptors. control_period_s: of the robot, max_delay: of
    the checkpoint (`check_chunk_mode`), once they are known.
    """
    after = {**current, **{p.name: p.value for p in parameters}}
    for parameter in parameters:
        spec = SPECS.get(parameter.name)
        if spec is None:  # use_sim_time and the like
            continue
        if configured and not spec.live:
            return _no(f"{spec.name}: expected to change only while unconfigured, received a change while configured. "
                       "Deactivate and clean up first.")
        if spec.choices and parameter.value not in spec.choices:
            choices = ", ".join(map(repr, spec.choices))
            return _no(f"{spec.name}: expected one of {choices}, received '{parameter.value}'.")
    try:
        check_chunk_mode(after["chunk_mode"], after["guidance_jacobian"], after["backend"], max_delay)
    except Pi05Error as error:
        return _no(str(error))
    if 2 * (after["stop_time_s"] + after["command_lead_s"]) > after["max_committed_s"]:
        return _no("stop_time_s, command_lead_s and max_committed_s: expected the sum of the first two to be at most "
                   f"half of the third, received {after['stop_time_s']}, {after['command_lead_s']} and "
                   f"{after['max_committed_s']}. Both are part of what is committed.")
    if after["stop_time_s"] < 2 * after["command_lead_s"]:
        return _no(f"stop_time_s: expected at least twice command_lead_s = {after['command_lead_s']}, received "
                   f"{after['stop_time_s']}. A hold that travels for longer than half its time finds the robot past "
                   "its end: raise the first, or lower the second.")
    if control_period_s is not None:
        most = int((after["max_committed_s"] - after["stop_time_s"]) / control_period_s + 1e-6)
        if after["execution_horizon"] > most:
            return _no(f"execution_horizon: expected at most {most} actions of {control_period_s} s, before the robot "
                       f"brakes at the end of what is committed, received {after['execution_horizon']}. Lower it, or "
                       "raise max_committed_s.")
    return SetParametersResult(successful=True)


def check(values: dict[str, Any], control_period_s: float | None = None, max_delay: int | None = None) -> None:
    """The same check for what was given at the start. Raises ConfigError."""
    given = [Parameter(name, value=value) for name, value in values.items()]
    if not (answer := refuse(given, False, values, control_period_s, max_delay)).successful:
        subject, _, rest = answer.reason.partition(": expected ")
        expected, _, received = rest.partition(", received ")
        raise ConfigError(subject, expected=expected, received=received.rstrip("."), way_out="Correct the parameters.")


def snapshot(node: Node) -> dict[str, Any]:
    return {name: value(node, name) for name in SPECS}


def loop_settings(values: dict[str, Any], default_prompt: str) -> LoopSettings:
    return LoopSettings(
        denoising_steps=values["denoising_steps"],
        prompt=values["prompt"] or default_prompt,
        execution_horizon=values["execution_horizon"],
        max_rate_hz=values["max_rate_hz"],
        join=JoinSettings(values["chunk_mode"], values["command_lead_s"], values["guidance_schedule"],
                          values["guidance_beta"], values["guidance_jacobian"], values["guidance_horizon"],
                          values["ensemble_coefficient"]),
    )


def input_limits(values: dict[str, Any]) -> InputLimits:
    return InputLimits(values["max_input_age_s"], values["max_skew_s"])


def command_limits(values: dict[str, Any]) -> CommandLimits:
    return CommandLimits(values["max_committed_s"], values["stop_time_s"], values["command_lead_s"],
                         values["fade_s"])


def _no(reason: str) -> SetParametersResult:
    return SetParametersResult(successful=False, reason=reason)
