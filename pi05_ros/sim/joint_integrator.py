"""Joints that follow trajectories perfectly, with the manners of Jazzy's joint_trajectory_controller."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pi05_ros.runtime.trajectory import JointTrajectoryPlan, hermite


class JointIntegrator:
    """J joints. A trajectory that arrives replaces the one before; until its first point the joints move there from
    where they are; where points have passed, they are at once where it is now; after its last they hold. One whose
    points have all passed is refused.

    Args:
        positions: float64 [J], rad or m.
    """

    def __init__(self, positions: Sequence[float] | np.ndarray) -> None:
        self._start_ns = 0
        self._start = np.array(positions, np.float64), np.zeros(len(positions))
        self._plan: JointTrajectoryPlan | None = None
        self.refused = 0

    def execute(self, plan: JointTrajectoryPlan, now_ns: int) -> bool:
        """Take over a trajectory; False if it is refused: empty, all past, not finite, or not at rest at its end."""
        finite = np.isfinite(plan.positions).all() and np.isfinite(plan.velocities).all()
        increasing = len(plan.times_s) > 0 and (np.diff(plan.times_s) > 0).all()
        if not finite or not increasing or plan.end_ns <= now_ns or (plan.velocities[-1] != 0).any():
            self.refused += 1
            return False
        self._start, self._start_ns, self._plan = self.at(now_ns), now_ns, plan
        return True

    def at(self, time_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and velocities [J]."""
        plan = self._plan
        if plan is None:
            return self._start
        first_ns = plan.stamp_ns + int(plan.offsets_ns[0])
        if time_ns < first_ns:
            elapsed, to_first = (time_ns - self._start_ns) * 1e-9, (first_ns - self._start_ns) * 1e-9
            return hermite(max(elapsed, 0.0), to_first, *self._start, plan.positions[0], plan.velocities[0])
        return plan.at(time_ns)
