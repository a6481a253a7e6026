"""When the device is expected to be done, on a clock that only sleeping and computing move."""

import pytest

from pi05_ros.runtime.anticipation import LEAD_S, SLEEP_S, Anticipation


class Device:
    """Computes for so long; `soon` notes how long before its end it was called."""

    def __init__(self):
        self.now, self.slept, self.told = 0.0, [], []
        self.anticipation = Anticipation(lambda: self.now, self.sleep)

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def run(self, takes_s, kind="a"):
        """Gives how long the host waited beyond the end."""
        end_s = self.now + takes_s
        self.anticipation.begin()
        self.anticipation.wait(kind, lambda: self.now >= end_s, lambda: self.told.append(end_s - self.now))
        late_s = max(0.0, self.now - end_s)
        self.now = max(self.now, end_s)
        self.anticipation.done()
        return late_s


def test_somebody_is_told_shortly_before_the_end_that_the_last_runs_had():
    device = Device()
    for takes_s in (0.012, 0.011, 0.0115):
        assert device.run(takes_s) == 0.0
    assert device.told == [pytest.approx(0.0115 - 0.011 + LEAD_S)] and max(device.slept) <= SLEEP_S


def test_nothing_is_expected_of_another_kind_of_run():
    device = Device()
    for kind in "aabbaab":
        device.run(0.011, kind)
    assert not device.told and not device.slept


def test_one_run_that_was_held_up_delays_nobody():
    device = Device()
    for takes_s in (0.13, 0.011, 0.011, 0.13, 0.011):
        assert device.run(takes_s) == 0.0
    assert device.told == [pytest.approx(LEAD_S), pytest.approx(0.119 + LEAD_S), pytest.approx(LEAD_S)]


def test_a_run_that_is_shorter_is_noticed_within_a_sleep():
    device = Device()
    for _ in range(2):
        device.run(0.2)
    assert device.run(0.05) <= SLEEP_S and not device.told
