"""`ros2 run pi05_ros sim_robot`: the simulated tabletop behind ROS topics, in simulated time, which it publishes.

Beside the topics of the policy node it serves: `~/episode` (diagnostic_msgs/DiagnosticStatus, latched) tells the seed,
the task and its outcome; the service `~/reset` (std_srvs/Trigger) begins the next episode.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.errors import ObservationError
from pi05_ros.ros.conversions import image_message, stamp_ns, status, to_time
from pi05_ros.ros.subscriptions import TOPICS
from pi05_ros.schema import CAMERAS
from pi05_ros.sim.controller_messages import read_trajectory
from pi05_ros.sim.tabletop_parameters import TabletopParameters, declare
from pi05_ros.sim.tasks import Outcome, Task, understood
from pi05_ros.sim.timeline import Timeline
from pi05_ros.sim.world import TabletopWorld

START_NS = 1_000_000_000  # 0 would be "no time yet" to ROS
DROP_STREAM = 8  # of the seed; those below are the world's, the expert's and the demonstrations'
SEND_AGAIN_S = 3.0  # of real time: in lockstep, what may have been lost on the way goes out again


class TabletopNode(Node):
    """Simulated time passes when `run_to` is called, and in lockstep stands still from a complete set of images until
    the policy's trajectory for it is here.

    Args:
        given: instead of what the ROS parameters say.
    """

    def __init__(self, given: TabletopParameters | None = None, **kwargs) -> None:
        super().__init__("tabletop", **kwargs)
        self.settings = given or declare(self)
        self.world = TabletopWorld()
        self.counts: Counter[str] = Counter()  # of messages: dropped, refused, sent again, unanswered
        self.frames: dict[str, np.ndarray] = {}  # the last ones
        self.outcome: Outcome = "running"
        self.answered: DiagnosticArray | None = None  # provenance of the last trajectory
        grain_ns = round(self.world.model.opt.timestep * 1e9)
        self.timeline = Timeline(self._pass_to, grain_ns, START_NS)
        self._names = [joint.name for joint in self.world.robot.joints]
        self._awaited: dict[str, int] = {}  # {what is still missing of the answer: stamp of the images}
        self._last_set: list[tuple[Publisher, Image | JointState]] = []
        self._asked_s = self._sent_s = 0.0  # real time, of the last set
        sensors = QoSProfile(depth=5)  # reliable, which serves best-effort listeners too
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        policy = self.settings.policy
        self._ticks = self.create_publisher(Clock, "/clock", 10)
        self._images = {camera: self.create_publisher(Image, f"{policy}/{TOPICS[camera]}", sensors)
                        for camera in CAMERAS}
        self._joints = self.create_publisher(JointState, f"{policy}/joint_states", sensors)
        self._prompt = self.create_publisher(String, f"{policy}/prompt", latched)
        self._episode = self.create_publisher(DiagnosticStatus, "~/episode", latched)
        (controller,) = self.world.robot.controllers
        self.create_subscription(JointTrajectory, f"{policy}/{controller.topic}", self._on_trajectory, 10)
        self.create_subscription(DiagnosticArray, f"{policy}/provenance", self._on_provenance, 10)
        self._reset_policy = self.create_client(Trigger, f"{policy}/reset")
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.begin(self.settings.seed)

    # ------------------------------------------------------------------ episodes

    def begin(self, seed: int, task: Task | None = None) -> Task:
        """An episode, from the present moment on; what was under way is forgotten. The policy is not told."""
        self.timeline.clear()
        self._awaited.clear()
        task = self.world.reset(seed, task)
        self._begun_ns, self._seed, self._drawn = self.timeline.now_ns, seed, np.random.default_rng([seed, DROP_STREAM])
        self.outcome, self._samples = "running", 0
        self._asked = not self.settings.hear_prompt  # until the policy is told something, nothing is judged
        self._tick(self.timeline.now_ns)
        if self.settings.say_prompt:
            self._prompt.publish(String(data=task.prompt))
        self._report()
        self.timeline.at(self.timeline.now_ns, self._sample)
        return task

    def still(self, seconds: float) -> None:
        """Let time pass without sensors; what was under way is forgotten."""
        self.timeline.clear()
        self._awaited.clear()
        self.timeline.run_to(self.timeline.now_ns + round(seconds * 1e9))

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._reset_policy.service_is_ready():
            self._reset_policy.call_async(Trigger.Request())  # the arm is elsewhere now
        task = self.begin(self._seed + 1)
        response.success, response.message = True, f"episode {self._seed}: {task.prompt}"
        return response

    def _judge(self) -> None:
        outcome = self.world.outcome
        if self._asked and self.outcome == "running" and outcome != "running":
            self.outcome = outcome
            self._report()

    def _report(self) -> None:
        task = self.world.task
        level = DiagnosticStatus.WARN if self.outcome == "failure" else DiagnosticStatus.OK
        self._episode.publish(status("tabletop: episode", level, self.outcome, {
            "seed": self._seed, "task": task.kind, "colour": task.colour, "prompt": task.prompt if self._asked else "",
            "seconds": f"{(self.timeline.now_ns - self._begun_ns) * 1e-9:.2f}", **self.counts}))

    # ------------------------------------------------------------------ time

    @property
    def waiting(self) -> bool:
        """In lockstep: time stands still until the policy answers."""
        return bool(self._awaited)

    def run_to(self, time_ns: int) -> bool:
        """As `Timeline.run_to`; while it waits, what was sent may be sent again."""
        if self.waiting:
            self._remind()
        return self.timeline.run_to(time_ns, lambda: self.waiting)

    def _pass_to(self, time_ns: int) -> None:
        self.world.advance((time_ns - self.timeline.now_ns) * 1e-9)
        self._judge()
        self._tick(time_ns)

    def _tick(self, time_ns: int) -> None:
        self._ticks.publish(Clock(clock=to_time(time_ns)))

    def _remind(self) -> None:
        now_s = time.monotonic()
        if now_s - self._asked_s > self.settings.answer_timeout_s:
            self.counts["unanswered"] += 1
            self._awaited.clear()
        if now_s - self._sent_s < SEND_AGAIN_S or not self.waiting:
            return
        self.counts["sent again"] += 1
        self._sent_s = now_s
        self._tick(self.timeline.now_ns)
        for publisher, message in self._last_set:
            publisher.publish(message)

    # ------------------------------------------------------------------ what the robot says

    def _sample(self) -> None:
        """Joint states and, with every so many, images; all with the moment they were taken at."""
        settings, now_ns = self.settings, self.timeline.now_ns
        joints = JointState(name=self._names, position=self.world.state.tolist(), velocity=self.world.velocity.tolist())
        joints.header.stamp = to_time(now_ns)
        messages: list[tuple[Publisher, Image | JointState]] = [(self._joints, joints)]
        if self._samples % settings.images_every == 0:
            self.frames = dict(self.world.observe().images)
            messages += [(self._images[camera], image_message(frame, joints.header.stamp))
                         for camera, frame in self.frames.items()]
        kept = [pair for pair in messages if self._drawn.random() >= settings.drop_share]
        self.counts["dropped"] += len(messages) - len(kept)
        if kept:
            whole = len(messages) > 1 and len(kept) == len(messages)
            self._after(settings.sensor_delay_s, lambda: self._send(kept, now_ns if whole else None))
        self._samples += 1
        due_ns = self._begun_ns + round(self._samples * 1e9 / settings.joint_rate_hz)
        self.timeline.at(due_ns, self._sample)

    def _send(self, messages: list[tuple[Publisher, Image | JointState]], whole_set_ns: int | None) -> None:
        for publisher, message in messages:
            publisher.publish(message)
        if whole_set_ns is not None and self.settings.lockstep:
            self._awaited = {"trajectory": whole_set_ns, "provenance": whole_set_ns}
            self._last_set, self._asked_s, self._sent_s = messages, time.monotonic(), time.monotonic()

    def _after(self, seconds: float, action: Callable[[], object]) -> None:
        """At once without a delay, also when time stands still."""
        if seconds > 0:
            self.timeline.at(self.timeline.now_ns + round(seconds * 1e9), action)
        else:
            action()

    # ------------------------------------------------------------------ what the robot hears

    def _on_trajectory(self, message: JointTrajectory) -> None:
        if self._drawn.random() < self.settings.drop_share:
            self.counts["dropped"] += 1
        else:
            self._after(self.settings.command_delay_s, lambda: self._execute(message))
        if self._awaited.get("trajectory") == stamp_ns(message.header.stamp):
            del self._awaited["trajectory"]

    def _execute(self, message: JointTrajectory) -> None:
        try:
            plan = read_trajectory(message, self._names, self.timeline.now_ns)
            if not self.world.execute(replace(plan, stamp_ns=plan.stamp_ns - self._begun_ns)):
                raise ObservationError("trajectory", expected="finite points at increasing times, not all past, the "
                                       "last at rest", received=f"{len(plan.times_s)} points",
                                       way_out="Look at the sender and its clock.")
        except ObservationError as error:
            self.counts["refused"] += 1
            self.get_logger().error(str(error))

    def _on_provenance(self, message: DiagnosticArray) -> None:
        self.answered = message
        if self._awaited.get("provenance") == stamp_ns(message.header.stamp):
            del self._awaited["provenance"]
        if self.settings.hear_prompt:
            self._hear(next((pair.value for pair in message.status[0].values if pair.key == "prompt"), ""))

    def _hear(self, prompt: str) -> None:
        """What the policy is told is what is judged."""
        task = understood(prompt)
        if task is not None and not (self._asked and task == self.world.task):
            self.world.ask(task)
            self.outcome, self._asked = "running", True
            self._report()
