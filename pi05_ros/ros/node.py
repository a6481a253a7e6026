"""`ros2 run pi05_ros policy_node`: start the node, spin, and stop it so that the robot is at rest."""

from __future__ import annotations

import gc
import signal
import sys
import warnings
from collections.abc import Callable

import rclpy
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.experimental import EventsExecutor
from rclpy.signals import SignalHandlerOptions

from pi05_ros.ros.memory import keep_freed_memory
from pi05_ros.ros.policy_node import PolicyNode

SPIN_S = 0.1  # longest a signal waits


def spare_the_collector() -> None:
    """What the libraries made when they were imported stays: looking through it again and again stops every thread, the
    one that makes chunks too, for 0.1 to 0.2 s each time."""
    gc.collect()
    gc.freeze()


def main(args: list[str] | None = None, make_node: Callable[[], PolicyNode] = PolicyNode) -> int:
    """SIGINT and SIGTERM deactivate (the robot is held), clean up and exit 0; further ones are ignored meanwhile."""
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = make_node()
    except (InvalidParameterValueException, InvalidParameterTypeException) as error:
        print(f"pi05_policy: a parameter given at the start: expected its declared type and range, received: {error} "
              "config/policy.yaml lists them all.", file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    # Warnings (a prompt that is cut off, say) belong in the node's log, whichever thread they come from.
    warnings.showwarning = lambda message, *rest: node.get_logger().warning(str(message))

    def stop(number: int, frame: object) -> None:
        node.stop_requested = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    keep_freed_memory()
    spare_the_collector()
    sys.setswitchinterval(0.0005)  # callbacks wait less for the interpreter while the worker computes
    executor = EventsExecutor()
    executor.add_node(node)
    try:
        while not node.stop_requested:
            executor.spin_once(timeout_sec=SPIN_S)
    finally:  # also when a callback raised: whatever ends this process, the robot is brought to rest first
        node.get_logger().info("stopping: bringing the robot to rest")
        if node.state_label in ("unconfigured", "inactive", "active"):
            node.trigger_shutdown()
        executor.remove_node(node)
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
