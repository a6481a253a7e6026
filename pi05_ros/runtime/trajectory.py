"""A joint trajectory as the controller will execute it: cubic between points, at rest at the end."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class JointTrajectoryPlan:
    """K points of J joints, from one stamp.

    Args:
        stamp_ns: time zero of `times_s`.
        times_s: float64 [K], strictly increasing.
        positions, velocities: float64 [K, J], rad or m, and per second; the last velocities are zero.
        origin: position and velocity [J] at the stamp, from where the controller moves to the first point; it is not
            sent, as the controller is there already. None: at rest at the first point.
        rests_until_ns: a robot that stood still begins to move then.
        late_s: of a chunk's trajectory: its actions act so much later than the chunk's stamp says.
    """

    stamp_ns: int
    times_s: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    origin: tuple[np.ndarray, np.ndarray] | None = None
    rests_until_ns: int = 0
    late_s: float = 0.0

    @property
    def end_ns(self) -> int:
        return self.stamp_ns + int(self.offsets_ns[-1])

    @property
    def known_from_ns(self) -> int:
        """From when on `at` says where the robot was commanded to be; before, another trajectory may have run."""
        first_ns = self.stamp_ns + int(self.offsets_ns[0])
        if self.origin is not None:
            return self.stamp_ns
        return 0 if first_ns == self.rests_until_ns else first_ns

    @cached_property
    def offsets_ns(self) -> np.ndarray:
        """int64 [K]: `times_s` as they go over the wire."""
        return np.rint(self.times_s * 1e9).astype(np.int64)

    @cached_property
    def cubics(self) -> np.ndarray:
        """[K - 1, 4, J]: of the curve between two points what `cubic` wants, made once for all times at which a plan is
        asked for."""
        starts = self.positions[:-1], self.velocities[:-1]
        terms = cubic_terms(np.diff(self.times_s)[:, None], *starts, self.positions[1:], self.velocities[1:])
        return np.stack([*starts, *terms], axis=1)

    def prepare(self) -> None:
        """Makes now what the first question would make, which comes when somebody waits for its answer."""
        _ = self.cubics, self.points_ns

    @cached_property
    def points_ns(self) -> list[int]:
        """Times of the points on the clock."""
        return (self.stamp_ns + self.offsets_ns).tolist()

    def next_point_ns(self, time_ns: int) -> int:
        """Time of the first point at or after a time; the last point's if there is none."""
        return next((t for t in self.points_ns if t >= time_ns), self.end_ns)

    def at(self, time_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Position and velocity [J] that a controller commands at a time: the cubic through the points' positions
        and velocities, from `origin` on; held before the first point and after the last."""
        offset_ns = time_ns - self.stamp_ns
        t = offset_ns * 1e-9
        if offset_ns < self.offsets_ns[0]:
            if self.origin is not None:
                return hermite(max(t, 0.0), self.times_s[0], *self.origin, self.positions[0], self.velocities[0])
            return self.positions[0], np.zeros_like(self.positions[0])
        if offset_ns >= self.offsets_ns[-1]:
            return self.positions[-1], np.zeros_like(self.positions[-1])
        k = int(self.offsets_ns.searchsorted(offset_ns, side="right")) - 1
        return cubic(t - self.times_s[k], self.times_s[k + 1] - self.times_s[k], *self.cubics[k])

    def along(self, times_ns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`at` for many times, int64 [K] and ascending, at once: positions and velocities [K, J], the same bits."""
        offsets_ns = times_ns - self.stamp_ns
        positions, velocities = np.zeros((2, len(times_ns), self.positions.shape[1]))
        begin, end = offsets_ns.searchsorted(self.offsets_ns[[0, -1]])
        within = slice(begin, end)
        k = self.offsets_ns.searchsorted(offsets_ns[within], side="right") - 1
        span, t = self.times_s[k + 1] - self.times_s[k], offsets_ns[within] * 1e-9 - self.times_s[k]
        positions[within], velocities[within] = cubic(t[:, None], span[:, None], *self.cubics[k].swapaxes(0, 1))
        positions[end:] = self.positions[-1]
        for i in range(begin):  # before the first point: few
            positions[i], velocities[i] = self.at(int(times_ns[i]))
        return positions, velocities


class Commanded:
    """What the robot was told last, to compare a measurement with what was commanded when it was taken."""

    def __init__(self) -> None:
        self._plans = deque[tuple[int, JointTrajectoryPlan]](maxlen=64)  # with the time each went out, ns

    def add(self, published_ns: int, plan: JointTrajectoryPlan) -> None:
        self._plans.append((published_ns, plan))

    def clear(self) -> None:
        self._plans.clear()

    def shift(self, by_ns: int) -> None:
        """The clock was set by so much."""
        for _ in range(len(self._plans)):
            published_ns, plan = self._plans.popleft()
            moved = replace(plan, stamp_ns=plan.stamp_ns + by_ns,
                            rests_until_ns=plan.rests_until_ns and plan.rests_until_ns + by_ns)
            self._plans.append((published_ns + by_ns, moved))

    def running(self, time_ns: int) -> JointTrajectoryPlan | None:
        """The newest trajectory of then that says where the robot was; None if nobody knows. Up to where a trajectory
        begins the one before goes on."""
        for published_ns, plan in reversed(self._plans):
            if max(published_ns, plan.known_from_ns) <= time_ns:
                return plan
        return None

    def at(self, time_ns: int) -> np.ndarray | None:
        """Positions [J] commanded at a time."""
        plan = self.running(time_ns)
        return None if plan is None else plan.at(time_ns)[0]


def hermite(t: float, span: float, p0: np.ndarray, v0: np.ndarray, p1: np.ndarray,
            v1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cubic from (p0, v0) to (p1, v1) over `span` seconds: position and velocity [J] at t in [0, span]."""
    return cubic(t, span, p0, v0, *cubic_terms(span, p0, v0, p1, v1))


def cubic_terms(span: float | np.ndarray, p0: np.ndarray, v0: np.ndarray, p1: np.ndarray,
                v1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `cubic` wants besides p0 and v0, to go to (p1, v1) in `span` seconds."""
    slope = (p1 - p0) / span
    return 3 * slope - 2 * v0 - v1, v0 + v1 - 2 * slope


def cubic(t: float | np.ndarray, span: float | np.ndarray, p0: np.ndarray, v0: np.ndarray, square: np.ndarray,
          cube: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position and velocity at t in [0, span]; t and span are numbers with vectors [J], or [K, 1] with [K, J]."""
    u = t / span
    position = p0 + span * u * (v0 + u * (square + u * cube))
    velocity = v0 + u * (2 * square + 3 * u * cube)
    return position, velocity


def monotone_velocities(slopes: np.ndarray) -> np.ndarray:
    """Velocities [K-1, J] at the inner points between K slopes [K, J]: their harmonic mean, 0 where they turn.

    Such a cubic never leaves the range of its two points, and its speed stays within 1.5 x the slope of the segment
    or the speeds at its ends (Fritsch and Carlson 1980), so limits on points and slopes bound the whole curve.
    """
    before, after = slopes[:-1], slopes[1:]
    same_way = before * after > 0
    total = np.where(same_way, before + after, 1.0)
    return np.where(same_way, 2 * before * after / total, 0.0)
