"""Stage 0 on the GPU: camera frames from pinned memory to images in the static buffer.

Frames that lie elsewhere are copied into it first; while one uploads the next is copied, so that the stage then takes
little longer than the copies, which are most of it.
Nothing is allocated while the sizes of the frames stay the same, or come back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from pi05_ros.backends.cuda import checks
from pi05_ros.backends.cuda.kernels.resample import FIELDS, resample
from pi05_ros.backends.cuda.taps import PRECISION_BITS, axis_taps
from pi05_ros.model.images import check_resize, to_unit
from pi05_ros.model.pinned import is_pinned
from pi05_ros.transforms.images import check_frame, letterbox

Size = tuple[int, int] | None  # height and width, or no camera
MAX_LAYOUTS = 32  # sets of sizes whose tables are kept


@dataclass(frozen=True)
class Layout:
    """Of one set of frame sizes: the kernel's plan, and the way of each frame that is there."""

    plan: Tensor
    staged: list[np.ndarray]  # uint8 [1, h, w, 3], pinned
    uploads: list[tuple[Tensor, Tensor]]  # to, from


class FramePreparation:
    """Frames to images, on the caller's stream; one thread at a time."""

    def __init__(self, pixels: Tensor, resize: str) -> None:
        """pixels: float32 [most cameras, 3, S, S] on the GPU, written by `prepare`. Raises ConfigError."""
        check_resize(resize)
        self.pixels, self.resize, self.device = pixels, resize, pixels.device
        levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).to(self.device)
        self._levels = to_unit(levels).flatten()  # float32 [256], on this device as the reference computes it
        self._layouts: dict[tuple[Size, ...], Layout] = {}
        self._staging = torch.empty(0, dtype=torch.uint8, pin_memory=True)
        self._raw = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._reading: list[np.ndarray] = []  # the caller's frames that the GPU reads
        self._consumed = torch.cuda.Event()  # all of these are free again
        self.prepare([None])  # compiles the kernel

    def prepare(self, frames: Sequence[np.ndarray | None]) -> Tensor:
        """N frames, uint8 [1, h, w, 3] or None (black), to float32 [1, N, 3, S, S] in [-1, 1], a view of `pixels`.

        Frames in pinned memory (model/pinned.py) are read while the stream comes to it: who writes into them waits for
        the images.

        Raises ObservationError as the transform does, BackendError for a batch and for too many cameras.
        """
        checks.check_cameras(len(frames), len(self.pixels))
        for i, frame in enumerate(frames):
            if frame is not None:
                checks.check_batch("frames", frame)
                check_frame(f"camera {i}", frame[0])
        sizes = tuple(None if frame is None else (frame.shape[1], frame.shape[2]) for frame in frames)
        self._consumed.synchronize()
        layout = self._layouts.get(sizes) or self._lay_out(sizes)
        present = [frame for frame in frames if frame is not None]
        self._reading = [frame for frame in present if is_pinned(frame)]
        for frame, staged, (raw, source) in zip(present, layout.staged, layout.uploads, strict=True):
            if any(frame is ready for ready in self._reading):
                raw.copy_(torch.from_numpy(frame).flatten(), non_blocking=True)
                continue
            np.copyto(staged, frame)  # one core: PyTorch's copy takes all, and waits for the busiest
            raw.copy_(source, non_blocking=True)
        images = self.pixels[:len(frames)]
        resample(self._raw, layout.plan, self._levels, images, PRECISION_BITS if self.resize == "pil" else None)
        self._consumed.record()
        return images[None]

    def _lay_out(self, sizes: tuple[Size, ...]) -> Layout:
        """Of sizes not kept; grows the memory, which nothing uses now, where they need more."""
        ends = [0, *accumulate(0 if size is None else 3 * math.prod(size) for size in sizes)]
        plan = torch.from_numpy(plan_of(sizes, ends, self.pixels.shape[-1], self.resize)).to(self.device)
        grow = ends[-1] > len(self._staging)
        if grow or len(self._layouts) == MAX_LAYOUTS:
            self._layouts.clear()
        if grow:
            self._staging = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
            self._raw = torch.empty(ends[-1], dtype=torch.uint8, device=self.device)
        spans = [(slice(*span), size) for span, size in zip(pairwise(ends), sizes, strict=True) if size is not None]
        layout = Layout(plan, [self._staging[span].numpy().reshape(1, *size, 3) for span, size in spans],
                        [(self._raw[span], self._staging[span]) for span, _ in spans])
        self._layouts[sizes] = layout
        return layout


def plan_of(sizes: Sequence[Size], starts: Sequence[int], size: int, resize: str) -> np.ndarray:
    """int32: FIELDS a camera in the order of kernels/resample.py, then each axis' first taps and weights.

    starts: bytes before each frame; size: of the square images. Where a table lies is counted from its camera's fields.
    """
    heads, tables = np.zeros((len(sizes), FIELDS), np.int32), []
    end = heads.size
    for i, frame in enumerate(sizes):
        if frame is None:
            continue
        box = letterbox(*frame, size)
        heads[i, :7] = (*frame, starts[i], box.top, box.left, box.height, box.width)
        for axis, (extent, length) in enumerate(zip(frame, (box.height, box.width), strict=True)):
            taps = axis_taps(extent, length, resize)
            heads[i, 7 + axis], heads[i, 9 + axis] = end - i * FIELDS, len(taps.weights)
            tables += [taps.first, taps.weights.view(np.int32).ravel()]
            end += length * (1 + len(taps.weights))
    return np.concatenate([heads.ravel(), *tables])
