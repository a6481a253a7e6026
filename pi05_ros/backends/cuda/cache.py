"""Where compiled kernels and tuning choices are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """$PI05_CACHE_DIR, else pi05_ros in the user's cache directory ($XDG_CACHE_HOME or ~/.cache)."""
    if ours := os.environ.get("PI05_CACHE_DIR"):
        return Path(ours)
    users = os.environ.get("XDG_CACHE_HOME")
    return (Path(users) if users else Path(os.path.expanduser("~")) / ".cache") / "pi05_ros"
