"""The flow times of a run and their features, in NumPy: also for runners of engines, which have no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pi05_ros.errors import ConfigError

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0


def time_grid(num_steps: int) -> list[float]:
    """The N flow times, accumulated in float32 as openpi does: 1.0, 0.9, 0.79999995, ... for N = 10."""
    if not 1 <= num_steps <= 1000:
        raise ConfigError("num_steps", expected="1 to 1000", received=str(num_steps), way_out="Choose more or fewer.")
    times, t, dt = [], np.float32(1.0), step_size(num_steps)
    for _ in range(num_steps):
        times.append(float(t))
        t = t + dt
    return times


def step_size(num_steps: int) -> np.float32:
    """dt = -1/N, float32."""
    return np.float32(-1.0 / num_steps)


def time_features(times: Sequence[float], width: int) -> np.ndarray:
    """Flow times to float32 [len(times), width], as `model/time_embedding.py` makes them: float64 inside."""
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** np.linspace(0.0, 1.0, width // 2)
    angle = np.asarray(times, np.float32).astype(np.float64)[:, None] * (2.0 * math.pi / period)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)
