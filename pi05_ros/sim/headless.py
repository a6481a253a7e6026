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
except Exception as error:  # ImportError; AttributeError where MUJOCO_GL names a library that is not there
    raise BackendError("simulated world", expected="MuJoCo", received=f"{type(error).__name__}: {error}, with "
                       f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}", way_out="pip install 'pi05_ros[sim]', or: pip "
                       "install mujoco; or another MUJOCO_GL.") from error

__all__ = ["mujoco"]
