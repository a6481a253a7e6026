"""The simulated tabletop behind its topics, against a stand-in for the policy. Nothing sleeps: time is simulated."""

import time

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from rendering import seen_world  # noqa: F401 (a fixture)
from robot_stand_in import PATIENCE_S, rclpy_time
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from pi05_ros.errors import ObservationError
from pi05_ros.ros.conversions import stamp_ns, status
from pi05_ros.sim import tabletop_node
from pi05_ros.sim.controller_messages import read_trajectory
from pi05_ros.sim.tabletop_node import TabletopNode
from pi05_ros.sim.tabletop_parameters import TabletopParameters

MS = 1_000_000
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
pytestmark = pytest.mark.usefixtures("seen_world")


class PolicyStandIn(Node):
    """Keeps what comes, with the simulated time at which it came, and says what the test wants."""

    def __init__(self, now) -> None:
        super().__init__("pi05_policy")
        self.now_ns, self.images, self.joints, self.prompts, self.episodes, self.resets = 0, [], [], [], [], 0
        self.create_subscription(Clock, "/clock", self._on_clock, 100)
        self.create_subscription(Image, "~/base_image", lambda m: self.images.append((now(), m)), 100)
        self.create_subscription(JointState, "~/joint_states", lambda m: self.joints.append((now(), m)), 100)
        self.create_subscription(String, "~/prompt", lambda m: self.prompts.append(m.data), LATCHED)
        self.create_subscription(DiagnosticStatus, "/tabletop/episode", self.episodes.append, LATCHED)
        self.trajectory = self.create_publisher(JointTrajectory, "~/trajectory", 10)
        self.provenance = self.create_publisher(DiagnosticArray, "~/provenance", 10)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.reset = self.create_client(Trigger, "/tabletop/reset")

    def _on_clock(self, message):
        self.now_ns = max(self.now_ns, stamp_ns(message.clock))

    def _on_reset(self, request, response):
        self.resets += 1
        return response


def move(names, positions, seconds, stamp=0, **changes):
    point = JointTrajectoryPoint(positions=list(positions), velocities=[0.0] * len(names),
                                 time_from_start=Duration(seconds=seconds).to_msg())
    message = JointTrajectory(joint_names=list(names), points=[point])
    message.header.stamp = rclpy_time(stamp)
    for name, value in changes.items():
        setattr(message, name, value)
    return message


class Bench:
    """The node, the stand-in, and what makes them meet."""

    def __init__(self, executor, **settings):
        self.executor, self.policy = executor, PolicyStandIn(lambda: self.node.timeline.now_ns)
        self.node = TabletopNode(TabletopParameters(**settings))
        for one in (self.policy, self.node):
            executor.add_node(one)
        self.begun_ns = self.node.timeline.now_ns
        self.until(lambda: self.node.count_subscribers("/pi05_policy/base_image")
                   and all(p.get_subscription_count() for p in (self.policy.trajectory, self.policy.provenance))
                   and self.node._images["base_0_rgb"].get_subscription_count()
                   and self.node._joints.get_subscription_count() and self.node._ticks.get_subscription_count())

    def until(self, holds):
        end = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < end
            self.executor.spin_once(timeout_sec=0.02)

    def go(self, milliseconds):
        """To so long after the start, and until the stand-in knows."""
        there = self.node.run_to(self.begun_ns + milliseconds * MS)
        self.node._tick(self.node.timeline.now_ns)
        self.until(lambda: self.policy.now_ns == self.node.timeline.now_ns)
        return there

    def send(self, message, publisher=None):
        """Until it is here."""
        seen = []
        name = "_on_trajectory" if publisher is None else "_on_provenance"
        callback = next(s for s in self.node.subscriptions
                        if s.topic_name.endswith("trajectory" if publisher is None else "provenance"))
        original, callback.callback = callback.callback, lambda m: (getattr(self.node, name)(m), seen.append(m))
        (publisher or self.policy.trajectory).publish(message)
        self.until(lambda: seen)
        callback.callback = original


def test_sensors_show_the_moment_of_their_stamp_and_arrive_after_the_delay(executor):
    bench = Bench(executor, joint_rate_hz=20.0, image_rate_hz=10.0, sensor_delay_s=0.03)
    for end in range(10, 210, 10):
        bench.go(end)
    bench.until(lambda: len(bench.policy.images) >= 2 and len(bench.policy.joints) >= 4)
    for kept, period in ((bench.policy.images, 100), (bench.policy.joints, 50)):
        stamps = [stamp_ns(message.header.stamp) - bench.begun_ns for _, message in kept]
        assert stamps == [k * period * MS for k in range(len(stamps))]
        for arrived, message in kept:
            assert arrived - stamp_ns(message.header.stamp) >= 30 * MS
    image, joints = bench.policy.images[0][1], bench.policy.joints[0][1]
    assert (image.encoding, image.height, image.width, len(image.data)) == ("rgb8", 224, 224, 224 * 224 * 3)
    assert joints.name == bench.node._names and len(joints.velocity) == 7


def test_a_trajectory_is_executed_from_its_stamp_replaced_and_refused(executor):
    bench = Bench(executor, joint_rate_hz=20.0, image_rate_hz=1.0)
    names, start = bench.node._names, bench.node.world.command
    goal = start + np.array([0.2, 0, 0, 0, 0, 0, 0])
    bench.go(100)
    bench.send(move(names, goal, 0.4))  # stamp 0 is now
    bench.go(300)
    halfway = bench.node.world.command[0] - start[0]
    assert 0.08 < halfway < 0.12
    bench.send(move(names, start, 0.5, stamp=bench.begun_ns + 300 * MS, joint_names=names[::-1], points=[
        JointTrajectoryPoint(positions=list(start[::-1]), velocities=[0.0] * 7,
                             time_from_start=Duration(seconds=0.5).to_msg())]))
    bench.go(820)
    np.testing.assert_allclose(bench.node.world.command, start, atol=1e-9)
    assert bench.node.counts["refused"] == 0
    for bad in (move(names, goal, 0.1, stamp=bench.begun_ns), move(names[1:], goal[1:], 0.5),
                move(names, goal, 0.5, points=[]), move(names, goal * np.nan, 0.5)):
        bench.send(bad)
    assert bench.node.counts["refused"] == 4
    bench.go(900)
    np.testing.assert_allclose(bench.node.world.command, start, atol=1e-9)


def test_a_command_acts_after_the_networks_delay(executor):
    bench = Bench(executor, command_delay_s=0.1, image_rate_hz=1.0)
    start = bench.node.world.command
    bench.go(50)
    bench.send(move(bench.node._names, start + 0.02, 0.2))
    bench.go(150)
    np.testing.assert_array_equal(bench.node.world.command, start)
    bench.go(200)
    assert (bench.node.world.command > start).all()


def test_in_lockstep_time_waits_for_the_answer_and_asks_again(executor, monkeypatch):
    bench = Bench(executor, lockstep=True, image_rate_hz=10.0, hear_prompt=False)
    assert not bench.go(50) and bench.node.timeline.now_ns == bench.begun_ns
    bench.until(lambda: bench.policy.images)
    assert not bench.go(50)
    monkeypatch.setattr(tabletop_node, "SEND_AGAIN_S", 0.0)
    assert not bench.go(50)
    bench.until(lambda: len(bench.policy.images) == 2)
    assert bench.policy.images[0][1] == bench.policy.images[1][1]  # the same moment
    monkeypatch.undo()
    bench.send(move(bench.node._names, bench.node.world.command, 0.5, stamp=bench.begun_ns))
    assert not bench.go(50)  # its provenance is still missing
    message = DiagnosticArray(status=[status("chunk", DiagnosticStatus.OK, "", {"prompt": ""})])
    message.header.stamp = rclpy_time(bench.begun_ns)
    bench.send(message, bench.policy.provenance)
    assert bench.go(50)
    assert not bench.go(150) and bench.node.timeline.now_ns == bench.begun_ns + 100 * MS


def test_a_set_that_is_not_answered_is_given_up_and_one_that_is_lost_not_waited_for(executor):
    bench = Bench(executor, lockstep=True, answer_timeout_s=0.0)
    assert not bench.go(10) and bench.go(10)
    assert bench.node.counts["unanswered"] == 1
    bench.node.settings = TabletopParameters(lockstep=True, drop_share=1.0)
    sent = bench.node.counts["dropped"]
    assert bench.go(400) and bench.node.counts["dropped"] - sent > 20
    bench.send(move(bench.node._names, bench.node.world.command + 0.1, 0.5))
    before = bench.node.world.command
    bench.go(450)
    np.testing.assert_array_equal(bench.node.world.command, before)


def test_reset_begins_the_next_episode_and_tells_the_policy(executor):
    bench = Bench(executor, seed=5, say_prompt=True, hear_prompt=False)
    bench.until(lambda: bench.policy.prompts and bench.policy.episodes and bench.policy.reset.service_is_ready())
    assert bench.policy.prompts == [bench.node.world.task.prompt]
    future = bench.policy.reset.call_async(Trigger.Request())
    bench.until(lambda: future.done() and bench.policy.resets and len(bench.policy.prompts) == 2)
    assert future.result().success and "episode 6" in future.result().message
    said = {pair.key: pair.value for pair in bench.policy.episodes[-1].values}
    assert said["seed"] == "6" and said["prompt"] == bench.policy.prompts[1] == bench.node.world.task.prompt


def test_what_the_policy_is_told_is_judged(executor):
    bench = Bench(executor, image_rate_hz=1.0)
    world = bench.node.world
    assert not bench.node._asked

    def tell(prompt):
        message = DiagnosticArray(status=[status("chunk", DiagnosticStatus.OK, "", {"prompt": prompt})])
        bench.send(message, bench.policy.provenance)

    tell("sing a song")
    assert not bench.node._asked
    tell("Touch the green block")
    bench.until(lambda: bench.policy.episodes and "green" in str(bench.policy.episodes[-1].values))
    world._touched[1] = True  # as if a finger had
    bench.go(20)
    bench.until(lambda: bench.policy.episodes[-1].message == "success")
    tell("touch the blue block")
    bench.go(40)
    bench.until(lambda: bench.policy.episodes[-1].message == "running")
    assert (world.task.kind, world.task.colour) == ("touch", "blue")


def test_parameters_are_declared_with_their_ranges(executor):
    node = TabletopNode(parameter_overrides=[Parameter("speed", value=2.0), Parameter("lockstep", value=True)])
    executor.add_node(node)
    assert node.settings.speed == 2.0 and node.settings.lockstep and node.settings.images_every == 5
    assert all(node.describe_parameter(name).description for name in TabletopParameters.__dataclass_fields__)


def test_a_trajectory_without_velocities_is_refused():
    message = move(["a"], [0.0], 1.0)
    message.points[0].velocities = []
    with pytest.raises(ObservationError, match="1 velocities"):
        read_trajectory(message, ["a"], 0)
