"""The real node under faults, on one thread and a clock of its own: no sleeping, the same run for the same seed.

A cycle is one control period: joints and pictures go to the node's own callbacks as messages, whatever it publishes to
a simulated joint_trajectory_controller, and a judge looks at what that executes.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from rclpy.parameter import Parameter
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.ros.conversions import to_time
from pi05_ros.ros.subscriptions import TOPICS
from pi05_ros.runtime.chunking import JointLimits
from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.sim.faults import KINDS, Fault, FaultPlan, Kind
from pi05_ros.sim.joint_integrator import JointIntegrator
from pi05_ros.sim.soaked_node import SLOWEST_S, ScriptedPolicy, SoakedNode
from pi05_ros.transforms.robot_loader import load_robot

START_NS = 1_000_000_000_000
SPEED_TOLERANCE = 1.02
POSITION_TOLERANCE = 2e-3  # rad or m
AFTER_JUMP_S = 1.5  # of the clock: the node cannot know what still moves while the clock says that it is over
SAMPLES = 4  # of the motion, a cycle
BESIDE = 0.005  # of its range: how far a joint is from where a second publisher says it is
PROMPTS = ("pick up the block", "", "\0", "\U0001f916" * 50, "\u6f22 \u202e\u0301", "x" * 100_000, "\n\n", " " * 1000)
SETTINGS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("denoising_steps", (1, 10, 20)), ("execution_horizon", (0, 5, 20)), ("max_rate_hz", (0.0, 7.0, 30.0)),
    ("max_input_age_s", (0.2, 0.5)), ("input_timeout_s", (0.3, 1.0)), ("stop_time_s", (0.1, 0.2)),
    ("on_fault", ("hold", "stop_publishing", "x")), ("max_committed_s", (0.8, 1.0, -1.0)), ("seed", (3,)))


@dataclass
class Findings:
    """What a soak saw. violations: the first of each kind with its cycle; counts of all; injected and refused."""

    violations: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    trajectories: int = 0
    fastest: float = 0.0  # share of a joint's speed limit


class Soak:
    """Args: robot: name or file; plan's seed and share as in FaultPlan. `rclpy.init` must have been called."""

    def __init__(self, robot: str = "arm6", seed: int = 0, share: float = 0.1,
                 kinds: tuple[Kind, ...] = KINDS) -> None:
        self.found = Findings()
        self._robot = load_robot(robot)
        self._limits = JointLimits(self._robot)
        self._names = [joint.name for joint in self._robot.joints]
        slots = (*(camera for camera in TOPICS if camera in self._robot.cameras), "state")
        self._plan = FaultPlan(seed, slots, share, kinds).cycles()
        self._rng = np.random.default_rng(seed + 1)
        self._steady_ns, self._offset_ns, self._cycle = START_NS, 0, 0
        self._controller = JointIntegrator((self._limits.lower + self._limits.upper) / 2)
        self._jumped_ns = self._ended_ns = -START_NS
        self._silent_until_ns: Counter[str] = Counter()
        self._late: list[tuple[int, Callable[[], None]]] = []
        self._meanwhile: list[Callable[[], object]] = []
        self._joint_faults = 0
        self._images = {kind: _image(kind) for kind in ("", "encoding", "size")}
        self.policy: ScriptedPolicy | None = None
        self.node = SoakedNode(self._take, self._now_ns, load_policy=self._make_policy)
        self.node.set_parameters([Parameter("robot", value=robot)])

    def run(self, cycles: int) -> Findings:
        for faults in islice(self._plan, cycles):
            self._one_cycle(faults)
        self.found.refused = Counter(self.node.diagnostics.refused)
        refused = self.found.refused["non-finite joint"] + self.found.refused["missing joint"]
        if refused != self._joint_faults:
            self._violation("joint faults not counted", f"{self._joint_faults} injected, {refused} in diagnostics")
        return self.found

    def close(self) -> None:
        self.node.destroy_node()

    # ------------------------------------------------------------------ one cycle

    def _one_cycle(self, faults: tuple[Fault, ...]) -> None:
        self._cycle += 1
        self._pass_time(self._robot.control_period_s)
        if self.node.state_label != "active" and self._cycle % 10 == 0:
            self._lifecycle(0.0)
        for fault in faults:
            self.found.injected[fault.kind] += 1
            self._inject(fault)
        due = [send for at_ns, send in self._late if at_ns <= self._steady_ns]
        self._late = [late for late in self._late if late[0] > self._steady_ns]
        self._send_all(faults)
        for send in due:
            send()
        if self.node.parts is not None:
            self.node.parts.worker.run()  # type: ignore[attr-defined]
        self.node.turn()
        if self._cycle % 3 == 0:
            self.node.watch()
        if self._cycle % 50 == 0:
            self.node.diagnose()

    def _inject(self, fault: Fault) -> None:
        amount = fault.amount
        act: Callable[[], object] | None = {
            "lifecycle": lambda: self._lifecycle(amount), "reset": lambda: self._reset(),
            "prompt": lambda: self._say(PROMPTS[int(amount * len(PROMPTS))]),
            "parameters": lambda: self._storm()}.get(fault.kind)
        if act is not None and self._rng.random() < 0.5 and not (fault.kind == "lifecycle" and amount > 0.5):
            self._meanwhile.append(act)  # while a chunk is made
        elif act is not None:
            act()
        elif fault.kind == "clock_jump":
            self._offset_ns += int((amount - 0.5) * 2e9)
            self._jumped_ns = self._steady_ns
        elif fault.kind == "silence":
            self._silent_until_ns[fault.target] = self._steady_ns + int(amount * 3e9)
        elif self.policy is not None and fault.kind in ("worker_exception", "bad_actions", "slow_inference"):
            self.policy.trouble = fault

    def _lifecycle(self, amount: float) -> None:
        """The next step up from below active; from active down, and above 0.5 all the way."""
        steps = {"unconfigured": ("configure", "activate"), "inactive": ("activate",), "active": ("deactivate",)}
        for step in steps.get(self.node.state_label, ()):
            getattr(self.node, f"trigger_{step}")()
        if amount > 0.5 and self.node.state_label == "inactive":
            self.node.trigger_cleanup()
        self._topics = {s.topic_name.rsplit("/", 1)[1]: s.callback for s in self.node.subscriptions}

    def _reset(self) -> None:
        self.node._on_reset(Trigger.Request(), Trigger.Response())

    def _storm(self) -> None:
        for _ in range(5):
            name, values = SETTINGS[self._rng.integers(len(SETTINGS))]
            self.node.set_parameters([Parameter(name, value=values[self._rng.integers(len(values))])])

    def _say(self, prompt: str) -> None:
        self._call("prompt", String(data=prompt))

    # ------------------------------------------------------------------ inputs

    def _send_all(self, faults: tuple[Fault, ...]) -> None:
        for slot in (*TOPICS, "state"):
            kinds = {fault.kind: fault.amount for fault in faults if fault.target == slot}
            if "drop" in kinds or self._silent_until_ns[slot] > self._steady_ns:
                continue
            send = self._joints(kinds) if slot == "state" else self._picture(slot, kinds)
            wait_s = 0.6 * kinds["delay"] if "delay" in kinds else 0.03 if "reorder" in kinds else 0.0
            if wait_s:
                self._late.append((self._steady_ns + int(wait_s * 1e9), send))
                continue
            for _ in range(1 + ("duplicate" in kinds)):
                send()
            if "second_publisher" in kinds:
                (self._joints({}, BESIDE) if slot == "state" else self._picture(slot, {}))()

    def _picture(self, slot: str, kinds: dict) -> Callable[[], None]:
        cdr = bytearray(self._images["encoding" if "encoding" in kinds else "size" if "size" in kinds else ""])
        struct.pack_into("<iI", cdr, 4, *divmod(self._now_ns(), 1_000_000_000))
        return lambda: self._call(TOPICS[slot], bytes(cdr))

    def _joints(self, kinds: dict, beside: float = 0.0) -> Callable[[], None]:
        positions = self._controller.at(self._steady_ns)[0] + beside * (self._limits.upper - self._limits.lower)
        if "not_a_number" in kinds:
            positions[int(kinds["not_a_number"] * len(positions))] = np.nan
        message = JointState(name=self._names, position=positions)
        if "missing_joint" in kinds:
            message = JointState(name=self._names[1:], position=positions[1:])
        message.header.stamp = to_time(self._now_ns())
        bad = bool({"not_a_number", "missing_joint"} & kinds.keys())

        def send() -> None:
            self._joint_faults += bad and self.node.parts is not None
            self._call("joint_states", message)

        return send

    def _call(self, topic: str, message: Any) -> None:
        if self.node.parts is not None:
            self._topics[topic](message)

    # ------------------------------------------------------------------ outputs

    def _take(self, message: Any, topic: str) -> None:
        if topic == "~/provenance":
            epoch = next(pair.value for pair in message.status[0].values if pair.key == "epoch")
            if epoch != str(self.node.epoch):
                self._violation("a chunk of a past activation", f"{epoch} in {self.node.epoch}")
            age_s = (self._now_ns() - message.header.stamp.sec * 10**9 - message.header.stamp.nanosec) * 1e-9
            if age_s > 0.5 + SLOWEST_S and self._steady_ns - self._jumped_ns > AFTER_JUMP_S * 1e9:
                self._violation("a stale command", f"{age_s:.3f} s")
        elif topic != "/diagnostics":
            self._execute(deserialize_message(message, JointTrajectory))

    def _execute(self, message: JointTrajectory) -> None:
        self.found.trajectories += 1
        times = np.array([p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in message.points])
        order = [message.joint_names.index(name) for name in self._names]
        stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec - self._offset_ns
        plan = JointTrajectoryPlan(stamp, times, np.array([p.positions for p in message.points])[:, order],
                                   np.array([p.velocities for p in message.points])[:, order])
        if not (np.isfinite(plan.positions).all() and np.isfinite(plan.velocities).all()):
            self._violation("not finite", str(plan))
        if (outside := self._outside(plan.positions)) > POSITION_TOLERANCE:
            self._violation("a command beyond a position limit", f"by {outside:.4f}")
        if plan.end_ns > self._steady_ns + 1_000_000_001 + 200_000_000:
            self._violation("commits too far ahead", f"{(plan.end_ns - self._steady_ns) * 1e-9:.3f} s")
        self._controller.execute(plan, self._steady_ns)

    # ------------------------------------------------------------------ time and judgement

    def _now_ns(self) -> int:
        return self._steady_ns + self._offset_ns

    def _make_policy(self, **kwargs: Any) -> ScriptedPolicy:
        self.policy = ScriptedPolicy(kwargs["robot"], self._while_computing)
        return self.policy

    def _while_computing(self, seconds: float) -> None:
        waiting, self._meanwhile = self._meanwhile, []
        for act in waiting:
            act()
        self._pass_time(seconds)

    def _pass_time(self, seconds: float) -> None:
        if self.node.epoch is not None:
            self._ended_ns = self._steady_ns
        for _ in range(SAMPLES):
            self._steady_ns += int(seconds * 1e9 / SAMPLES)
            self._judge(*self._controller.at(self._steady_ns))

    def _judge(self, position: np.ndarray, velocity: np.ndarray) -> None:
        if not (np.isfinite(position).all() and np.isfinite(velocity).all()):
            self._violation("executes what is not finite", str(position))
        if self._steady_ns - self._jumped_ns > AFTER_JUMP_S * 1e9:
            if (outside := self._outside(position)) > POSITION_TOLERANCE:
                self._violation("beyond a position limit", f"by {outside:.4f}")
            share = float((np.abs(velocity) / self._limits.velocity).max())
            self.found.fastest = max(self.found.fastest, share)
            if share > SPEED_TOLERANCE:
                self._violation("too fast", f"{share:.3f} of the limit")
        if self._steady_ns - self._ended_ns > 1.5e9 and (velocity != 0).any():
            self._violation("moves while the node is not active", str(velocity))

    def _outside(self, positions: np.ndarray) -> float:
        return float(np.maximum(self._limits.lower - positions, positions - self._limits.upper).max())

    def _violation(self, what: str, how: str) -> None:
        self.found.counts[what] += 1
        self.found.violations.setdefault(what, f"cycle {self._cycle}: {how}")


def _image(fault: str) -> bytes:
    return serialize_message(Image(encoding="16UC1" if fault == "encoding" else "rgb8", height=2, width=2,
                                   step=1 if fault == "size" else 6, data=bytes(12)))
