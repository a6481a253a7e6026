"""The delay to expect, what a chunk leaves over for the next one, and the guidance made of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi05_ros.errors import ConfigError
from pi05_ros.runtime.delay import OUTLIERS, WARM_UP, WINDOW, DelayEstimate
from pi05_ros.runtime.ensembling import leftover
from pi05_ros.runtime.joining import Joining, JoinSettings, check_chunk_mode, inference_delay
from pi05_ros.schema import ActionChunk, Observation

PERIOD, STAMP = 0.02, 1_000_000_000_000
GUIDED = JoinSettings("guided", lead_s=0.02)


def chunk(stamp_ns=STAMP, horizon=10, index=4):
    """Its actions are their own times: 0, 1, ... control steps."""
    actions = np.repeat(np.arange(horizon, dtype=np.float32)[:, None], 2, axis=1)
    return ActionChunk(actions, np.zeros((horizon, 32), np.float32), stamp_ns, PERIOD, "p", 10, 0, index)


def observation(steps_later, state=(0.0, 0.0)):
    return Observation({}, np.array(state, np.float32), "p", STAMP + round(steps_later * PERIOD * 1e9))


def differences(actions, state):
    """A robot whose actions are differences from its state."""
    return np.pad(actions - state, ((0, 0), (0, 30)))


def ready(delay_s=0.055, max_delay=0):
    joining = Joining(differences, max_delay)
    for _ in range(WARM_UP + 1):
        joining.delay.add(delay_s)
    joining.made(chunk())
    return joining


def estimate_of(ages):
    estimate = DelayEstimate()
    for age in ages:
        estimate.add(age)
    return estimate.seconds


def test_the_delay_is_unknown_until_the_warm_up_is_over():
    assert estimate_of([3.0] * WARM_UP) is None
    assert estimate_of([3.0] * WARM_UP + [0.1]) == 0.1


@given(st.lists(st.floats(0.09, 0.11), min_size=WINDOW, max_size=40), st.lists(st.floats(0.5, 60), max_size=OUTLIERS))
def test_a_few_late_chunks_do_not_count(ages, late):
    assert 0.09 <= estimate_of([9.0] * WARM_UP + ages + late) <= 0.11


@given(st.lists(st.floats(0, 1), min_size=WARM_UP + 1, max_size=60))
def test_most_of_the_last_ages_are_within_the_estimate(ages):
    last = ages[WARM_UP:][-WINDOW:]
    assert sum(age <= estimate_of(ages) for age in last) >= 0.9 * len(last)


def test_a_delay_that_really_grew_is_found_after_three_chunks():
    before = [0.05] * (WARM_UP + WINDOW)
    assert estimate_of(before + [0.2] * OUTLIERS) == 0.05
    assert estimate_of(before + [0.2] * (OUTLIERS + 1)) == 0.2


def test_a_clock_set_back_and_a_new_activation():
    estimate = DelayEstimate()
    for age in (0.1, 0.1, 0.1, -5.0):
        estimate.add(age)
    assert estimate.seconds == 0.1
    estimate.reset()
    assert estimate.seconds is None


@pytest.mark.parametrize(("delay_s", "steps"), [(0.0, 0), (0.001, 1), (0.06, 3), (0.0601, 4)])
def test_the_delay_in_control_steps_is_rounded_up(delay_s, steps):
    assert inference_delay(delay_s, PERIOD) == steps


@pytest.mark.parametrize("steps_later", [0, 3, 3.25, 8.9, 9])
def test_what_is_left_over_is_taken_at_the_times_of_the_next_rows(steps_later):
    left = leftover(chunk(), observation(steps_later).stamp_ns)
    expected = np.arange(steps_later, 9 + 1e-9)
    np.testing.assert_allclose(left, np.stack([expected, expected], axis=1), atol=1e-5)


@pytest.mark.parametrize("steps_later", [-1, 9.5, 1000])
def test_nothing_is_left_over_outside_a_chunk(steps_later):
    assert leftover(chunk(), observation(steps_later).stamp_ns).shape == (0, 2)


def test_guidance_is_the_last_chunk_seen_from_the_new_state():
    made = ready().guidance(observation(2, state=(0.5, -0.5)), GUIDED)
    np.testing.assert_allclose(made.previous[0, :8, :2], np.stack([np.arange(2, 10) - 0.5, np.arange(2, 10) + 0.5], 1))
    assert made.previous.shape == (1, 10, 32) and not made.previous[0, 8:].any() and not made.previous[..., 2:].any()
    assert (made.delay, made.end, made.previous_index) == (4, 8, 4)  # 55 ms and a lead of 20 ms


@pytest.mark.parametrize(("horizon", "end"), [(0, 8), (6, 6), (3, 4), (20, 8)])
def test_guided_rows_are_at_most_those_asked_for_and_at_least_the_frozen_ones(horizon, end):
    assert ready().guidance(observation(2), JoinSettings("guided", horizon=horizon)).end == end


def test_a_chunk_that_acts_later_than_its_stamp_is_continued_there():
    joining, first, seen = ready(), chunk(), observation(5)
    joining.made(first)
    joining.combined(first, JoinSettings("ensembled"))
    joining.published(first, STAMP, late_s=2 * PERIOD)
    assert joining.guidance(seen, GUIDED).previous[0, 0, 0] == 3  # of the fifth control step, the third action
    mean = joining.combined(chunk(seen.stamp_ns), JoinSettings("ensembled", ensemble_coefficient=0.0))
    assert mean.actions[0, 0] == 1.5  # 3 and 0


@pytest.mark.parametrize(("max_delay", "given"), [(10, 4), (4, 4), (2, 2)])
def test_a_trained_chunk_is_given_what_will_be_executed_as_far_as_it_was_trained_to(max_delay, given):
    made = ready(max_delay=max_delay).guidance(observation(2), JoinSettings("trained"))
    assert made.trained and made.delay == given
    np.testing.assert_allclose(made.previous[0, :4, 0], np.arange(2, 6))


@pytest.mark.parametrize("mode", ["plain", "delay_aware", "ensembled"])
def test_other_modes_guide_nothing(mode):
    assert ready().guidance(observation(2), JoinSettings(mode)) is None


@pytest.mark.parametrize("forget", [
    lambda j: j.interrupted(), lambda j: j.reset(), lambda j: j.delay.reset(), lambda j: j.made(chunk(STAMP + 10**9))])
def test_without_a_chunk_to_continue_or_a_delay_nothing_is_guided(forget):
    joining = ready()
    forget(joining)
    assert joining.guidance(observation(2), GUIDED) is None


def test_what_the_expert_or_the_checkpoint_cannot_do_is_refused():
    check_chunk_mode("guided", "vjp", "vision=cuda,expert=eager")
    check_chunk_mode("guided", "identity", "cuda")
    check_chunk_mode("delay_aware", "vjp", "cuda")
    check_chunk_mode("trained", "identity", "eager", 5)
    with pytest.raises(ConfigError, match="rtc_training_max_delay"):
        check_chunk_mode("trained", "identity", "eager", 0)
    with pytest.raises(ConfigError, match="expert on backend 'cuda'"):
        check_chunk_mode("trained", "identity", "cuda", 5)
    with pytest.raises(ConfigError, match="identity with the expert on backend 'cuda'"):
        check_chunk_mode("guided", "vjp", "expert=cuda")
