"""Random inputs of a given shape: never zeros, which hide errors and run faster."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pi05_ros.config import Pi05Config
from pi05_ros.errors import ConfigError
from pi05_ros.model.pinned import pinned_copy

CAMERA_FRAME = (480, 640)  # height and width of a raw camera frame


@dataclass(frozen=True)
class Shape:
    """Of one inference: cameras that are there, valid prompt tokens, denoising steps. Written 3/200/10."""

    cameras: int
    tokens: int
    steps: int

    def __str__(self) -> str:
        return f"{self.cameras}/{self.tokens}/{self.steps}"


STANDARD_SHAPES = (Shape(3, 200, 10), Shape(2, 48, 10), Shape(3, 200, 3))


@dataclass(frozen=True)
class BenchmarkInputs:
    """One observation on the device: frames N x uint8 [1, 224, 224, 3] (host), masks, tokens [1, L], noise, state.

    `camera_frames` are as a camera sends them, N x uint8 [1, 480, 640, 3] (host, where the node keeps them: for a GPU
    in pinned memory): for stage 0 by itself.
    """

    frames: list[np.ndarray]
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    noise: Tensor
    state: Tensor
    camera_frames: list[np.ndarray]


def check_shape(config: Pi05Config, cameras: int, tokens: int) -> None:
    """Raises ConfigError for what the model has no slots for."""
    if not 1 <= cameras <= config.num_cameras:
        raise ConfigError("--cameras", expected=f"1 to {config.num_cameras}", received=str(cameras),
                          way_out="The model has no more camera slots.")
    if not 1 <= tokens <= config.max_token_len:
        raise ConfigError("--tokens", expected=f"1 to {config.max_token_len}", received=str(tokens),
                          way_out="The model has no more prompt slots.")


def placed(frame: np.ndarray, device: torch.device) -> np.ndarray:
    return pinned_copy(frame) if device.type == "cuda" else frame


def random_inputs(config: Pi05Config, device: torch.device, cameras: int, tokens: int, seed: int) -> BenchmarkInputs:
    """`cameras` present cameras and `tokens` valid prompt tokens; what is masked is left out, as `trimmed` does."""
    check_shape(config, cameras, tokens)
    rng = np.random.default_rng(seed)
    size = config.vision.image_size
    put = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    return BenchmarkInputs(
        frames=[rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8) for _ in range(cameras)],
        image_mask=torch.ones(1, cameras, dtype=torch.bool, device=device),
        tokens=put(rng.integers(3, config.prefix.vocab_size, (1, tokens))),
        token_mask=torch.ones(1, tokens, dtype=torch.bool, device=device),
        noise=put(rng.standard_normal((1, config.action_horizon, config.action_dim), dtype=np.float32)),
        state=put(rng.uniform(-1, 1, (1, config.action_dim)).astype(np.float32)),
        camera_frames=[placed(rng.integers(0, 256, (1, *CAMERA_FRAME, 3), dtype=np.uint8), device)
                       for _ in range(cameras)],
    )
