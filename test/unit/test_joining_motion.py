"""What each mode makes of chunks that change their mind, in motion: fixed seeds, simulated time."""

import pytest
from bimodal_robot import SETTINGS, measure

SEEDS, WANTED = 4, 1.5  # rad of x in the measured three seconds
RMS, PEAK, TRAVELLED = 0, 1, 2


@pytest.mark.parametrize("latency_s", [0.05, 0.1, 0.2])
def test_chunks_that_agree_join_as_smoothly_at_any_latency(latency_s):
    one_way = (0.3, 0.3)
    at_once = measure(SETTINGS["delay_aware"], 0.0, SEEDS, one_way)
    late = measure(SETTINGS["delay_aware"], latency_s, SEEDS, one_way)
    plain = measure(SETTINGS["plain"], latency_s, SEEDS, one_way)
    assert late[RMS] < 1.5 * at_once[RMS] and late[TRAVELLED] == pytest.approx(WANTED, rel=0.03)
    assert plain[TRAVELLED] < 0.8 * WANTED  # it does again what was done already


@pytest.mark.parametrize("latency_s", [0.0, 0.05, 0.1, 0.2])
def test_guided_chunks_keep_their_mind(latency_s):
    free, guided = (measure(SETTINGS[mode], latency_s, SEEDS) for mode in ("delay_aware", "guided"))
    assert guided[RMS] < 0.5 * free[RMS] and guided[PEAK] < 0.5 * free[PEAK]
    assert guided[TRAVELLED] == pytest.approx(WANTED, rel=0.03)


def test_ensembled_chunks_change_their_mind_more_gently():
    free, ensembled = (measure(SETTINGS[mode], 0.1, SEEDS) for mode in ("delay_aware", "ensembled"))
    assert ensembled[RMS] < 0.75 * free[RMS] and ensembled[TRAVELLED] == pytest.approx(WANTED, rel=0.03)


@pytest.mark.parametrize(("mode", "share"), [("delay_aware", 0.1), ("guided", 0.8)])
def test_chunks_that_fade_into_each_other_jerk_less(mode, share):
    at_once, fading = (measure(SETTINGS[mode], 0.1, SEEDS, fade_s=fade_s) for fade_s in (0.0, 0.5))
    assert fading[RMS] < share * at_once[RMS] and fading[PEAK] < share * at_once[PEAK]
    assert fading[TRAVELLED] == pytest.approx(WANTED, rel=0.03)
