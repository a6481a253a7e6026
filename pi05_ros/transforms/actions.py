"""The steps between a robot's numbers and the model's, each with its inverse.

Every step has the same three methods, on the state [state_dim] and on actions [H, action_dim]. `state` in `apply`
and `invert` is the state as it enters the step; the current one, the same for all H actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pi05_ros.transforms.robot_file import JointSpec


class Step(Protocol):
    def encode_state(self, state: np.ndarray) -> np.ndarray:
        """The state, one step nearer to the model."""

    def apply(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Actions, one step nearer to the model."""

    def invert(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Actions, one step nearer to the robot."""


@dataclass(frozen=True, eq=False)
class JointUnits:
    """rad, m (and per second) to the numbers of the training data: (position - offset) / scale; each [d]."""

    scale: np.ndarray
    offset: np.ndarray
    action_scale: np.ndarray
    action_offset: np.ndarray

    @classmethod
    def of(cls, joints: tuple[JointSpec, ...]) -> JointUnits:
        speeds = [joint.action == "velocity" for joint in joints]
        scale, offset = np.array([j.scale for j in joints]), np.array([j.offset for j in joints])
        return cls(scale, offset, action_scale=np.where(speeds, [j.velocity_scale for j in joints], scale),
                   action_offset=np.where(speeds, 0.0, offset))

    def encode_state(self, state: np.ndarray) -> np.ndarray:
        return (state - self.offset) / self.scale

    def apply(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        return (actions - self.action_offset) / self.action_scale

    def invert(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        return actions * self.action_scale + self.action_offset


@dataclass(frozen=True)
class Delta:
    """Absolute actions to differences from the current state, where `mask` is True; it may be shorter than either."""

    mask: tuple[bool, ...]

    def encode_state(self, state: np.ndarray) -> np.ndarray:
        return state

    def apply(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        return actions - self._reference(actions, state)

    def invert(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        return actions + self._reference(actions, state)

    def _reference(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        reference, masked = np.zeros(actions.shape[-1]), np.flatnonzero(self.mask)
        reference[masked] = state[masked]
        return reference


@dataclass(frozen=True)
class Pad:
    """Zeros up to the model's `width`; back, the first `action_dim` columns."""

    width: int
    action_dim: int

    def encode_state(self, state: np.ndarray) -> np.ndarray:
        return np.concatenate([state, np.zeros(self.width - len(state))])  # np.pad is slow

    def apply(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        return np.concatenate([actions, np.zeros((len(actions), self.width - actions.shape[-1]))], axis=-1)

    def invert(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        return actions[:, : self.action_dim]
