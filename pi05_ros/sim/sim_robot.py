"""Runs the simulated tabletop against the wall clock: simulated time follows it, at `speed` times its rate."""

from __future__ import annotations

import signal
import sys
import time

import rclpy
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions

from pi05_ros.errors import Pi05Error
from pi05_ros.sim.tabletop_node import TabletopNode

TURN_S = 0.01  # of real time
MOST_BEHIND_S = 0.1  # simulated time that cannot keep up runs slower; it never hurries after


class Pace:
    """Where simulated time should be.

    Args:
        speed: simulated seconds in a second; 0: as fast as it goes.
    """

    def __init__(self, speed: float, now_ns: int, real_s: float) -> None:
        self._speed, self._from_ns, self._from_s = speed, now_ns, real_s

    def goal_ns(self, now_ns: int, real_s: float) -> int:
        """How far to go from `now_ns`, at the real time `real_s`."""
        if self._speed == 0:
            return now_ns + round(TURN_S * 1e9)
        goal_ns = self._from_ns + round((real_s - self._from_s) * self._speed * 1e9)
        if goal_ns - now_ns > MOST_BEHIND_S * self._speed * 1e9:
            self._from_ns, self._from_s = now_ns, real_s
            return now_ns + round(TURN_S * self._speed * 1e9)
        return goal_ns


def main(args: list[str] | None = None) -> int:
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    try:
        node = TabletopNode()
    except (Pi05Error, InvalidParameterValueException, InvalidParameterTypeException) as error:
        print(f"sim_robot: {error}", file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    pace = Pace(node.settings.speed, node.timeline.now_ns, time.monotonic())
    try:
        while not stop:
            node.run_to(pace.goal_ns(node.timeline.now_ns, time.monotonic()))
            executor.spin_once(timeout_sec=TURN_S if node.settings.speed or node.waiting else 0.0)
    except Pi05Error as error:  # no OpenGL, which the first image finds out
        print(f"sim_robot: {error}", file=sys.stderr)
        return 2
    finally:
        node.world.close()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
