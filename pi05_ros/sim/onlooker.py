"""Watches a run from outside, as a user's tools would: trajectories, joints, pictures and diagnostics off the wire."""

from __future__ import annotations

from collections import deque
from functools import partial

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from rich.table import Table
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.transforms.robot_file import Robot

OVERSHOOT = 0.1  # a servo that follows a trajectory at its limit is a little faster for moments
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class Onlooker(Node):
    """Counts and checks every trajectory; keeps the last diagnostics, what the simulated robot says of its episode, and
    the base camera's frames, uint8 [h, w, 3], each with the prompt in force."""

    def __init__(self, robot: Robot, policy: str = "/pi05_policy", **kwargs) -> None:
        super().__init__("pi05_onlooker", **kwargs)
        self._bounds = {j.name: (j.lower, j.upper, j.max_velocity) for j in robot.joints}
        self._ages_s: deque[float] = deque(maxlen=10_000)
        self._arrivals: list[float] = []
        self._violations: list[str] = []
        self._diagnostics: dict[str, str] = {}
        self._fastest = 0.0  # largest share of a joint's speed limit that it was seen to move with
        self._low = np.full(len(robot.joints), np.inf)
        self._high = -self._low
        self.episode: dict[str, str] = {}
        self.frames: list[tuple[str, np.ndarray]] = []
        self._prompt = self.create_publisher(String, f"{policy}/prompt", LATCHED)
        self.create_subscription(Image, f"{policy}/base_image", self._on_image, qos_profile_sensor_data)
        self.create_subscription(DiagnosticStatus, "/tabletop/episode", self._on_episode, LATCHED)
        for controller in robot.controllers:
            callback = partial(self._on_trajectory, counted=controller is robot.controllers[0])
            self.create_subscription(JointTrajectory, f"{policy}/{controller.topic}", callback, 10)
        self.create_subscription(JointState, f"{policy}/joint_states", self._on_joints, qos_profile_sensor_data)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def say(self, prompt: str) -> None:
        """To the policy."""
        self._prompt.publish(String(data=prompt))

    def outcome_of(self, prompt: str) -> str:
        """`running` until the robot judges by this prompt, or where it knows no such task."""
        return self.episode["outcome"] if self.episode.get("prompt") == prompt else "running"

    def _on_image(self, message: Image) -> None:
        frame = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)
        self.frames.append((self.episode.get("prompt", ""), frame))

    def _on_episode(self, message: DiagnosticStatus) -> None:
        self.episode = {pair.key: pair.value for pair in message.values} | {"outcome": message.message}

    def _on_trajectory(self, message: JointTrajectory, counted: bool) -> None:
        now = self.get_clock().now().nanoseconds
        stamp = message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec
        if counted:
            self._arrivals.append(now * 1e-9)
            self._ages_s.append((now - stamp) * 1e-9)
        positions = np.array([point.positions for point in message.points])
        velocities = np.array([point.velocities for point in message.points])
        lower, upper, speed = np.array([self._bounds[name] for name in message.joint_names]).T
        if not (np.isfinite(positions).all() and np.isfinite(velocities).all()):
            self._violations.append("a trajectory has NaN or infinite numbers")
        elif (positions < lower - 1e-6).any() or (positions > upper + 1e-6).any():
            self._violations.append("a trajectory leaves the position limits")
        elif (np.abs(velocities) > speed + 1e-6).any():
            self._violations.append("a trajectory exceeds the velocity limits")
        elif (velocities[-1] != 0).any():
            self._violations.append("a trajectory does not end at rest")

    def _on_joints(self, message: JointState) -> None:
        self._low, self._high = np.minimum(self._low, message.position), np.maximum(self._high, message.position)
        limits = np.array([self._bounds[name][2] for name in message.name])
        self._fastest = max(self._fastest, float((np.abs(message.velocity) / limits).max()))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name.endswith(": policy"):
                self._diagnostics = {pair.key: pair.value for pair in status.values}
                self._diagnostics["message"] = status.message

    def problems(self, lockstep: bool) -> list[str]:
        """Why this run was not good; empty if it was. In lockstep, where no command is late, the joints themselves must
        keep their speed, too."""
        found = sorted(set(self._violations))
        if lockstep and self._fastest > 1.0 + OVERSHOOT:
            found.append(f"a joint moved at {self._fastest:.2f} of its speed limit")
        if len(self._arrivals) < 2:
            found.append(f"expected a stream of trajectories, received {len(self._arrivals)}")
        elif not (self._high - self._low > 1e-3).any():
            found.append("trajectories came but no joint moved")
        return found

    def summary(self) -> dict[str, object]:
        ages, times = np.array(self._ages_s) * 1e3, self._arrivals
        span = times[-1] - times[0] if len(times) > 1 else 0.0
        kept = {k: v for k, v in self._diagnostics.items() if k.startswith(("stage_ms.", "dropped.", "refused."))}
        return {
            "trajectories": len(times),
            "rate_hz": round((len(times) - 1) / span, 2) if span else 0.0,
            "observation_to_command_ms_median": round(float(np.median(ages)), 1) if len(ages) else None,
            "observation_to_command_ms_p99": round(float(np.percentile(ages, 99)), 1) if len(ages) else None,
            "fastest_share_of_limit": round(self._fastest, 3),
            "largest_joint_travel": round(float((self._high - self._low).max()), 3) if len(times) else 0.0,
            **kept,
        }

    def live_table(self) -> Table:
        out = Table("what", "value", title="pi05 demo", title_justify="left")
        for key, value in {"state": self._diagnostics.get("state", "..."),
                           "says": self._diagnostics.get("message", "..."),
                           "task": self.episode.get("prompt", "..."), "outcome": self.episode.get("outcome", "..."),
                           **self.summary()}.items():
            out.add_row(key, str(value))
        return out
