"""ROS processes of this package, started and stopped as a user would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping

from pi05_ros.config import share_directory


def share_this_machine() -> None:
    """For this process and those it starts, where the environment does not say otherwise: stay on this machine, with
    room for camera images, and leave a core to the others."""
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ.setdefault("FASTRTPS_DEFAULT_PROFILES_FILE", str(share_directory() / "config" / "fastdds.xml"))
    # On a CPU: threads that wait for a core at PyTorch's barriers cost seconds.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) - 1)))


def start(module: str, parameters: Mapping[str, object], remappings: Mapping[str, str] | None = None,
          log_level: str = "warn") -> subprocess.Popen:
    """`python -m module` with ROS parameters and remappings {from: to}."""
    words = {name: repr(value) if isinstance(value, str) else value for name, value in parameters.items()}
    arguments = [word for name, value in words.items() for word in ("-p", f"{name}:={value}")]
    arguments += [word for name, to in (remappings or {}).items() for word in ("-r", f"{name}:={to}")]
    return subprocess.Popen([sys.executable, "-m", module, "--ros-args", "--log-level", log_level, *arguments])


def stop(process: subprocess.Popen, patience_s: float = 20.0) -> int:
    """SIGINT, then wait; kill only what does not obey. Gives the exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
