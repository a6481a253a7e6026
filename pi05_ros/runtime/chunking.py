"""A chunk of actions to a trajectory that is safe to execute: elapsed actions dropped, limits kept, at rest at the end.

All vectors are in the order of `Robot.joints`, in rad or m.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np

from pi05_ros.errors import ConfigError, ObservationError
from pi05_ros.runtime.trajectory import JointTrajectoryPlan, monotone_velocities
from pi05_ros.schema import ActionChunk
from pi05_ros.transforms.robot_file import Robot

# A cubic that starts and ends at rest peaks at 1.5 times its mean speed: slopes keep this share of the limit.
SLOPE_SHARE = 2.0 / 3.0
SOONEST_STOP_S = 0.01


@dataclass(frozen=True)
class JointMeasurement:
    """stamp_ns and positions [J] of the robot; told: where it was commanded to be then, None if nobody knows."""

    stamp_ns: int
    positions: np.ndarray
    told: np.ndarray | None = None


NON_FINITE = "non-finite command"  # the `cause` for which the robot is held at once


@dataclass(frozen=True)
class CommandLimits:
    """max_committed_s: a trajectory ends at most this far ahead of now; stop_time_s: time of its braking to rest;
    lead_s: nothing changes nearer than this, so that a command reaches its controller before it matters; fade_s: a
    trajectory goes over into the next one in so long, 0: at once."""

    max_committed_s: float = 1.0
    stop_time_s: float = 0.2
    lead_s: float = 0.02
    fade_s: float = 0.5


class JointLimits:
    """Bounds [J] of a robot's joints."""

    def __init__(self, robot: Robot) -> None:
        if robot.action_meaning == "end_effector":
            raise ConfigError(f"robot '{robot.name}'", expected="joint_position or joint_velocity actions",
                              received="end_effector actions, which need inverse kinematics",
                              way_out="The node cannot drive it; use Policy.infer and your own controller.")
        self.names = [j.name for j in robot.joints]
        self.lower = np.array([j.lower for j in robot.joints])
        self.upper = np.array([j.upper for j in robot.joints])
        self.velocity = np.array([j.max_velocity for j in robot.joints])
        self.integrate = np.array([j.action == "velocity" for j in robot.joints])
        self._margin = 0.25 * (self.upper - self.lower)

    def plausible(self, positions: np.ndarray) -> np.ndarray:
        """Which positions [..., J] a joint may have: inside its limits or, from where it is led back, a quarter of its
        range beyond. What is further out is a fault of the driver."""
        return (positions >= self.lower - self._margin) & (positions <= self.upper + self._margin)


@dataclass(frozen=True)
class Start:
    """How a new trajectory begins: K points of the running one, which it keeps, the last of them the join; or one
    point at rest. Times [K] after the chunk's stamp. rests_until_ns: as in the trajectory."""

    times_s: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    rests_until_ns: int


def plan_chunk(chunk: ActionChunk, limits: JointLimits, measured: JointMeasurement, now_ns: int,
               command: CommandLimits, running: JointTrajectoryPlan | None = None,
               drop_elapsed: bool = True) -> JointTrajectoryPlan:
    """The trajectory to publish at `now_ns` for a chunk.

    Action k is meant for stamp + k * period (a velocity action acts from there to the next). Actions whose time has
    passed are dropped, those beyond the commitment too. But while the robot stood still it consumed none: the
    chunk is later by that, and without `drop_elapsed` it always begins with its first action. The `running`
    trajectory is kept for `lead_s` and left at its next point with its velocity; after it the robot starts from rest
    where it ended, without one where it was measured, inside its limits. From there every step stays within position
    and velocity limits, and a braking point brings all joints to rest.

    Raises:
        ObservationError: all actions lie in the past; actions or the measurement are not finite; a robot at rest far
            from where its trajectory ended.
    """
    if not (np.isfinite(chunk.actions).all() and np.isfinite(measured.positions).all()):
        raise ObservationError("command", expected="finite actions and joint positions", received="NaN or infinity",
                               way_out="Check the joint states and the checkpoint.", cause=NON_FINITE)
    period, age = chunk.control_period_s, (now_ns - chunk.stamp_ns) * 1e-9
    times, begun_ns = _action_times(chunk, limits), max(running.rests_until_ns if running else 0, chunk.stamp_ns)
    goes_on = running is not None and running.end_ns > now_ns + int(command.lead_s * 1e9)
    if drop_elapsed and goes_on:
        shift_s = (begun_ns - chunk.stamp_ns) * 1e-9
        start = _start(chunk, times + shift_s, limits, measured, now_ns, command, running)
    else:
        consumed_s = max(0.0, (running.end_ns - begun_ns) * 1e-9) if drop_elapsed and running is not None else 0.0
        start = _start(chunk, times + age + command.lead_s - consumed_s, limits, measured, now_ns, command, running)
        shift_s = start.times_s[-1] - consumed_s
    wanted, late = _wanted_positions(chunk, limits, measured, shift_s), times[-1] < age
    times = times + shift_s
    last = age + command.max_committed_s - command.stop_time_s
    keep = (times >= start.times_s[-1] + 0.5 * period) & (times <= last)  # a nearer one could not be reached smoothly
    if late or not keep.any():
        raise ObservationError("chunk", expected=f"actions between now and {command.max_committed_s} s ahead",
                               received=f"an observation {age:.3f} s old and {len(times)} actions of {period:.3f} s",
                               way_out="Lower denoising_steps, use a faster backend, or a longer action horizon.",
                               cause="late chunk")
    times = times[keep]
    spans = times - np.append(start.times_s[-1], times[:-1])
    wanted = wanted[keep]
    if drop_elapsed and goes_on and running is not None:
        wanted = faded(wanted, times, chunk.stamp_ns, start, running, command.fade_s)
    positions = limit_steps(wanted, start.positions[-1], start.velocities[-1], spans, limits)
    slopes = (positions - np.concatenate([start.positions[-1:], positions[:-1]])) / spans[:, None]
    end, end_velocity = brake(positions[-1], slopes[-1], limits, command.stop_time_s)
    velocities = np.concatenate([monotone_velocities(slopes), end_velocity[None], np.zeros_like(end)[None]])
    times, positions = np.append(times, times[-1] + command.stop_time_s), np.concatenate([positions, end[None]])
    return JointTrajectoryPlan(chunk.stamp_ns, np.append(start.times_s, times),
                               np.concatenate([start.positions, positions]),
                               np.concatenate([start.velocities, velocities]), rests_until_ns=start.rests_until_ns,
                               late_s=shift_s)


def faded(wanted: np.ndarray, times_s: np.ndarray, stamp_ns: int, start: Start, running: JointTrajectoryPlan,
          fade_s: float) -> np.ndarray:
    """Positions [K, J] at times [K] that leave the running trajectory little by little for the wanted ones: two chunks
    that disagree by a centimetre would else jerk the arm at every join. The weight has the least jerk that goes from 0
    to 1 in `fade_s` (Flash and Hogan 1985), or in what the running trajectory has left before it brakes."""
    join_s = start.times_s[-1]
    left_s = (running.stamp_ns - stamp_ns) * 1e-9 + running.times_s[-2:][0] - join_s
    if (span_s := min(fade_s, left_s)) <= 0:
        return wanted
    before, _ = running.along(stamp_ns + np.rint(np.append(join_s, times_s) * 1e9).astype(np.int64))
    u = np.clip((times_s[:, None] - join_s) / span_s, 0.0, 1.0)
    weight = u**3 * (10 + u * (6 * u - 15))
    mixed = before[1:] + weight * (wanted - before[1:])
    on_it = np.abs(start.positions[-1] - before[0]) < 1e-6  # not a joint that is led from where it was measured
    return mixed if on_it.all() else np.where(on_it, mixed, wanted)


def _start(chunk: ActionChunk, times: np.ndarray, limits: JointLimits, measured: JointMeasurement, now_ns: int,
           command: CommandLimits, running: JointTrajectoryPlan | None) -> Start:
    soonest = now_ns + int(command.lead_s * 1e9)
    if running is None or running.end_ns <= soonest:
        return _from_rest(chunk, limits, measured, soonest, command, running)
    points_ns = running.points_ns
    # Left at a point of its own, or within a long segment: up to there the curve remains the same cubics.
    next_ns = points_ns[bisect_left(points_ns, soonest)]
    join_ns = max(min(next_ns, soonest + int(chunk.control_period_s * 1e9)), running.rests_until_ns)
    first, later = bisect_right(points_ns, now_ns), points_ns[bisect_right(points_ns, join_ns):]
    while True:
        times_ns = np.array([*points_ns[first:bisect_left(points_ns, join_ns)], join_ns])
        positions, velocities = running.along(times_ns)
        join_s = (join_ns - chunk.stamp_ns) * 1e-9
        if not later or _can_leave(positions[-1], velocities[-1], join_s, chunk, times, limits):
            break
        join_ns = later.pop(0)
    if (lost := _lost(running, measured, limits, command.stop_time_s)).any():
        there = _led_back(measured.positions, limits, (times_ns - now_ns)[:, None] * 1e-9)
        positions, velocities = np.where(lost, there, positions), np.where(lost, 0.0, velocities)
    return Start((times_ns - chunk.stamp_ns) * 1e-9, positions, velocities, running.rests_until_ns)


def _from_rest(chunk: ActionChunk, limits: JointLimits, measured: JointMeasurement, soonest_ns: int,
               command: CommandLimits, running: JointTrajectoryPlan | None) -> Start:
    """At the end of the trajectory that ran, or where a joint was measured that it lost. Of two that disagree either
    may be wrong (a joint moved by hand, a driver that lies), so the way between them gets the time it needs; where
    only the measurement is known, `stop_time_s`."""
    expected = rest = there = np.clip(measured.positions, limits.lower, limits.upper)
    wait_s = command.stop_time_s
    if running is not None:
        expected, wait_s = _told(running, measured), 0.0
        rest = np.where(_lost(running, measured, limits, command.stop_time_s), there, running.positions[-1])
    apart_s = np.abs(measured.positions - expected) / (SLOPE_SHARE * limits.velocity)
    if (wait_s := max(wait_s, apart_s.max())) > command.max_committed_s - command.stop_time_s:
        joint = int(apart_s.argmax())
        raise ObservationError(f"joint '{limits.names[joint]}'", received=f"{measured.positions[joint]:.3f}",
                               expected=f"at or near {expected[joint]:.3f}, where its last trajectory ended or its "
                               "limit is", cause="robot displaced",
                               way_out="Check the joint states and limits; ~/reset starts from where the robot is.")
    start_ns = soonest_ns + int(wait_s * 1e9)
    return Start(np.array([(start_ns - chunk.stamp_ns) * 1e-9]), rest[None], np.zeros((1, len(rest))), start_ns)


def _can_leave(position: np.ndarray, velocity: np.ndarray, join_s: float, chunk: ActionChunk, times: np.ndarray,
               limits: JointLimits) -> bool:
    """Whether the velocity at the join, a third of which the first slope keeps, carries no joint beyond its limits."""
    after = times.searchsorted(join_s + 0.5 * chunk.control_period_s)
    span = times[after] - join_s if after < len(times) else 0.0
    carried = position + velocity / 3 * span
    if ((carried >= limits.lower) & (carried <= limits.upper)).all():  # mostly
        return True
    beyond = (velocity > 0) & (carried > limits.upper) | (velocity < 0) & (carried < limits.lower)
    return not beyond.any()


def _led_back(positions: np.ndarray, limits: JointLimits, within_s: np.ndarray) -> np.ndarray:
    """Positions [J] inside the limits, or as near to them as the permitted speed brings a joint in [K, 1] seconds."""
    reach = SLOPE_SHARE * limits.velocity * within_s
    return positions + np.clip(np.clip(positions, limits.lower, limits.upper) - positions, -reach, reach)


def _lost(running: JointTrajectoryPlan, measured: JointMeasurement, limits: JointLimits, lag_s: float) -> np.ndarray:
    """bool [J]: when it was measured, the joint was farther from its command than it can lag behind."""
    return np.abs(_told(running, measured) - measured.positions) > limits.velocity * lag_s


def _told(running: JointTrajectoryPlan, measured: JointMeasurement) -> np.ndarray:
    """Where the robot was commanded to be when it was measured; where it was, if nobody knows."""
    if measured.stamp_ns >= running.known_from_ns:
        return running.at(measured.stamp_ns)[0]
    return measured.positions if measured.told is None else measured.told


def plan_hold(running: JointTrajectoryPlan, measured: JointMeasurement | None, now_ns: int, limits: JointLimits,
              stop_time_s: float) -> JointTrajectoryPlan:
    """Come to rest: every joint brakes from where the running trajectory is. One that is not there (it was blocked)
    stays where it was measured; `measured` None, because too old to tell, trusts the trajectory."""
    origin = position, velocity = running.at(now_ns)
    time_s = stop_time_s
    if measured is not None and (lost := _lost(running, measured, limits, stop_time_s)).any():
        gap = np.abs(measured.positions - position)[lost]
        time_s = max(stop_time_s, float((gap / (SLOPE_SHARE * limits.velocity[lost])).max()))  # back within the limit
        position, velocity = np.where(lost, measured.positions, position), np.where(lost, 0.0, velocity)
    moving = velocity != 0  # faster where a limit is near: a cubic needs a third of velocity x time to stop in
    if moving.any():
        time_s = min(time_s, float((3.0 * _room(position, velocity, limits)[moving] / np.abs(velocity[moving])).min()))
    time_s = max(time_s, SOONEST_STOP_S)
    end, _ = brake(position, velocity, limits, time_s)
    return JointTrajectoryPlan(now_ns, np.array([time_s]), end[None], np.zeros_like(end)[None], origin)


def brake(position: np.ndarray, velocity: np.ndarray, limits: JointLimits,
          stop_time_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Constant deceleration to rest in `stop_time_s`: where it ends, and the speed it may start with so as to end
    inside the position limits."""
    room = _room(position, velocity, limits)
    speed = np.sign(velocity) * np.minimum(np.abs(velocity), 2.0 * room / stop_time_s)
    return position + 0.5 * stop_time_s * speed, speed


def _room(position: np.ndarray, velocity: np.ndarray, limits: JointLimits) -> np.ndarray:
    """Distance [J] to the limit that a joint moves towards; 0 beyond it."""
    return np.maximum(np.where(velocity > 0, limits.upper - position, position - limits.lower), 0.0)


def limit_steps(wanted: np.ndarray, start: np.ndarray, velocity: np.ndarray, spans_s: np.ndarray,
                limits: JointLimits) -> np.ndarray:
    """Positions [K, J] as near to the wanted ones as limits allow, step by step from `start` and its `velocity` [J].

    The first slope keeps at least a third of the start's velocity: the cubic then does not overshoot, and its speed
    stays within max(velocity, 1.5 x slope). A robot that starts outside its limits is led back at the permitted speed.
    """
    wanted = np.clip(wanted, limits.lower, limits.upper)
    reach = SLOPE_SHARE * limits.velocity
    up = reach * spans_s[:, None]
    down = -up
    down[0] = np.where(velocity > 0, velocity / 3, -reach) * spans_s[0]
    up[0] = np.where(velocity < 0, velocity / 3, reach) * spans_s[0]
    before = np.concatenate([start[None], wanted[:-1]])
    if ((before + down <= wanted) & (wanted <= before + up)).all():  # mostly
        return wanted
    out, position = np.empty_like(wanted), start
    for k in range(len(wanted)):
        position = np.minimum(np.maximum(wanted[k], position + down[k]), position + up[k], out=out[k])
    return out


def _action_times(chunk: ActionChunk, limits: JointLimits) -> np.ndarray:
    """[H] after the stamp, when a position is to be reached: an integrated one at the end of its period."""
    return (np.arange(len(chunk.actions)) + float(limits.integrate.any())) * chunk.control_period_s


def _wanted_positions(chunk: ActionChunk, limits: JointLimits, measured: JointMeasurement,
                      shift_s: float) -> np.ndarray:
    """Positions [H, J] of a chunk that acts `shift_s` later; velocity actions are integrated from the measurement,
    which then stands for the position at the time it was taken."""
    actions, period = chunk.actions.astype(np.float64), chunk.control_period_s
    if not limits.integrate.any():
        return actions
    edges = np.arange(len(actions) + 1) * period
    travelled = np.concatenate([np.zeros((1, actions.shape[1])), np.cumsum(actions * period, axis=0)])
    taken = np.clip((measured.stamp_ns - chunk.stamp_ns) * 1e-9 - shift_s, 0.0, edges[-1])
    before = np.array([np.interp(taken, edges, column) for column in travelled.T])
    integrated = measured.positions + travelled[1:] - before
    # All at the ends of the periods: there the next position action is to be reached.
    shifted = np.concatenate([actions[1:], actions[-1:]])
    return np.where(limits.integrate, integrated, shifted)
