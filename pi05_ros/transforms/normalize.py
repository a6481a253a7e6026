"""Normalisation of state and actions, forward and back, in openpi's and in lerobot's formulas.

PI05_SPEC sections 10 and 11b. openpi computes in float64 and adds 1e-6 to every denominator; lerobot computes in
float32, with 1e-8 that it adds to std going in only, and that replaces a quantile range only where it is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from pi05_ros.errors import ConfigError
from pi05_ros.schema import Conventions, FieldStats, NormMode, NormStats

OPENPI_EPS = 1e-6
LEROBOT_EPS = 1e-8
Field = Literal["state", "actions"]
_STATISTICS = {"quantile": ("q01", "q99"), "zscore": ("mean", "std")}
_MODES: tuple[NormMode, ...] = ("quantile", "zscore", "identity")
_LEROBOT_KEYS = {"state": "observation.state", "actions": "action"}


class Norm(Protocol):
    """One vector's normalisation; arrays [..., d]."""

    def apply(self, x: np.ndarray) -> np.ndarray:
        """The robot's numbers to the model's."""

    def invert(self, y: np.ndarray) -> np.ndarray:
        """The model's numbers to the robot's."""


@dataclass(frozen=True)
class Identity:
    def apply(self, x: np.ndarray) -> np.ndarray:
        return x

    def invert(self, y: np.ndarray) -> np.ndarray:
        return y


@dataclass(frozen=True, eq=False)
class Quantile:
    """y = (x - low) / span * 2 - 1. `low` and `span` [d]; on the way out dims beyond d pass unchanged."""

    low: np.ndarray
    span: np.ndarray

    def apply(self, x: np.ndarray) -> np.ndarray:
        d = x.shape[-1]
        return (x.astype(self.low.dtype) - self.low[:d]) / self.span[:d] * 2 - 1

    def invert(self, y: np.ndarray) -> np.ndarray:
        y, d = y.astype(self.low.dtype), min(len(self.low), y.shape[-1])
        head = (y[..., :d] + 1) / 2 * self.span[:d] + self.low[:d]
        return np.concatenate([head, y[..., d:]], axis=-1)


@dataclass(frozen=True, eq=False)
class ZScore:
    """y = (x - mean) / divisor, x = y * factor + mean; each [d]. Dims beyond d leave as y * beyond."""

    mean: np.ndarray
    divisor: np.ndarray
    factor: np.ndarray
    beyond: float

    def apply(self, x: np.ndarray) -> np.ndarray:
        d = x.shape[-1]
        return (x.astype(self.mean.dtype) - self.mean[:d]) / self.divisor[:d]

    def invert(self, y: np.ndarray) -> np.ndarray:
        y, d = y.astype(self.mean.dtype), min(len(self.mean), y.shape[-1])
        head = y[..., :d] * self.factor[:d] + self.mean[:d]
        return np.concatenate([head, y[..., d:] * self.beyond], axis=-1)


@dataclass(frozen=True)
class Normalize:
    """The normalising step of transforms/robot.py."""

    state: Norm
    actions: Norm

    def encode_state(self, state: np.ndarray) -> np.ndarray:
        return self.state.apply(state)

    def apply(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        return self.actions.apply(actions)

    def invert(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        return self.actions.invert(actions)


def normalize_step(conventions: Conventions, stats: NormStats | None, state_dim: int, action_dim: int) -> Normalize:
    """As the checkpoint's trainer did it. Raises ConfigError as `make_norm`."""
    state, actions = (stats.state, stats.actions) if stats is not None else (None, None)
    return Normalize(make_norm("state", conventions.state_norm, conventions.trainer, state, state_dim),
                     make_norm("actions", conventions.action_norm, conventions.trainer, actions, action_dim))


def make_norm(field: Field, mode: NormMode, trainer: Literal["openpi", "lerobot"], stats: FieldStats | None,
              width: int) -> Norm:
    """The normalisation of `field`, a vector of `width` numbers.

    Raises:
        ConfigError: unknown mode; a statistic is missing, or too short (lerobot: not exactly `width` long).
    """
    if mode not in _MODES:
        raise ConfigError(f"normalisation of {field}", expected="one of " + ", ".join(_MODES), received=repr(mode),
                          way_out="Correct the checkpoint's conventions.")
    if mode == "identity":
        return Identity()
    first, second = (_statistic(field, name, mode, trainer, stats, width) for name in _STATISTICS[mode])
    if mode == "quantile":
        span = second - first
        return Quantile(first, span + OPENPI_EPS if trainer == "openpi" else np.where(span == 0, LEROBOT_EPS, span))
    if trainer == "openpi":
        return ZScore(first, second + OPENPI_EPS, second + OPENPI_EPS, beyond=1.0 + OPENPI_EPS)
    return ZScore(first, second + LEROBOT_EPS, second, beyond=1.0)


def _statistic(field: Field, name: str, mode: str, trainer: str, stats: FieldStats | None, width: int) -> np.ndarray:
    values = getattr(stats, name) if stats is not None else None
    if values is None:
        raise ConfigError(_where(field, name, trainer), expected=f"{width} numbers, for {mode} normalisation",
                          received="no statistics at all" if stats is None else f"none of that name (there are: "
                          f"{', '.join(n for n in ('mean', 'std', 'q01', 'q99') if getattr(stats, n) is not None)})",
                          way_out="Put the statistics of the training data into the checkpoint; without them the "
                                  "model's numbers have no unit.")
    values = np.asarray(values)
    enough = values.ndim == 1 and (len(values) >= width if trainer == "openpi" else len(values) == width)
    if not enough:
        raise ConfigError(_where(field, name, trainer), received=f"shape {list(values.shape)}",
                          expected=f"{'at least' if trainer == 'openpi' else 'exactly'} {width} numbers",
                          way_out="Choose the robot file that belongs to this checkpoint (state_dim, action_dim).")
    return values.astype(np.float64 if trainer == "openpi" else np.float32)


def _where(field: Field, name: str, trainer: str) -> str:
    if trainer == "openpi":
        return f"norm_stats.json: norm_stats.{field}.{name}"
    return f"the normalizer's safetensors: {_LEROBOT_KEYS[field]}.{name}"
