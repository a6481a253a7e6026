"""Several encoded observations as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pi05_ros.errors import ConfigError
from pi05_ros.schema import ModelInputs


def collate(inputs: Sequence[ModelInputs]) -> ModelInputs:
    """One batch of several. A camera that some of them lack is black and masked there.

    Raises:
        ConfigError: none given, or frames of one camera or prompts differ in size.
    """
    if not inputs:
        raise ConfigError("batch", expected="at least one input", received="none", way_out="Give one.")
    lengths = sorted({one.tokens.shape[1] for one in inputs})
    cameras = sorted({len(one.frames) for one in inputs})
    if len(lengths) > 1 or len(cameras) > 1:
        raise ConfigError("batch", expected="equally many prompt slots and cameras",
                          received=f"{lengths} slots, {cameras} cameras",
                          way_out="Encode all of them with the same RobotTransforms.")
    return ModelInputs(
        frames=[_stack(camera, inputs) for camera in range(cameras[0])],
        image_mask=np.concatenate([one.image_mask for one in inputs]),
        tokens=np.concatenate([one.tokens for one in inputs]),
        token_mask=np.concatenate([one.token_mask for one in inputs]),
        state=np.concatenate([one.state for one in inputs]),
    )


def _stack(camera: int, inputs: Sequence[ModelInputs]) -> np.ndarray | None:
    frames = [one.frames[camera] for one in inputs]
    sizes = sorted({frame.shape[1:] for frame in frames if frame is not None})
    if len(sizes) > 1:
        raise ConfigError(f"batch, frames of camera {camera}", expected="one size", received=str(sizes),
                          way_out="Resize them before, or run them one by one.")
    if not sizes:
        return None
    return np.concatenate([np.zeros((len(one.tokens), *sizes[0]), np.uint8) if frame is None else frame
                           for one, frame in zip(inputs, frames, strict=True)])
