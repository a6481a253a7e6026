"""Frames in page-locked memory, from which the GPU takes them by itself: no other copy on the host."""

from __future__ import annotations

import numpy as np
import torch

from pi05_ros.errors import ObservationError


def pinned_memory(size: int) -> np.ndarray:
    """uint8 [size], page-locked; PyTorch keeps it for the next one of this size once nobody has it.

    Raises:
        ObservationError: no such memory, after a fault of the GPU say; the policy's worker finds that out by itself.
    """
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    except RuntimeError as error:
        raise ObservationError("image", expected=f"{size} bytes of page-locked memory", received=str(error),
                               way_out="Clean up and configure again.", cause="pinned memory") from error


def pinned_copy(frame: np.ndarray) -> np.ndarray:
    copy = pinned_memory(frame.size).reshape(frame.shape)
    np.copyto(copy, frame)
    return copy


def is_pinned(frame: np.ndarray) -> bool:
    """Whether the GPU can read the frame where it is: one piece, in page-locked memory."""
    if not (frame.flags.writeable and frame.flags.c_contiguous):  # PyTorch warns of what is read-only
        return False
    return torch.from_numpy(frame).is_pinned()
