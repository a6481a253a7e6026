"""MuJoCo, told before it is imported to render off-screen where there is no screen.

Rendering needs an OpenGL library: EGL from a GPU's driver or from Mesa (Debian: libegl1 libegl-mesa0 libgl1-mesa-dri),
or `MUJOCO_GL=osmesa` (libosmesa6). Physics alone needs none.
"""

import os

from pi05_ros.errors import BackendError

if not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")

try:
    import mujoco
except ImportError as error:
    raise BackendError("simulated world", expected="MuJoCo", received=str(error),
                       way_out="pip install 'pi05_ros[sim]', or: pip install mujoco") from error

__all__ = ["mujoco"]
