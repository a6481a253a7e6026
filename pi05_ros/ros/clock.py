"""The robot's clock in nanoseconds, for those on the way from a frame to its trajectory."""

from __future__ import annotations

import time

from rclpy.clock import Clock, ROSClock


def now_ns(clock: Clock) -> int:
    """As `clock.now().nanoseconds`, which makes two objects first: 4 us where it is in the processor's cache, 40 where
    it is not. A ROS clock that is not simulated is the system's."""
    if isinstance(clock, ROSClock) and not clock.ros_time_is_active:
        return time.time_ns()
    return clock.now().nanoseconds
