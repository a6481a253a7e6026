"""Temporal ensembling, and how smoothness is measured."""

from dataclasses import replace

import numpy as np
import pytest

from pi05_ros.runtime.ensembling import TemporalEnsemble
from pi05_ros.runtime.joining import Joining, JoinSettings
from pi05_ros.schema import ActionChunk
from pi05_ros.sim.smoothness import jerk

STEP_NS = 20_000_000
ENSEMBLED = JoinSettings("ensembled")


def chunk(value, steps_later=0, horizon=6):
    return ActionChunk(np.full((horizon, 2), value, np.float32), np.zeros((horizon, 32), np.float32),
                       10**12 + steps_later * STEP_NS, 0.02, "p", 10, 0, 0)


def test_the_mean_is_weighted_from_the_oldest_on_and_a_chunk_counts_only_as_far_as_it_reaches():
    ensemble, coefficient = TemporalEnsemble(), 0.5
    assert (ensemble.add(chunk(1.0), coefficient).actions == 1.0).all()
    ensemble.add(chunk(2.0, 1), coefficient)
    made = ensemble.add(chunk(4.0, 3), coefficient).actions[:, 0]
    w = np.exp(-0.5 * np.arange(3))
    three, two = (w * [1, 2, 4]).sum() / w.sum(), (w[1:] * [2, 4]).sum() / w[1:].sum()
    np.testing.assert_allclose(made, [three, three, three, two, 4, 4], rtol=1e-6)


def test_what_is_over_is_forgotten_and_so_is_all_after_a_gap_or_a_clock_set_back():
    ensemble = TemporalEnsemble()
    for k in range(20):
        ensemble.add(chunk(float(k), k), 0.0)
    assert ensemble.add(chunk(20.0, 20), 0.0).actions[0, 0] == pytest.approx(np.mean(range(15, 21)))
    assert (ensemble.add(chunk(1.0, 100), 0.0).actions == 1.0).all()
    assert (ensemble.add(chunk(2.0, 50), 0.0).actions == 2.0).all()


@pytest.mark.parametrize("forget", [lambda j: j.interrupted(), lambda j: j.reset(),
                                    lambda j: j.combined(chunk(9.0), JoinSettings("delay_aware"))])
def test_an_interruption_a_new_activation_or_another_mode_begins_a_new_ensemble(forget):
    joining = Joining(lambda actions, state: actions)
    joining.combined(chunk(1.0), ENSEMBLED)
    assert (joining.combined(chunk(3.0, 1), ENSEMBLED).actions[0] == pytest.approx(2.0, abs=0.01))
    forget(joining)
    assert (joining.combined(chunk(5.0, 2), ENSEMBLED).actions == 5.0).all()


def test_other_modes_leave_a_chunk_as_it_is():
    one = chunk(1.0)
    assert Joining(lambda actions, state: actions).combined(one, JoinSettings("guided")) is one


def test_jerk_is_the_third_derivative():
    t = np.arange(100)[:, None] * 0.02
    assert jerk(np.hstack([t**3 / 6, 0 * t]), 0.02) == pytest.approx((np.sqrt(0.5), 1.0), rel=1e-6)
    step = replace(chunk(0.0)).actions.copy()
    step[3:, 1] = 0.008
    assert jerk(step, 0.02)[1] == pytest.approx(2000.0, rel=1e-5)
