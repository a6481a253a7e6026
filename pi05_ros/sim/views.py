"""The world's three cameras, rendered off-screen. MuJoCo; headless.py says what that needs."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from pi05_ros.errors import BackendError
from pi05_ros.schema import CAMERAS
from pi05_ros.sim.headless import mujoco

_OFF = (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION, mujoco.mjtRndFlag.mjRND_SKYBOX)


class Views:
    """Frames of a model's cameras named as the slots in CAMERAS. The OpenGL context is made by the first frame.

    Args:
        model: mujoco.MjModel.
        size: height and width of a frame, pixels.
    """

    def __init__(self, model: Any, size: int) -> None:
        self._model, self._size = model, size
        self._renderer: Any = None

    def render(self, data: Any) -> dict[str, np.ndarray]:
        """{camera: uint8 [size, size, 3]}, RGB.

        Raises:
            BackendError: there is no OpenGL to render with.
        """
        if self._renderer is None:
            self._renderer = self._open()
        frames = {}
        for camera in CAMERAS:
            self._renderer.update_scene(data, camera=camera)
            for flag in _OFF:
                self._renderer.scene.flags[flag] = False
            frames[camera] = self._renderer.render()
        return frames

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _open(self) -> Any:
        try:
            return mujoco.Renderer(self._model, self._size, self._size)
        except Exception as error:  # AttributeError, ImportError, RuntimeError or EGLError, by what is missing
            raise BackendError(
                "rendering", expected="an OpenGL library for off-screen rendering",
                received=f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: {error}",
                way_out="Install libegl1 libegl-mesa0 libgl1-mesa-dri and set MUJOCO_GL=egl, or install libosmesa6 "
                        "and set MUJOCO_GL=osmesa.") from error
