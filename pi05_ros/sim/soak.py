"""The real node under faults, on one thread and a clock of its own: no sleeping, the same run for the same seed.

A cycle is one control period: joints and pictures go to the node's own callbacks as messages, whatever it publishes to
a simulated joint_trajectory_controller, and a judge looks at what that executes.
"""

from __future__ import annotations

from base64 import b64decode
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.serialization import deserialize_message
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.ros.subscriptions import TOPICS
from pi05_ros.sim.accounts import CAUSES, Account, Accounts, broken, counts_of
from pi05_ros.sim.faults import KINDS, Fault, FaultPlan, Kind
from pi05_ros.sim.faulty_inputs import BESIDE, PROMPTS, SETTINGS, joint_damage, joints, picture, picture_damage
from pi05_ros.sim.judge import Findings, Judge
from pi05_ros.sim.soaked_node import SLOWEST_S, ScriptedPolicy, SoakedNode
from pi05_ros.transforms.robot_loader import load_robot

START_NS = 1_000_000_000_000
SAMPLES = 4  # of the motion, a cycle
BUDGET_S = 0.1  # latency_budget_s
LONG_SILENCE_S, LATEST_S = 1.9, 0.65  # that surely stops the node; by which a message of before it may be late
LARGE_STEP_S = 0.9  # back, which the node surely sees


@dataclass(frozen=True)
class Promise:
    """A counter that must have risen by a time, unless the activation has ended meanwhile or `broken` says no."""

    due_ns: int
    counter: str
    epoch: int | None
    before: int
    broken: Callable[[], bool]


class Soak:
    """Args: robot: name or file; plan's seed and share as in FaultPlan. `rclpy.init` must have been called."""

    def __init__(self, robot: str = "arm6", seed: int = 0, share: float = 0.1,
                 kinds: tuple[Kind, ...] = KINDS) -> None:
        self._robot = load_robot(robot)
        slots = (*(camera for camera in TOPICS if camera in self._robot.cameras), "state")
        self._plan = FaultPlan(seed, slots, share, kinds).cycles()
        self._rng = np.random.default_rng(seed + 1)
        self._steady_ns, self._offset_ns, self._cycle = START_NS, 0, 0
        self.judge = Judge(self._robot, START_NS, lambda: f"cycle {self._cycle}")
        self.accounts = Accounts()
        self.counts: dict[str, int] = {}  # of the last report
        self._promises: list[Promise] = []
        self._sent_ns: Counter[str] = Counter()  # when a slot's last message was delivered
        self._jumps = 0
        self._damaged: deque[str] = deque(maxlen=200)  # pictures, as provenance names them
        self._silent_until_ns: Counter[str] = Counter()
        self._late: list[tuple[int, Callable[[], None]]] = []
        self._meanwhile: list[Callable[[], object]] = []
        self.policy: ScriptedPolicy | None = None
        self.node = SoakedNode(self._take, self._now_ns, load_policy=self._make_policy)
        self.node.set_parameters([Parameter("robot", value=robot), Parameter("latency_budget_s", value=BUDGET_S)])

    def run(self, cycles: int) -> Findings:
        for faults in islice(self._plan, cycles):
            self._one_cycle(faults)
        for line in broken(self.compared()):
            self.judge.violation("not counted", line)
        return self.found

    @property
    def found(self) -> Findings:
        return self.judge.found

    def compared(self) -> list[Account]:
        """What must have been counted, against a report of now."""
        self.node.diagnose()
        cameras = {slot: topic for slot, topic in TOPICS.items() if slot in self._robot.cameras}
        return self.accounts.compare(self.counts, cameras)

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
        self._hold_to_promises()
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
            self._jump(int((amount - 0.5) * 2e9))
        elif fault.kind == "silence":
            self._fall_silent(fault.target, amount * 3)
        elif self.policy is not None and fault.kind in ("worker_exception", "bad_actions", "slow_inference"):
            self.policy.trouble = fault

    def _lifecycle(self, amount: float) -> None:
        """The next step up from below active; from active down, and above 0.5 all the way."""
        steps = {"unconfigured": ("configure", "activate"), "inactive": ("activate",), "active": ("deactivate",)}
        for step in steps.get(self.node.state_label, ()):
            done = getattr(self.node, f"trigger_{step}")()
            if step == "activate" and done == TransitionCallbackReturn.SUCCESS:
                self.accounts.must("activations", "lifecycle, reset")
        if amount > 0.5 and self.node.state_label == "inactive":
            self.node.trigger_cleanup()

    def _reset(self) -> None:
        if self.node._on_reset(Trigger.Request(), Trigger.Response()).success:
            self.accounts.must("activations", "lifecycle, reset")

    def _storm(self) -> None:
        for _ in range(5):
            name, values = SETTINGS[self._rng.integers(len(SETTINGS))]
            answers = self.node.set_parameters([Parameter(name, value=values[self._rng.integers(len(values))])])
            if not answers[0].successful:
                self.accounts.must("refused.parameter", "parameters")

    def _say(self, prompt: str) -> None:
        if self.node.parts is not None:
            self.accounts.must("received.prompt", "prompt")
        self._call("prompt", String(data=prompt))

    def _jump(self, by_ns: int) -> None:
        self._offset_ns += by_ns
        self._jumps += 1
        self.judge.clock_jumped(self._steady_ns)
        if by_ns < 0:
            self.accounts.may("clock set back", "clock_jump")
        if by_ns < -LARGE_STEP_S * 1e9:
            self._promise("clock set back", 0.1, lambda: False)

    def _fall_silent(self, slot: str, seconds: float) -> None:
        self._silent_until_ns[slot] = began_ns = self._steady_ns
        self._silent_until_ns[slot] += int(seconds * 1e9)
        required = slot == "state" or self._robot.cameras[slot].required
        if required and seconds > LONG_SILENCE_S:
            self._promise(f"refused.unusable {slot}", seconds - 0.1,
                          lambda: self._sent_ns[slot] > began_ns + LATEST_S * 1e9)

    def _promise(self, counter: str, within_s: float, off: Callable[[], bool]) -> None:
        self.node.diagnose()
        jumps = self._jumps
        self._promises.append(Promise(self._steady_ns + int(within_s * 1e9), counter, self.node.epoch,
                                      self.counts.get(counter, 0), lambda: off() or self._jumps != jumps))

    def _hold_to_promises(self) -> None:
        due = [promise for promise in self._promises if promise.due_ns <= self._steady_ns]
        if not due:
            return
        self._promises = [promise for promise in self._promises if promise.due_ns > self._steady_ns]
        self.node.diagnose()
        for one in due:
            same = one.epoch is not None and one.epoch == self.node.epoch and not one.broken()
            if same and self.counts.get(one.counter, 0) <= one.before:
                self.judge.violation("not counted", f"{one.counter} did not rise")

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
        stamp_ns, damage = self._now_ns(), picture_damage(kinds)
        cdr = picture(stamp_ns, kinds)

        def send() -> None:
            if damage and self.node.parts is not None:
                self.accounts.may(CAUSES[damage], "encoding, size")
                self._damaged.append(f"{slot} {stamp_ns}")
            self._deliver(slot, TOPICS[slot], stamp_ns, cdr)

        return send

    def _joints(self, kinds: dict, beside: float = 0.0) -> Callable[[], None]:
        limits, stamp_ns = self.judge.limits, self._now_ns()
        positions = self.judge.controller.at(self._steady_ns)[0] + beside * (limits.upper - limits.lower)
        message, damage = joints(self._robot, positions, stamp_ns, kinds), joint_damage(kinds)
        return lambda: self._deliver("state", "joint_states", stamp_ns, message, damage)

    def _deliver(self, slot: str, topic: str, stamp_ns: int, message: Any, damage: str = "") -> None:
        if self.node.parts is not None and (topic == "joint_states" or slot in self._robot.cameras):
            self.accounts.message(topic, slot, stamp_ns, self._now_ns(), self.node.parts.mailbox, damage)
        self._sent_ns[slot] = self._steady_ns
        self._call(topic, message)

    def _call(self, topic: str, message: Any) -> None:
        if self.node.parts is not None:
            self.node.parts.inputs.receive[topic](message)

    # ------------------------------------------------------------------ outputs

    def _take(self, message: Any, topic: str) -> None:
        if topic == "/diagnostics":
            self.counts = counts_of(message)
        elif topic == "~/provenance":
            self._examine({pair.key: pair.value for pair in message.status[0].values})
        else:
            self.judge.execute(deserialize_message(message, JointTrajectory), self._steady_ns, self._offset_ns)

    def _examine(self, made: dict[str, str]) -> None:
        """Of a chunk, what made it."""
        if made["epoch"] != str(self.node.epoch):
            self.judge.violation("a chunk of a past activation", f"{made['epoch']} in {self.node.epoch}")
        age_s = (int(made["published_ns"]) - int(made["observation_stamp_ns"])) * 1e-9
        if age_s > 0.5 + SLOWEST_S and self.judge.settled(self._steady_ns):
            self.judge.violation("a stale command", f"{age_s:.3f} s")
        if age_s > BUDGET_S:
            self.accounts.must("over_budget", "slow_inference")
        if not np.isfinite(np.frombuffer(b64decode(made["actions_float32"]), np.float32)).all():
            self.judge.violation("a chunk that is not finite", "published")
        used = {f"{key.removeprefix('input_stamp_ns.')} {value}" for key, value in made.items()}
        if not used.isdisjoint(self._damaged):
            self.judge.violation("a damaged picture", f"used: {used & set(self._damaged)}")

    # ------------------------------------------------------------------ time and judgement

    def _now_ns(self) -> int:
        return self._steady_ns + self._offset_ns

    def _make_policy(self, **kwargs: Any) -> ScriptedPolicy:
        self.policy = ScriptedPolicy(kwargs["robot"], self._while_computing, self._failed)
        return self.policy

    def _failed(self, counter: str) -> None:
        if counter.endswith("non-finite command"):
            self.accounts.may(counter, "bad_actions")  # or too late, or of an ended activation
        else:
            self.accounts.must(counter, "worker_exception")

    def _while_computing(self, seconds: float) -> None:
        waiting, self._meanwhile = self._meanwhile, []
        for act in waiting:
            act()
        self._pass_time(seconds)

    def _pass_time(self, seconds: float) -> None:
        if self.node.epoch is not None:
            self.judge.active(self._steady_ns)
        for _ in range(SAMPLES):
            self._steady_ns += int(seconds * 1e9 / SAMPLES)
            self.judge.look(self._steady_ns)
