"""use_sim_time: stamps, ages and commands live on /clock."""

import time

from rclpy.clock import Clock as RobotClock
from rclpy.clock import ClockType
from rclpy.parameter import Parameter
from rclpy.time import Time
from robot_stand_in import rclpy_time
from rosgraph_msgs.msg import Clock

from pi05_ros.ros.clock import now_ns
from pi05_ros.ros.policy_node import PolicyNode

S = 10**9


def test_the_node_lives_on_the_simulations_clock(executor, robot):
    from fake_policy import FakePolicy

    node = PolicyNode(load_policy=lambda **kwargs: FakePolicy(kwargs["robot"]),
                      parameter_overrides=[Parameter("use_sim_time", value=True)])
    executor.add_node(node)
    clock = robot.create_publisher(Clock, "/clock", 10)
    now = 50 * S  # long before the time of day

    def tick(step_ns):
        nonlocal now
        now += step_ns
        clock.publish(Clock(clock=rclpy_time(now)))

    def send(stamp):
        images = [robot.image(c) for c in range(3)]
        joints = robot.joints()
        for message in (*images, joints):
            message.header.stamp = rclpy_time(stamp)
        robot.send(images, joints)

    robot.until(lambda: node.get_clock().now().nanoseconds >= 50 * S, lambda: tick(S // 100), "the clock")
    assert node.trigger_configure().name == "SUCCESS" and node.trigger_activate().name == "SUCCESS"
    robot.connect()

    def live():
        tick(S // 100)
        send(now)

    first = robot.next_trajectory(live)
    assert 50 * S <= first.header.stamp.sec * S + first.header.stamp.nanosec <= now
    tick(2 * S)
    robot.until(lambda: node.get_clock().now().nanoseconds >= now, lambda: tick(0), "two seconds to pass")
    assert node.diagnostics.refused["stale input"] == 0
    robot.until(lambda: node.diagnostics.refused["stale input"], lambda: (tick(S // 100), send(now - S)),
                "inputs of a second ago, on that clock, to be refused")
    node.trigger_shutdown()


def test_the_clock_is_the_systems_unless_it_is_simulated(executor):
    before, clock = time.time_ns(), RobotClock(clock_type=ClockType.ROS_TIME)
    assert before <= now_ns(clock) <= time.time_ns()
    clock._set_ros_time_is_active(True)
    clock.set_ros_time_override(Time(seconds=7, clock_type=ClockType.ROS_TIME))
    assert now_ns(clock) == clock.now().nanoseconds == 7 * S
    assert now_ns(RobotClock(clock_type=ClockType.STEADY_TIME)) < before
