"""Tests that render need an OpenGL library; without one they are skipped, with what is missing."""

import pytest

from pi05_ros.errors import BackendError
from pi05_ros.sim.world import TabletopWorld


@pytest.fixture(scope="module")
def seen_world():
    """A world that can render."""
    world = TabletopWorld()
    try:
        world.observe()
    except BackendError as error:
        pytest.skip(f"no rendering: {error}")
    yield world
    world.close()
