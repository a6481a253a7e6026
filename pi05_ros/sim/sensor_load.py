"""`python -m pi05_ros.sim.sensor_load`: one camera, or the joint states, at a steady rate from a process of its own.

Prints `ready` once somebody listens, waits for a line with the time to begin (seconds of the epoch), sends on the
beat from then on, and prints how many messages it sent. It stays until its standard input is closed, because
what a process has sent may die with it. All processes that begin at the same time keep the same beat.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
import rclpy
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import qos_profile_sensor_data
from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image, JointState

from pi05_ros.ros.conversions import image_message
from pi05_ros.ros.memory import keep_freed_memory
from pi05_ros.transforms.robot_loader import load_robot

STAMP = slice(4, 12)  # of a serialised message that begins with a header


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topic", required=True, help="full name; joint states go where it ends in joint_states")
    parser.add_argument("--rate", type=float, required=True, help="messages a second")
    parser.add_argument("--seconds", type=float, required=True, help="how long")
    parser.add_argument("--height", type=int, default=480, help="of the camera (default: 480)")
    parser.add_argument("--width", type=int, default=640, help="of the camera (default: 640)")
    parser.add_argument("--robot", default="arm6", help="whose joints (default: arm6)")
    args = parser.parse_args(argv)
    keep_freed_memory()  # as a camera driver, which has its buffers
    rclpy.init()
    node = rclpy.create_node("sensor_load")
    joints = args.topic.endswith("joint_states")
    publisher, message = joint_source(node, args) if joints else camera_source(node, args)
    while not publisher.get_subscription_count():
        time.sleep(0.05)
    print("ready", flush=True)
    begin_s = float(sys.stdin.readline())
    print(send(publisher, message, begin_s, args.rate, round(args.seconds * args.rate)), flush=True)
    sys.stdin.read()
    node.destroy_node()
    rclpy.try_shutdown()
    return 0


def camera_source(node: Node, args: argparse.Namespace) -> tuple[Publisher, bytes]:
    frame = np.random.default_rng(0).integers(0, 256, (args.height, args.width, 3), dtype=np.uint8)
    made = image_message(frame, node.get_clock().now().to_msg())
    return node.create_publisher(Image, args.topic, qos_profile_sensor_data), serialize_message(made)


def joint_source(node: Node, args: argparse.Namespace) -> tuple[Publisher, bytes]:
    joints = load_robot(args.robot).joints
    made = JointState(name=[joint.name for joint in joints],
                      position=[0.5 * (joint.lower + joint.upper) for joint in joints])
    return node.create_publisher(JointState, args.topic, qos_profile_sensor_data), serialize_message(made)


def send(publisher: Publisher, message: bytes, begin_s: float, rate: float, count: int,
         wait: Callable[[float], None] = time.sleep) -> int:
    """`count` beats, each stamped with its moment; a beat that has passed entirely is left out. Gives how many went."""
    serialised, sent = bytearray(message), 0
    for beat in range(count):
        due_s = begin_s + beat / rate
        late_s = time.time() - due_s
        if late_s > 1.0 / rate:
            continue
        if late_s < 0:
            wait(-late_s)
        now_ns = time.time_ns()
        serialised[STAMP] = (now_ns // 10**9).to_bytes(4, "little") + (now_ns % 10**9).to_bytes(4, "little")
        publisher.publish(bytes(serialised))
        sent += 1
    return sent


if __name__ == "__main__":
    sys.exit(main())
