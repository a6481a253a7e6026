"""Inverse kinematics of the simulated arm: damped least squares on MuJoCo's Jacobian."""

from __future__ import annotations

import numpy as np

from pi05_ros.errors import ConfigError
from pi05_ros.sim.headless import mujoco
from pi05_ros.sim.world import TabletopWorld

DAMPING = 0.02  # m or rad of error that a joint may leave per rad near a singular pose
PULL = 0.05  # share of the way back to straight (joints 4 and 6 at zero) in each iteration, where the tip allows it
TOLERANCE_M = 2e-4
LONGEST_STEP_RAD = 0.3  # of a joint in one iteration: a far goal would throw the arm over
MAX_ITERATIONS = 60


class TipKinematics:
    """Joint angles that bring the fingertips somewhere, the hand pointing down. Has its own data: moves nothing."""

    def __init__(self, world: TabletopWorld) -> None:
        self._model, self._data = world.model, mujoco.MjData(world.model)
        self._qpos, self._dofs = world.qpos[:6], world.dofs[:6]
        self._low, self._high = world.lower[:6], world.upper[:6]
        self._tip = self._model.site("tip").id

    def tip(self, joints: np.ndarray) -> np.ndarray:
        """float64 [3]: where the fingertips are (m) with the six joints (rad)."""
        self._forward(joints)
        return self._data.site_xpos[self._tip].copy()

    def solve(self, position: np.ndarray, near: np.ndarray, tolerance_m: float = TOLERANCE_M) -> np.ndarray:
        """float64 [6]: joints (rad) within their limits, found from those of `near`.

        Raises:
            ConfigError: the position (float64 [3], m) is out of reach.
        """
        joints = np.array(near[:6], np.float64)
        linear, angular = np.zeros((3, self._model.nv)), np.zeros((3, self._model.nv))
        for _ in range(MAX_ITERATIONS):
            self._forward(joints)
            place = position - self._data.site_xpos[self._tip]
            upward = self._data.site_xmat[self._tip].reshape(3, 3)[:, 2]
            tilt = np.cross(upward, [0.0, 0.0, 1.0])[:2]  # the turn about x and y that makes the hand vertical
            if np.linalg.norm(place) < tolerance_m and np.linalg.norm(tilt) < 0.01:
                return joints
            mujoco.mj_jacSite(self._model, self._data, linear, angular, self._tip)
            jacobian = np.vstack([linear, angular[:2]])[:, self._dofs]
            inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + DAMPING**2 * np.eye(5))
            straight = -PULL * joints * [0, 0, 0, 1, 0, 1]
            step = inverse @ np.append(place, tilt) + straight - inverse @ (jacobian @ straight)
            step *= min(1.0, LONGEST_STEP_RAD / np.abs(step).max())
            joints = np.clip(joints + step, self._low, self._high)
        raise ConfigError("inverse kinematics", expected="a position that the fingertips reach pointing down",
                          received=f"{np.round(position, 3)} m, missed by {np.linalg.norm(place) * 1e3:.1f} mm",
                          way_out="Keep to the table in front of the arm.")

    def _forward(self, joints: np.ndarray) -> None:
        self._data.qpos[self._qpos] = joints
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
