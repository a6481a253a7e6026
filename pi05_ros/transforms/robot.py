"""THE ordered lists: from an observation to the model's inputs, and from the model's actions to the robot's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np

from pi05_ros.config import Pi05Config
from pi05_ros.errors import ConfigError, ObservationError
from pi05_ros.schema import CAMERAS, Conventions, ModelInputs, NormStats, Observation, PromptFormat
from pi05_ros.transforms.actions import Delta, JointUnits, Pad, Step
from pi05_ros.transforms.aloha import GRIPPERS, AlohaAdapter, FingerCommand
from pi05_ros.transforms.collate import collate
from pi05_ros.transforms.images import check_frame
from pi05_ros.transforms.normalize import normalize_step
from pi05_ros.transforms.prompt import PromptTokenizer
from pi05_ros.transforms.robot_file import Robot

EMPTY_CAMERA = "empty_camera"  # how lerobot names the slots it pads with


class PromptTruncated(UserWarning):
    """A prompt lost its tail. Shown once a prompt; filter it, or turn it into an error, with `warnings`."""


def ordered_steps(robot: Robot, conventions: Conventions, stats: NormStats | None, width: int) -> tuple[Step, ...]:
    """From the robot to the model in this order; back in the reverse order. Tokenising comes before padding."""
    steps: list[Step] = []
    if robot.joints:
        steps.append(JointUnits.of(robot.joints))
    if robot.adapter == "aloha":
        steps.append(FingerCommand(tuple(i for i in GRIPPERS if robot.joints and robot.joints[i].unit == "m")))
        steps.append(AlohaAdapter())
    steps.append(Delta(delta_mask(robot, conventions)))
    steps.append(normalize_step(conventions, stats, robot.state_dim, robot.action_dim))
    steps.append(Pad(width, robot.action_dim))
    return tuple(steps)


def delta_mask(robot: Robot, conventions: Conventions) -> tuple[bool, ...]:
    """Which actions are differences from the state: the checkpoint's word if it has one, else the robot file's."""
    if conventions.delta_actions is None:
        return tuple(joint.delta for joint in robot.joints)
    mask = conventions.delta_actions
    absolute = [j for j in range(len(mask)) if j >= min(robot.state_dim, robot.action_dim)
                or (robot.joints and robot.joints[j].action == "velocity")]
    wrong = [j for j in absolute if mask[j]]
    if wrong:
        raise ConfigError("delta_actions of the checkpoint", received=f"True for action {wrong[0]}",
                          expected=f"differences only where robot '{robot.name}' has a position to add them to",
                          way_out="Choose the robot file that belongs to this checkpoint.")
    return mask


def camera_order(robot: Robot, camera_keys: tuple[str, ...], num_cameras: int) -> tuple[str | None, ...]:
    """The robot's camera slot for each of the model's, in its order; None: a slot the trainer left empty."""
    order: list[str | None] = list(CAMERAS[:num_cameras])
    if camera_keys:
        by_key = {spec.key: slot for slot, spec in robot.cameras.items() if spec.key}
        order = [by_key.get(key) for key in camera_keys]
        unknown = [key for key in camera_keys if key not in by_key and EMPTY_CAMERA not in key]
        if unknown:
            raise ConfigError("cameras of the checkpoint", expected="a camera of robot "
                              f"'{robot.name}' with the key '{unknown[0]}'", received=", ".join(by_key) or "no keys",
                              way_out="Write the checkpoint's camera names as `key` into a copy of the robot file.")
    unseen = [slot for slot, spec in robot.cameras.items() if spec.required and slot not in order]
    if unseen or num_cameras > len(CAMERAS):
        raise ConfigError("cameras of the model", expected=f"1 to {len(CAMERAS)}, among them all that robot "
                          f"'{robot.name}' requires", received=f"{num_cameras}, without "
                          + (", ".join(unseen) or "names for the rest"),
                          way_out="Choose the robot file that belongs to this checkpoint.")
    return tuple(order)


class RobotTransforms:
    """A robot's units to a checkpoint's numbers and back.

    Args:
        robot: the robot's file.
        conventions: what the checkpoint's trainer did.
        stats: its statistics; None only if it normalises nothing.
        tokenizer: of the checkpoint.
        config: of the model: cameras, prompt slots, vocabulary, width of state and actions.
        camera_keys: a lerobot checkpoint's names of its cameras, in the order the model sees them; () for openpi,
            whose order is that of `schema.CAMERAS`.
        prompt_format: overrides the checkpoint's and the robot file's; None keeps them.

    Raises:
        ConfigError: these do not belong together.
    """

    def __init__(self, robot: Robot, conventions: Conventions, stats: NormStats | None, tokenizer: PromptTokenizer,
                 config: Pi05Config, camera_keys: tuple[str, ...] = (),
                 prompt_format: PromptFormat | None = None) -> None:
        self.robot, self.conventions, self.config = robot, conventions, config
        self.steps = ordered_steps(robot, conventions, stats, config.action_dim)
        # The file speaks of openpi's checkpoint of this robot; lerobot's say themselves what their prompts are.
        from_file = robot.prompt_format if conventions.trainer == "openpi" else None
        self.prompt_format = prompt_format or from_file or conventions.prompt_format
        self.camera_order = camera_order(robot, camera_keys, config.num_cameras)
        self._tokenizer = tokenizer
        self._check_model(tokenizer)

    def encode(self, observation: Observation, frames: list[np.ndarray | None] | None = None) -> ModelInputs:
        """One observation, as a batch of 1. The frames keep their size; the model's stage 0 resizes them.

        `frames`: of this observation, where `frames` has given them before.

        Raises:
            ObservationError: a required camera, or any prompt, is missing; an image or the state is not usable.
        """
        state = self._checked_state(observation.state)
        for step in self.steps:
            state = step.encode_state(state)
        tokens = self._tokenizer.tokenize(self._prompt(observation), state[: self.robot.state_dim], self.prompt_format)
        if tokens.dropped:
            warnings.warn(f"prompt: expected at most {self._tokenizer.max_token_len} tokens, its tail is cut off; say "
                          f"it in fewer words: '{self._prompt(observation)}'", PromptTruncated, stacklevel=2)
        frames = self.frames(observation) if frames is None else frames
        return ModelInputs(
            frames=frames,
            image_mask=np.array([[frame is not None for frame in frames]]),
            tokens=tokens.ids[None],
            token_mask=tokens.mask[None],
            state=state.astype(np.float32)[None],
        )

    def encode_actions(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The robot's actions [H, action_dim] at `state` to float32 [H, 32]: the exact inverse of `decode`."""
        self._check_shape("actions of the robot", actions, self.robot.action_dim)
        out = actions.astype(np.float64)
        for step, entering in self._with_states(state):
            out = step.apply(out, entering)
        return out.astype(np.float32)

    def decode(self, normalised: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The model's actions [H, 32] at the observation's `state` to float32 [H, action_dim], the robot's units."""
        self._check_shape("actions of the model", normalised, self.config.action_dim)
        out = normalised
        for step, entering in reversed(list(self._with_states(state))):
            out = step.invert(out, entering)
        return out.astype(np.float32)

    collate = staticmethod(collate)

    def _with_states(self, state: np.ndarray) -> Iterator[tuple[Step, np.ndarray]]:
        """Each step with the state that enters it."""
        state = self._checked_state(state)
        for step in self.steps:
            yield step, state
            state = step.encode_state(state)

    def _checked_state(self, state: np.ndarray) -> np.ndarray:
        if state.shape != (self.robot.state_dim,):
            raise ObservationError("state", expected=f"{self.robot.state_dim} numbers of robot '{self.robot.name}'",
                                   received=f"shape {list(state.shape)}", cause="state shape",
                                   way_out="Give one number a joint, in the order of the robot file.")
        if not np.isfinite(state).all():
            raise ObservationError("state", expected="finite numbers", cause="non-finite state",
                                   received=f"{state[~np.isfinite(state)][0]} at {int(np.argmin(np.isfinite(state)))}",
                                   way_out="Check the robot's joint states.")
        return state.astype(np.float64)

    def _prompt(self, observation: Observation) -> str:
        prompt = observation.prompt if observation.prompt.strip() else self.robot.default_prompt
        if not prompt.strip():
            raise ObservationError("prompt", expected="an instruction", received="none", cause="no prompt",
                                   way_out="Give one, or set default_prompt in the robot file.")
        return prompt

    def frames(self, observation: Observation) -> list[np.ndarray | None]:
        """uint8 [1, h, w, 3] of each of the model's cameras, None where there is none. Raises ObservationError."""
        unknown = [name for name in observation.images if name not in CAMERAS]
        if unknown:
            raise ObservationError(f"image '{unknown[0]}'", expected="a camera among " + ", ".join(CAMERAS),
                                   received=f"'{unknown[0]}'", way_out="Rename it.", cause="unknown camera")
        return [self._frame(slot, observation.images.get(slot)) if slot else None for slot in self.camera_order]

    def _frame(self, slot: str, frame: np.ndarray | None) -> np.ndarray | None:
        spec = self.robot.cameras.get(slot)
        if spec is None:
            return None  # this robot has no such camera, whatever was sent
        if frame is None:
            if spec.required:
                raise ObservationError(f"image '{slot}'", expected=f"a frame, which robot '{self.robot.name}' requires",
                                       received="none", way_out="Check the camera, or set required: false for it.",
                                       cause="missing camera")
            return None
        check_frame(slot, frame)
        return (frame[::-1, ::-1] if spec.rotate_180 else frame)[None]

    def _check_shape(self, what: str, actions: np.ndarray, width: int) -> None:
        if actions.ndim != 2 or actions.shape[1] != width:
            raise ConfigError(what, expected=f"shape [H, {width}]", received=str(list(actions.shape)),
                              way_out="One row a control step.")

    def _check_model(self, tokenizer: PromptTokenizer) -> None:
        slots, vocabulary = self.config.max_token_len, self.config.prefix.vocab_size
        if tokenizer.vocab_size > vocabulary:
            raise ConfigError("tokenizer", expected=f"at most {vocabulary} pieces, the model's vocabulary",
                              received=str(tokenizer.vocab_size), way_out="Use the tokenizer of this checkpoint.")
        if tokenizer.max_token_len is None or tokenizer.max_token_len > slots:
            raise ConfigError("tokenizer", expected=f"max_token_len of at most {slots}, the model's prompt slots",
                              received=str(tokenizer.max_token_len), way_out="Make it with the model's max_token_len.")
