"""Simulated time: what happens when, and how it follows the wall clock."""

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (pip install 'pi05_ros[ros]', or source a ROS installation)")

from pi05_ros.sim.sim_robot import Pace  # noqa: E402
from pi05_ros.sim.timeline import Timeline  # noqa: E402


def test_actions_happen_in_order_at_whole_grains_and_not_at_the_end():
    done, passed = [], []
    timeline = Timeline(passed.append, grain_ns=10, now_ns=100)
    timeline.at(131, lambda: done.append(("late", timeline.now_ns)))
    timeline.at(120, lambda: (done.append(("first", timeline.now_ns)), timeline.at(120, lambda: done.append("again"))))
    timeline.at(120, lambda: done.append("second"))
    timeline.at(50, lambda: done.append("past"))
    assert timeline.run_to(140) and timeline.now_ns == 140
    assert done == ["past", ("first", 120), "second", "again"] and passed == [120, 140]
    assert timeline.run_to(149) and timeline.now_ns == 140
    assert timeline.run_to(151) and done[-1] == ("late", 140) and passed == [120, 140, 150]
    timeline.at(160, lambda: done.append("never"))
    timeline.clear()
    assert timeline.run_to(200) and "never" not in done


def test_time_stands_still_while_it_is_stopped():
    stopped, timeline = [], Timeline(lambda to: None, grain_ns=1, now_ns=0)
    timeline.at(5, lambda: stopped.append(True))
    assert not timeline.run_to(10, lambda: bool(stopped)) and timeline.now_ns == 5
    stopped.clear()
    assert timeline.run_to(10, lambda: bool(stopped)) and timeline.now_ns == 10


def test_simulated_time_follows_the_wall_clock_and_never_hurries_after():
    half = Pace(0.5, now_ns=1_000, real_s=10.0)
    assert half.goal_ns(1_000, 10.02) == 1_000 + 10_000_000
    assert half.goal_ns(1_000, 11.0) == 1_000 + 5_000_000  # far behind: on from here
    assert half.goal_ns(5_001_000, 11.02) == 1_000 + 10_000_000
    assert Pace(0.0, 0, 0.0).goal_ns(7, 100.0) == 10_000_007
