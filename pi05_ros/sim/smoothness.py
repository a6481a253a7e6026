"""How smoothly joints moved."""

from __future__ import annotations

import numpy as np


def jerk(positions: np.ndarray, period_s: float) -> tuple[float, float]:
    """RMS over joints and time, and peak of any joint, of the third differences of positions [T, J] sampled every
    `period_s`: rad/s^3 or m/s^3; 0 where T < 4. Sample at the control period: at its points a trajectory's
    acceleration jumps."""
    if len(positions) < 4:
        return 0.0, 0.0
    third = np.diff(positions, n=3, axis=0) / period_s**3
    return float(np.sqrt(np.mean(third**2))), float(np.abs(third).max())
