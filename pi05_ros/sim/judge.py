"""A simulated joint_trajectory_controller, and what is asked of everything that it executes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.runtime.chunking import JointLimits
from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.sim.joint_integrator import JointIntegrator
from pi05_ros.transforms.robot_file import Robot

SPEED_TOLERANCE = 1.02
POSITION_TOLERANCE = 2e-3  # rad or m
AFTER_JUMP_S = 1.5  # of the clock: the node cannot know what still moves while the clock says that it is over
STEP_S = 0.002  # where the set point jumps by more than a joint moves in this time, it is a step
AT_REST_S = 1.5  # after the node could last command: longer than it may commit to
REMEMBERED_S = 2.0  # a measurement may be 0.5 s old, and what begins there lasts 1 s
MOST_AHEAD_S = 1.2  # what may be committed (at most 1 s is set here) and how old the stamp of a chunk just made may be


@dataclass
class Findings:
    """What a soak saw. violations: the first of each kind and when; counts of all; faults injected."""

    violations: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    trajectories: int = 0
    fastest: float = 0.0  # share of a joint's speed limit, where it was kept


class Judge:
    """All times are of a clock that never jumps, ns.

    Args:
        when: says where in the run a violation was.
        at_rest_s: after the node could last command, the robot rests.
    """

    def __init__(self, robot: Robot, now_ns: int, when: Callable[[], str], at_rest_s: float = AT_REST_S) -> None:
        self.found, self._when, self._at_rest_s = Findings(), when, at_rest_s
        self.limits = JointLimits(robot)
        self._names = [joint.name for joint in robot.joints]
        self.controller = JointIntegrator((self.limits.lower + self.limits.upper) / 2)
        self._jumped_ns = now_ns - int(AFTER_JUMP_S * 1e9)
        self._ended_ns = now_ns
        self._outside: deque[tuple[int, float]] = deque()  # when, and how far, the robot was beyond a limit of late

    def clock_jumped(self, now_ns: int) -> None:
        self._jumped_ns = now_ns

    def settled(self, now_ns: int) -> bool:
        """Whether the last jump of the clock was long enough ago."""
        return now_ns - self._jumped_ns > AFTER_JUMP_S * 1e9

    def active(self, now_ns: int) -> None:
        """The node may command now."""
        self._ended_ns = now_ns

    def execute(self, message: JointTrajectory, now_ns: int, offset_ns: int = 0) -> JointTrajectoryPlan:
        """A trajectory arrives; its stamps are `offset_ns` ahead."""
        self.found.trajectories += 1
        times = np.array([p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in message.points])
        order = [message.joint_names.index(name) for name in self._names]
        stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec - offset_ns
        plan = JointTrajectoryPlan(stamp, times, np.array([p.positions for p in message.points])[:, order],
                                   np.array([p.velocities for p in message.points])[:, order])
        if not (np.isfinite(plan.positions).all() and np.isfinite(plan.velocities).all()):
            self.violation("not finite", str(plan))
        if (outside := self.outside(plan.positions)) > self.allowed_outside(now_ns):
            self.violation("a command beyond a position limit", f"by {outside:.4f}")
        if (plan.velocities[-1] != 0).any():
            self.violation("does not end at rest", str(plan.velocities[-1]))
        self.check_end(plan, now_ns)
        before, _ = self.controller.at(now_ns)
        self.begun(plan, self.controller.execute(plan, now_ns), now_ns)
        step = np.abs(self.controller.at(now_ns)[0] - before)
        if self.settled(now_ns) and (step > self.limits.velocity * STEP_S).any():
            self.exceeds("a step", f"of {step.max():.4f}", now_ns)
        return plan

    def check_end(self, plan: JointTrajectoryPlan, now_ns: int) -> None:
        if plan.end_ns > now_ns + MOST_AHEAD_S * 1e9 + 1:
            self.violation("commits too far ahead", f"{(plan.end_ns - now_ns) * 1e-9:.3f} s")

    def begun(self, plan: JointTrajectoryPlan, taken: bool, now_ns: int) -> None:
        """A trajectory arrived, and was taken over by the controller or refused."""

    def look(self, now_ns: int) -> None:
        self.judge(*self.controller.at(now_ns), now_ns)

    def judge(self, position: np.ndarray, velocity: np.ndarray, now_ns: int) -> None:
        """Position and velocity [J] that are executed."""
        if not (np.isfinite(position).all() and np.isfinite(velocity).all()):
            self.violation("executes what is not finite", str(position))
        if (outside := self.outside(position)) > POSITION_TOLERANCE:
            self._outside.append((now_ns, outside))
        if self.settled(now_ns):
            if outside > POSITION_TOLERANCE:
                self.exceeds("beyond a position limit", f"by {outside:.4f}", now_ns)
            share = float((np.abs(velocity) / self.limits.velocity).max())
            if share > SPEED_TOLERANCE:
                self.exceeds("too fast", f"{share:.3f} of the limit", now_ns)
            else:
                self.found.fastest = max(self.found.fastest, share)
        if now_ns - self._ended_ns > self._at_rest_s * 1e9 and (velocity != 0).any():
            self.violation("moves while the node is not active", str(velocity))

    def allowed_outside(self, now_ns: int) -> float:
        """How far beyond a position limit a command may be, rad or m: as far as the robot was after a jump of the clock
        or a late command, from where it is led back at a permitted speed."""
        while self._outside and self._outside[0][0] < now_ns - REMEMBERED_S * 1e9:
            self._outside.popleft()
        return max((outside for _, outside in self._outside), default=0.0) + POSITION_TOLERANCE

    def outside(self, positions: np.ndarray) -> float:
        return float(np.maximum(self.limits.lower - positions, positions - self.limits.upper).max())

    def exceeds(self, what: str, how: str, now_ns: int) -> None:
        """A limit, in what is executed."""
        self.violation(what, how)

    def violation(self, what: str, how: str) -> None:
        self.found.counts[what] += 1
        self.found.violations.setdefault(what, f"{self._when()}: {how}")
