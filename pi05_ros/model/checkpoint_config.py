"""config.json of openpi or lerobot: what the weights alone do not tell (PI05_SPEC section 11)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pi05_ros.errors import CheckpointError
from pi05_ros.model.json_fields import JsonFields
from pi05_ros.schema import ACTION_DIM, CAMERAS, IMAGE_SIZE

Kind = Literal["pi05", "pi0"]
Trainer = Literal["openpi", "lerobot"]
PROMPT_LEN = {"pi05": 200, "pi0": 48}
MAX_PROMPT_LEN = 4096
UNSUPPORTED_FLAGS = ("use_visual_memory", "use_proprioceptive_memory")
FIXED = {"min_period": 4e-3, "max_period": 4.0}  # of the flow time's sines, constants of model/time_embedding.py
NO_HORIZON = "action_horizon"  # the `cause` of the error that giving a horizon cures
EMPTY_CAMERA = "observation.images.empty_camera_"


@dataclass(frozen=True)
class CheckpointConfig:
    """What config.json says; None where it says nothing.

    Args:
        camera_keys: lerobot's names of the cameras, in the order the model sees them; () for openpi.
        robot_action_dim: width of the robot's actions (lerobot).
        n_action_steps: actions the trainer executes of a chunk (lerobot).
        state_in_prompt: openpi's `discrete_state_input`, which its converter does not write (trap T5).
        rtc_training_max_delay: most rows it saw given as clean actions in training (lerobot); 0: none.
    """

    action_horizon: int | None
    max_token_len: int
    camera_keys: tuple[str, ...] = ()
    robot_action_dim: int | None = None
    n_action_steps: int | None = None
    state_in_prompt: bool | None = None
    rtc_training_max_delay: int = 0


def read_config(config: JsonFields, trainer: Trainer, kind: Kind) -> CheckpointConfig:
    """Check config.json against the `kind` that the tensors show and refuse what this package does not implement."""
    _check_kind(config, kind)
    for name in ("action_dim", "max_action_dim"):
        if config.integer(name, 1, 10_000) not in (None, ACTION_DIM):
            raise config.error(name, f"{ACTION_DIM}, as the tensors have")
    return _lerobot(config, kind) if trainer == "lerobot" else _openpi(config, kind)


def no_horizon(config: JsonFields) -> CheckpointError:
    """The weights do not tell H."""
    return CheckpointError(
        "action_horizon", expected=f"'action_horizon' or 'chunk_size' in {config.path}", received="neither",
        way_out="Give the horizon the model was trained with: 50 for pi05_base and ALOHA, 15 for pi05_droid, 16 for "
                "its finetunes, 10 for pi05_libero and pi0_droid.", cause=NO_HORIZON)


def _openpi(config: JsonFields, kind: Kind) -> CheckpointConfig:
    return CheckpointConfig(
        action_horizon=config.integer("action_horizon", 1, 1000),
        max_token_len=config.integer("max_token_len", 1, MAX_PROMPT_LEN) or PROMPT_LEN[kind],
        state_in_prompt=config.flag("discrete_state_input"),
    )


def _lerobot(config: JsonFields, kind: Kind) -> CheckpointConfig:
    for name in UNSUPPORTED_FLAGS:
        if config.flag(name):
            raise config.error(name, "false", "true", "This package does not implement it; use a checkpoint without.")
    for name, value in FIXED.items():
        if config.number(name) not in (None, value):
            raise config.error(name, str(value), way_out="Another value is not implemented.")
    resolution = config.numbers("image_resolution")
    if resolution is not None and resolution.tolist() != [IMAGE_SIZE, IMAGE_SIZE]:
        raise config.error("image_resolution", f"[{IMAGE_SIZE}, {IMAGE_SIZE}]", way_out="Another is not implemented.")
    horizon = config.integer("chunk_size", 1, 1000)
    return CheckpointConfig(
        action_horizon=horizon,
        max_token_len=config.integer("tokenizer_max_length", 1, MAX_PROMPT_LEN) or PROMPT_LEN[kind],
        camera_keys=_cameras(config),
        robot_action_dim=_robot_action_dim(config),
        n_action_steps=config.integer("n_action_steps", 1, horizon or 1000),
        rtc_training_max_delay=config.integer("rtc_training_max_delay", 0, 1000) or 0,
    )


def _check_kind(config: JsonFields, kind: Kind) -> None:
    declared = config.text("type")
    if declared is not None and declared not in PROMPT_LEN:
        raise config.error("type", "'pi05' or 'pi0'", way_out="This package runs no other policy.")
    if declared is None and (pi05 := config.flag("pi05")) is not None:
        declared = "pi05" if pi05 else "pi0"
    if declared not in (None, kind):
        raise CheckpointError(f"model kind in {config.path}", expected=f"'{kind}', as the tensors have",
                              received=repr(declared), way_out="The files do not belong together; download them again.")


def _cameras(config: JsonFields) -> tuple[str, ...]:
    features = config.fields("input_features")
    keys = tuple(name for name, feature in features.each() if feature.text("type") == "VISUAL") if features else ()
    real = [key for key in keys if not key.startswith(EMPTY_CAMERA)]
    if len(real) > len(CAMERAS):
        raise config.error("input_features", f"at most {len(CAMERAS)} cameras", ", ".join(real),
                           "This package has three camera slots; train with three.")
    return keys


def _robot_action_dim(config: JsonFields) -> int | None:
    outputs = config.fields("output_features")
    action = outputs.fields("action") if outputs else None
    shape = action.numbers("shape") if action else None
    if shape is None or action is None:
        return None
    if len(shape) != 1 or not 1 <= shape[0] <= ACTION_DIM or shape[0] != int(shape[0]):
        raise action.error("shape", f"one whole number from 1 to {ACTION_DIM}")
    return int(shape[0])
