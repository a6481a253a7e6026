"""When chunks begin, and how a chunk is timed against the one before it."""

import pytest

from pi05_ros.runtime.pace import MARGIN_S, POLL_S, Pace
from pi05_ros.runtime.trigger import LoopSettings, Trigger

S = 10**9
FAST = LoopSettings()
RATE = LoopSettings(max_rate_hz=4.0)
HORIZON = LoopSettings(execution_horizon=5)


def begun(settings, now_ns=100 * S, stamp_ns=None):
    trigger = Trigger(control_period_s=0.1)
    trigger.begun(settings, now_ns, now_ns if stamp_ns is None else stamp_ns)
    return trigger


@pytest.mark.parametrize(("settings", "pause_s"), [
    (FAST, 0.0), (RATE, 0.25), (HORIZON, 0.5), (LoopSettings(execution_horizon=5, max_rate_hz=4.0), 0.5)])
def test_each_mode_sets_its_pause(settings, pause_s):
    trigger = begun(settings)
    assert trigger.wait_s(settings, 100 * S) == pytest.approx(pause_s)
    assert trigger.wait_s(settings, 100 * S + int(pause_s * S)) == pytest.approx(0.0, abs=1e-9)
    assert trigger.wait_s(settings, 200 * S) == 0.0


def test_the_first_chunk_begins_at_once():
    assert Trigger(0.1).wait_s(RATE, 100 * S) == 0.0


def test_an_execution_horizon_counts_from_the_observation():
    assert begun(HORIZON, stamp_ns=100 * S - S // 5).wait_s(HORIZON, 100 * S) == pytest.approx(0.3)


def test_a_late_chunk_does_not_shift_the_fixed_rate():
    trigger = begun(RATE)
    trigger.begun(RATE, 100 * S + S * 3 // 10, 0)  # due at 0.25, began at 0.30
    assert trigger.wait_s(RATE, 100 * S + S * 3 // 10) == pytest.approx(0.20)


def test_after_a_gap_the_fixed_rate_begins_anew_instead_of_catching_up():
    trigger = begun(RATE)
    trigger.begun(RATE, 110 * S, 0)
    assert trigger.wait_s(RATE, 110 * S) == pytest.approx(0.25)


def test_a_clock_set_back_begins_at_once_and_so_does_a_reset():
    trigger = begun(RATE)
    assert trigger.wait_s(RATE, 50 * S) == 0.0
    trigger.reset()
    assert trigger.wait_s(RATE, 100 * S) == 0.0


@pytest.mark.parametrize(("front_s", "step_s", "expected"), [
    (0.008, 0.0005, 10.008),  # the front is longer: as soon as the front stream is free
    (0.002, 0.0010, 10.010),  # the back is longer: so that the features are ready when the back stream is free
])
def test_the_next_chunk_begins_just_in_time(front_s, step_s, expected):
    pace = Pace(side_by_side=True, front_s=front_s, step_s=step_s)
    assert pace.begin_at(begun_s=10.0, advanced_s=10.0, num_steps=10) == pytest.approx(expected)


def test_the_hosts_part_is_begun_earlier_by_what_it_takes():
    pace = Pace(side_by_side=True, host_s=0.001, front_s=0.008, step_s=0.0005)
    assert pace.begin_at(10.0, 10.0, 10) == pytest.approx(10.007)


def test_in_turn_a_chunk_begins_when_the_device_is_nearly_free():
    pace = Pace(host_s=0.001, front_s=0.008, step_s=0.0005)
    assert pace.begin_at(begun_s=10.0, advanced_s=10.0, num_steps=10) == pytest.approx(10.013 - 0.001 - MARGIN_S)


def test_denoising_that_had_to_wait_is_done_later():
    pace = Pace(side_by_side=True, front_s=0.002, step_s=0.001)
    assert pace.done_at(begun_s=10.0, advanced_s=10.005, num_steps=10) == pytest.approx(10.015)


def test_in_turn_a_chunk_that_was_begun_early_does_not_make_the_next_one_earlier_still():
    pace, begun, done = Pace(host_s=0.001, front_s=0.008, step_s=0.0005), 10.0, 10.0
    for _ in range(20):  # on a device that runs one chunk at a time, each advanced when the last is done
        advanced, done = done, done + 0.013
        ahead, begun = done - begun, pace.begin_at(begun, advanced, 10) + pace.host_s
    assert done - begun == pytest.approx(MARGIN_S) and ahead == pytest.approx(0.013 + MARGIN_S)


def test_a_result_is_asked_for_rarely_at_first_and_often_when_it_is_due():
    waits, remaining = [], 0.020
    while remaining > 0:
        waits.append(Pace.ask_again_s(remaining))
        remaining -= waits[-1]
    assert waits[0] == pytest.approx(0.018) and len(waits) < 8 and waits[-1] == POLL_S
    assert Pace.ask_again_s(-1.0) == POLL_S
