"""What crosses the seams between modules.

Keys, shapes, units and ranges, once and for all (B batch, N cameras, L prompt slots, H action horizon):

| name                    | shape and type                | unit, range                                              |
|-------------------------|-------------------------------|----------------------------------------------------------|
| camera keys             | `CAMERAS`, in this order      | base_0_rgb, left_wrist_0_rgb, right_wrist_0_rgb          |
| Observation.images      | {camera: uint8 [h, w, 3]}     | RGB, 0..255, any size; an absent camera is masked        |
| Observation.state       | float32 [robot_state_dim]     | the robot's own units (rad, m), order of its YAML        |
| Observation.prompt      | str                           | the instruction, as the user wrote it                    |
| Observation.stamp_ns    | int                           | ns, clock of the robot; the newest camera of the set     |
| ModelInputs.frames      | N x (uint8 [B, h, w, 3] or None) | RGB, 0..255; None is a camera that is not there       |
| ModelInputs.image_mask  | bool [B, N]                   | False: the camera is masked                              |
| ModelInputs.tokens      | int64 [B, L]                  | 0..vocabulary-1, 0 is padding                            |
| ModelInputs.token_mask  | bool [B, L]                   | False: padding, always on the right                      |
| ModelInputs.state       | float32 [B, 32]               | normalised, zero padded; read by pi0 only                |
| images (prepared)       | float32 [B, N, 3, 224, 224]   | -1..1                                                    |
| noise, x_t, v_t, x_0    | float32 [B, H, 32]            | normalised action space; flow time 1 = noise, 0 = action |
| ActionChunk.actions     | float32 [H, robot_action_dim] | the robot's own units, absolute                          |
| ActionChunk.normalised  | float32 [H, 32]               | as the model made it                                     |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
IMAGE_SIZE = 224
ACTION_DIM = 32


@dataclass(frozen=True)
class Observation:
    """One moment of the robot, in its own units. See the table above."""

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    prompt: str
    stamp_ns: int = 0


@dataclass(frozen=True)
class ModelInputs:
    """What the stages read: a batch of observations after the input transforms. See the table above."""

    frames: Sequence[np.ndarray | None]
    image_mask: np.ndarray
    tokens: np.ndarray
    token_mask: np.ndarray
    state: np.ndarray

    def trimmed(self) -> ModelInputs:
        """Drop cameras masked in the whole batch and prompt slots that pad the whole batch.

        Exact: masked positions are never attended to and do not advance the position ids (PI05_SPEC sections 3
        and 13), so the actions are the same and the prefix is shorter. One prompt slot is always kept.
        """
        cameras = np.flatnonzero(self.image_mask.any(axis=0)).tolist()
        length = max(1, int(self.token_mask.sum(axis=1).max()))
        return replace(
            self,
            frames=[self.frames[i] for i in cameras],
            image_mask=self.image_mask[:, cameras],
            tokens=self.tokens[:, :length],
            token_mask=self.token_mask[:, :length],
        )


Schedule = Literal["linear", "exp", "ones", "zeros"]
Jacobian = Literal["identity", "vjp"]


@dataclass(frozen=True)
class Guidance:
    """Real-time chunking (PI05_SPEC section 12): pull the chunk towards the unexecuted one or, `trained`, let it go on
    from the rows that will be executed before it can act.

    Args:
        previous: float32 [B, H, 32], tail of the previous chunk, normalised; row 0 is the first action not yet
            executed; zero padded.
        delay: control steps that will pass before this chunk can act; these rows are held with weight 1.
        end: first row that is free.
        schedule: how the weight falls from `delay` to `end`.
        beta: upper bound of the guidance strength.
        jacobian: `identity` needs no backward pass; `vjp` is the exact vector-Jacobian product.
        previous_index, previous_stamp_ns: of the previous chunk, for whoever makes this one again; its first action
            acted at that stamp.
        trained: for a checkpoint trained with a delay: the first `delay` rows are given as clean actions, with flow
            time 0, and nothing is pulled; `end`, `schedule`, `beta` and `jacobian` mean nothing.
    """

    previous: np.ndarray
    delay: int
    end: int
    schedule: Schedule = "linear"
    beta: float = 10.0
    jacobian: Jacobian = "identity"
    previous_index: int | None = None
    previous_stamp_ns: int | None = None
    trained: bool = False


@dataclass(frozen=True)
class ActionChunk:
    """H actions and all that is needed to judge and to repeat them. Action k belongs to stamp + k * period.

    Args:
        actions: float32 [H, robot_action_dim], the robot's units.
        normalised: float32 [H, 32], model space.
        stamp_ns: stamp of the observation it answers.
        control_period_s: time between two actions.
        prompt, num_steps, seed, chunk_index: what made it; the noise is a function of (seed, chunk_index).
        noise_given: True if the caller passed the noise, so that seed and chunk_index do not reproduce it.
        stage_times_ms: milliseconds per stage: transform, images, vision, prefix, expert, inverse, total; in overlap
            also `waiting`, between the features and the start of denoising.
        guidance: the guidance used, or None.
    """

    actions: np.ndarray
    normalised: np.ndarray
    stamp_ns: int
    control_period_s: float
    prompt: str
    num_steps: int
    seed: int
    chunk_index: int
    noise_given: bool = False
    stage_times_ms: Mapping[str, float] = field(default_factory=dict)
    guidance: Guidance | None = None


@dataclass(frozen=True)
class FieldStats:
    """Statistics of one vector; each array float32 or float64 [d]. A kind that the file lacks is None."""

    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None


@dataclass(frozen=True)
class NormStats:
    """Normalisation statistics over data after the robot and delta transforms (PI05_SPEC section 10)."""

    state: FieldStats
    actions: FieldStats


NormMode = Literal["quantile", "zscore", "identity"]
PromptFormat = Literal["pi05", "pi05_padded_state", "pi0", "pi0_joined"]


@dataclass(frozen=True)
class Conventions:
    """What the trainer of a checkpoint did to its data; a wrong one is silent, so it is never guessed late.

    Args:
        trainer: `openpi` or `lerobot`.
        resize: `pil` (antialiased, uint8) or `bilinear` (no antialias, float), PI05_SPEC section 8.
        state_norm, action_norm: how state and actions are normalised.
        prompt_format: one of the four forms of PI05_SPEC section 9; see transforms/prompt.py.
        delta_actions: per action dimension, True where the model speaks in differences from the state; None leaves
            it to the robot's YAML.
    """

    trainer: Literal["openpi", "lerobot"] = "openpi"
    resize: Literal["pil", "bilinear"] = "pil"
    state_norm: NormMode = "quantile"
    action_norm: NormMode = "quantile"
    prompt_format: PromptFormat = "pi05"
    delta_actions: tuple[bool, ...] | None = None
