"""Intervals of rates and of differences."""

import numpy as np
import pytest

from pi05_ros.sim.success import paired_difference, wilson


def test_wilson_gives_the_published_numbers():
    """Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_a_difference_is_of_pairs():
    rng = np.random.default_rng(0)
    one = rng.random(300) < 0.9
    other = one & (rng.random(300) < 0.95)  # wins where `one` does, but for a few
    difference, low, high = paired_difference(one, other)
    assert difference == one.mean() - other.mean() and 0 < low < difference < high
    assert paired_difference(other, one) == pytest.approx((-difference, -high, -low))
    _, low_mixed, high_mixed = paired_difference(one, rng.permutation(other))
    assert high - low < 0.8 * (high_mixed - low_mixed)


def test_the_interval_covers_the_truth():
    """Two policies that win 0.9 and 0.8 of the episodes, and mostly the same: about 95 in 100 intervals hold 0.1."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        one = rng.random(200) < 0.9
        other = one & (rng.random(200) < 8 / 9)
        _, low, high = paired_difference(one, other)
        held += low <= 0.1 <= high
    assert 0.93 <= held / 1000 <= 0.985
