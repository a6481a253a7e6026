"""`python -m pi05_ros.sim.sensor_load`: one camera, or the joint states, at a steady rate from a process of its own.

It stands for a driver in C++: a message is serialised beforehand, stamped, and goes to the middleware from where it
lies, without the copies that Python makes on the way.

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
from pi05_ros.ros.rcl import publisher_of
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
    print(send(way_out(publisher, message), message, begin_s, args.rate, round(args.seconds * args.rate)), flush=True)
    sys.stdin.read()
    node.destroy_node()
    rclpy.try_shutdown()
    return 0


def camera_source(node: Node, args: argparse.Namespace) -> tuple[Publisher, bytearray]:
    frame = np.random.default_rng(0).integers(0, 256, (args.height, args.width, 3), dtype=np.uint8)
    made = image_message(frame, node.get_clock().now().to_msg())
    return node.create_publisher(Image, args.topic, qos_profile_sensor_data), bytearray(serialize_message(made))


def joint_source(node: Node, args: argparse.Namespace) -> tuple[Publisher, bytearray]:
    joints = load_robot(args.robot).joints
    made = JointState(name=[joint.name for joint in joints],
                      position=[0.5 * (joint.lower + joint.upper) for joint in joints])
    return node.create_publisher(JointState, args.topic, qos_profile_sensor_data), bytearray(serialize_message(made))


def way_out(publisher: Publisher, message: bytearray) -> Callable[[], None]:
    """Publishes what `message` holds then."""
    try:
        return publisher_of(publisher, message)
    except (AttributeError, OSError) as error:
        print(f"sensor_load: this rclpy copies each message twice before it goes out ({error})", file=sys.stderr)
        return lambda: publisher.publish(bytes(message))


def send(publish: Callable[[], None], message: bytearray, begin_s: float, rate: float, count: int,
         wait: Callable[[float], None] = time.sleep) -> int:
    """`count` beats, the message stamped with each moment; a beat that has passed entirely is left out. Gives how many
    went."""
    sent = 0
    for beat in range(count):
        due_s = begin_s + beat / rate
        late_s = time.time() - due_s
        if late_s > 1.0 / rate:
            continue
        if late_s < 0:
            wait(-late_s)
        now_ns = time.time_ns()
        message[STAMP] = (now_ns // 10**9).to_bytes(4, "little") + (now_ns % 10**9).to_bytes(4, "little")
        publish()
        sent += 1
    return sent


if __name__ == "__main__":
    sys.exit(main())
