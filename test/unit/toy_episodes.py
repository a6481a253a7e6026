"""Episodes of a toy robot whose right action is a known function of instruction and state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pi05_ros.train.dataset import DatasetWriter, Episode
from pi05_ros.transforms.robot_file import CameraSpec, ControllerSpec, JointSpec, Robot

TOY = Robot(name="toy", action_meaning="joint_position", control_rate_hz=10.0, cameras={"base_0_rgb": CameraSpec()},
            state_dim=2, action_dim=2, joints=tuple(JointSpec(n, -2.0, 2.0, 1.0) for n in ("a", "b")),
            controllers=(ControllerSpec("trajectory", ("a", "b")),))
PROMPTS = ("go left", "go right")


def right_actions(prompt: str, state: np.ndarray) -> np.ndarray:
    """[T, 2] states to [T, 2]: one joint goes where the instruction says, the other mirrors the first joint."""
    side = -1.0 if "left" in prompt else 1.0
    return np.stack([np.full(len(state), side), -state[:, 0]], axis=1).astype(np.float32)


def toy_episode(seed: int, steps: int = 12, size: int = 56, **changes) -> Episode:
    """A robot at rest. Seeds 2k and 2k + 1 look and feel the same: only the instruction tells what is right."""
    rng = np.random.default_rng(seed // 2)
    prompt = PROMPTS[seed % 2]
    state = np.repeat(rng.uniform(-1, 1, (1, 2)), steps, axis=0).astype(np.float32)
    arrays = {"images": rng.integers(0, 256, (steps, 1, size, size, 3), np.uint8), "state": state,
              "actions": right_actions(prompt, state), "prompts": (prompt,), "task": "go", "seed": seed}
    return Episode(**{**arrays, **changes})


def record(directory, count: int = 4, **changes):
    """A data set of `count` episodes; returns its directory."""
    with DatasetWriter(directory, "toy", ("base_0_rgb",), frames_a_file=30) as writer:
        for seed in range(count):
            writer.add(toy_episode(seed, **changes))
    return directory


@pytest.fixture(autouse=True)
def one_thread():
    """Threads gain nothing on so small a model, and wait for each other at length where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
