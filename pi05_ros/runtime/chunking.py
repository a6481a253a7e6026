"""A chunk of actions to a trajectory that is safe to execute: elapsed actions dropped, limits kept, at rest at the end.

All vectors are in the order of `Robot.joints`, in rad or m.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pi05_ros.errors import ConfigError, ObservationError
from pi05_ros.runtime.trajectory import JointTrajectoryPlan, monotone_velocities
from pi05_ros.schema import ActionChunk
from pi05_ros.transforms.robot_file import Robot

# A cubic that starts and ends at rest peaks at 1.5 times its mean speed: slopes keep this share of the limit.
SLOPE_SHARE = 2.0 / 3.0


@dataclass(frozen=True)
class JointMeasurement:
    """stamp_ns and positions [J] of the robot; velocities [J] where the robot reports them."""

    stamp_ns: int
    positions: np.ndarray
    velocities: np.ndarray | None = None


@dataclass(frozen=True)
class CommandLimits:
    """max_committed_s: a trajectory ends at most this far ahead of now; stop_time_s: time of its braking to rest."""

    max_committed_s: float = 1.0
    stop_time_s: float = 0.2


class JointLimits:
    """Bounds [J] of a robot's joints."""

    def __init__(self, robot: Robot) -> None:
        if robot.action_meaning == "end_effector":
            raise ConfigError(f"robot '{robot.name}'", expected="joint_position or joint_velocity actions",
                              received="end_effector actions, which need inverse kinematics",
                              way_out="The node cannot drive it; use Policy.infer and your own controller.")
        self.lower = np.array([j.lower for j in robot.joints])
        self.upper = np.array([j.upper for j in robot.joints])
        self.velocity = np.array([j.max_velocity for j in robot.joints])
        self.integrate = np.array([j.action == "velocity" for j in robot.joints])


def plan_chunk(chunk: ActionChunk, limits: JointLimits, measured: JointMeasurement, now_ns: int,
               command: CommandLimits) -> JointTrajectoryPlan:
    """The trajectory to publish at `now_ns` for a chunk.

    Action k is meant for stamp + k * period (a velocity action acts from there to the next). Actions whose time has
    passed are dropped, those beyond the commitment too. From the latest measured position on, every step stays
    within position and velocity limits, and a braking point brings all joints to rest.

    Raises:
        ObservationError: all actions lie in the past; actions or the measurement are not finite.
    """
    if not (np.isfinite(chunk.actions).all() and np.isfinite(measured.positions).all()):
        raise ObservationError("command", expected="finite actions and joint positions", received="NaN or infinity",
                               way_out="Check the joint states and the checkpoint.", cause="non-finite command")
    period, age = chunk.control_period_s, (now_ns - chunk.stamp_ns) * 1e-9
    wanted, times = _wanted_positions(chunk, limits, measured)
    last = age + command.max_committed_s - command.stop_time_s
    keep = (times >= age + 0.5 * period) & (times <= last)  # a point nearer than that could not be reached smoothly
    if not keep.any():
        raise ObservationError("chunk", expected=f"actions between now and {command.max_committed_s} s ahead",
                               received=f"an observation {age:.3f} s old and {len(times)} actions of {period:.3f} s",
                               way_out="Lower denoising_steps, use a faster backend, or a longer action horizon.",
                               cause="late chunk")
    times = times[keep]
    positions = limit_steps(wanted[keep], measured.positions, np.diff(times, prepend=age), limits)
    slopes = np.diff(positions, axis=0, prepend=measured.positions[None]) / np.diff(times, prepend=age)[:, None]
    end, end_velocity = brake(positions[-1], slopes[-1], limits, command.stop_time_s)
    velocities = np.concatenate([monotone_velocities(slopes), end_velocity[None], np.zeros_like(end)[None]])
    return JointTrajectoryPlan(chunk.stamp_ns, np.append(times, times[-1] + command.stop_time_s),
                               np.concatenate([positions, end[None]]), velocities)


def plan_hold(previous: JointTrajectoryPlan | None, measured: JointMeasurement, now_ns: int, limits: JointLimits,
              stop_time_s: float) -> JointTrajectoryPlan:
    """Come to rest within `stop_time_s`: from where the last trajectory is, or, if the robot is not there (it was
    blocked, or never followed), at the position measured last."""
    position, velocity = measured.positions, np.zeros_like(measured.positions)
    if previous is not None:
        planned, speed = previous.at(now_ns)
        if (np.abs(planned - position) <= limits.velocity * stop_time_s).all():
            position, velocity = planned, speed
    end, _ = brake(position, velocity, limits, stop_time_s)
    return JointTrajectoryPlan(now_ns, np.array([stop_time_s]), end[None], np.zeros_like(end)[None])


def brake(position: np.ndarray, velocity: np.ndarray, limits: JointLimits,
          stop_time_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Constant deceleration to rest in `stop_time_s`: where it ends, and the speed it may start with so as to end
    inside the position limits."""
    room = np.maximum(np.where(velocity > 0, limits.upper - position, position - limits.lower), 0.0)
    speed = np.sign(velocity) * np.minimum(np.abs(velocity), 2.0 * room / stop_time_s)
    return position + 0.5 * stop_time_s * speed, speed


def limit_steps(wanted: np.ndarray, start: np.ndarray, spans_s: np.ndarray, limits: JointLimits) -> np.ndarray:
    """Positions [K, J] as near to the wanted ones as limits allow, step by step from `start`.

    A robot that starts outside its limits is led back at the permitted speed.
    """
    wanted = np.clip(wanted, limits.lower, limits.upper)
    out, position = np.empty_like(wanted), start
    for k, span in enumerate(spans_s):
        reach = SLOPE_SHARE * limits.velocity * span
        position = np.clip(wanted[k], position - reach, position + reach)
        out[k] = position
    return out


def _wanted_positions(chunk: ActionChunk, limits: JointLimits,
                      measured: JointMeasurement) -> tuple[np.ndarray, np.ndarray]:
    """Positions [H, J] and their times [H] after the stamp; velocity actions are integrated from the measurement,
    which then stands for the position at the time it was taken."""
    actions, period = chunk.actions.astype(np.float64), chunk.control_period_s
    times = np.arange(len(actions)) * period
    if not limits.integrate.any():
        return actions, times
    edges = np.append(times, times[-1] + period)
    travelled = np.concatenate([np.zeros((1, actions.shape[1])), np.cumsum(actions * period, axis=0)])
    taken = np.clip((measured.stamp_ns - chunk.stamp_ns) * 1e-9, 0.0, edges[-1])
    before = np.array([np.interp(taken, edges, column) for column in travelled.T])
    integrated = measured.positions + travelled[1:] - before
    # A position action is reached at its own time, an integrated one at the end of its period.
    shifted = np.concatenate([actions[1:], actions[-1:]])
    return np.where(limits.integrate, integrated, shifted), edges[1:]
