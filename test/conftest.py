"""For every test: GPU tests are skipped where there is none, and ROS tests stay out of everyone else's way."""

from __future__ import annotations

import os

import pytest


def pytest_configure() -> None:
    """Give this run a ROS domain of its own on this machine only, before any test module can import rclpy.

    Whatever the user has set is overridden: a test must never reach a robot. Processes that tests start inherit it.
    """
    os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 101)  # 0 is everyone's; Linux has ports free up to 101
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ.pop("ROS_STATIC_PEERS", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def _has_gpu() -> bool:
    import torch  # only where a GPU test was collected: it takes seconds

    return torch.cuda.is_available()
