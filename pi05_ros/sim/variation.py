"""What differs from seed to seed: where the blocks lie, how the arm begins, colours, light and cameras.

Works on a MuJoCo model that is handed in, so that nothing here imports MuJoCo.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pi05_ros.sim.tasks import COLOURS, Task

AREA_M = np.array([[0.24, 0.40], [-0.19, 0.19]])  # of the blocks' centres: x, y
APART_M = 0.10  # between two centres: a finger passes between any two blocks
CLEAR_BEHIND_M, CLEAR_AHEAD_M, CLEAR_ASIDE_M = 0.09, 0.13, 0.08  # of a block that is to be pushed
HOME = np.array([0.0, -0.1, 0.1, 0.0, 0.0, 0.0])  # rad, about which an episode begins
HOME_SPREAD = np.array([0.3, 0.12, 0.12, 0.05, 0.12, 0.15])  # rad, to either side
GRIPPER_RANGE_M = (0.0, 0.04)


def draw_layout(random: np.random.Generator, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Where the blocks lie: float64 [4, 2] centres (m), and [4] angles about z (rad); the way of a push is free."""
    target = COLOURS.index(task.colour)
    while True:  # about every third draw fits
        centres = random.uniform(AREA_M[:, 0], AREA_M[:, 1], (len(COLOURS), 2))
        gaps = np.linalg.norm(centres[:, None] - centres[None], axis=-1) + np.eye(len(COLOURS))
        others = np.delete(centres, target, axis=0) - centres[target]
        if gaps.min() >= APART_M and not any(_in_the_way(others, np.array(way)) for way in task.ways):
            angle = random.uniform(-np.pi / 4, np.pi / 4, len(COLOURS))
            if task.ways:
                angle[target] *= 0.3  # a block pushed on its edge turns away
            return centres, angle


def _in_the_way(offsets: np.ndarray, way: np.ndarray) -> bool:
    along, across = offsets @ way, np.abs(offsets @ np.array([-way[1], way[0]]))
    return bool(((along > -CLEAR_BEHIND_M - 0.03) & (along < CLEAR_AHEAD_M) & (across < CLEAR_ASIDE_M)).any())


def draw_start(random: np.random.Generator) -> np.ndarray:
    """float64 [7]: the six joints (rad) and a finger's travel (m)."""
    return np.append(HOME + random.uniform(-1, 1, 6) * HOME_SPREAD, random.uniform(*GRIPPER_RANGE_M))


class Appearance:
    """Shades, light and cameras of a model, about what its file says.

    Args:
        model: mujoco.MjModel; `vary` changes it.
    """

    CAMERA_SHIFT_M, CAMERA_TURN_RAD, SHADE, LIGHT_SHIFT_M = 0.005, 0.01, 0.12, 0.4

    def __init__(self, model: Any) -> None:
        self._model = model
        self._nominal = {name: getattr(model, name).copy() for name in self._fields()}

    @staticmethod
    def _fields() -> tuple[str, ...]:
        return "geom_rgba", "cam_pos", "cam_quat", "light_pos", "light_diffuse"

    def vary(self, random: np.random.Generator) -> None:
        """Draw a new appearance; the same numbers whatever was drawn before."""
        model, nominal = self._model, self._nominal
        shade = random.uniform(-1, 1, (model.ngeom, 3)) * self.SHADE
        model.geom_rgba[:, :3] = np.clip(nominal["geom_rgba"][:, :3] + shade, 0, 1)
        model.cam_pos[:] = nominal["cam_pos"] + random.uniform(-1, 1, (model.ncam, 3)) * self.CAMERA_SHIFT_M
        half = random.uniform(-1, 1, (model.ncam, 3)) * self.CAMERA_TURN_RAD / 2
        for camera, (w, *v) in enumerate(nominal["cam_quat"]):
            v = np.array(v)  # the product with the small turn (1, half)
            turned = np.append(w - v @ half[camera], w * half[camera] + v + np.cross(v, half[camera]))
            model.cam_quat[camera] = turned / np.linalg.norm(turned)
        model.light_pos[:] = nominal["light_pos"] + random.uniform(-1, 1, (model.nlight, 3)) * self.LIGHT_SHIFT_M
        model.light_diffuse[:] = nominal["light_diffuse"] * random.uniform(0.7, 1.3)
