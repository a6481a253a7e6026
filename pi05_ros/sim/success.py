"""How sure a success rate is, and a difference of two on the same episodes."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

Z95 = 1.959964  # of the standard normal


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """The interval of a rate (Wilson 1927), 95 % by default; unlike the normal one it holds near 0 and 1."""
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    half = z * sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def paired_difference(one: Sequence[bool], other: Sequence[bool], z: float = Z95) -> tuple[float, float, float]:
    """(rate of `one` less that of `other`, low, high), over the same episodes in the same order.

    The interval is Wilson's with a correlation (Newcombe 1998, method 10): it stays honest where few differ.
    """
    a, b = np.asarray(one, bool), np.asarray(other, bool)
    n = len(a)
    difference = float(a.mean() - b.mean())
    (low_a, high_a), (low_b, high_b) = wilson(int(a.sum()), n, z), wilson(int(b.sum()), n, z)
    both, only_a, only_b, neither = (int(x.sum()) for x in (a & b, a & ~b, ~a & b, ~a & ~b))
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    product = float(both * neither - only_a * only_b)
    if product > 0:
        product = max(product - n / 2, 0.0)
    phi = product / sqrt(margins) if margins else 0.0
    down_a, up_a, down_b, up_b = a.mean() - low_a, high_a - a.mean(), b.mean() - low_b, high_b - b.mean()
    below = sqrt(max(0.0, down_a**2 - 2 * phi * down_a * up_b + up_b**2))
    above = sqrt(max(0.0, up_a**2 - 2 * phi * up_a * down_b + down_b**2))
    return difference, difference - below, difference + above
