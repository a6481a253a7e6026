"""The four stages for one batch, in the order that there is, each timed and on whatever stream is current."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pi05_ros.backends import base
from pi05_ros.errors import BackendError
from pi05_ros.runtime.timing import StageTimer
from pi05_ros.schema import Guidance, ModelInputs


class Prepared(Protocol):
    """What the stages are given. Each part may be made when it is asked for: `frames` first, then `inputs`, `noise`."""

    @property
    def frames(self) -> Sequence[np.ndarray | None]:
        """Of the cameras that are not masked."""

    @property
    def inputs(self) -> ModelInputs: ...

    @property
    def noise(self) -> np.ndarray:
        """float32 [B, H, 32]"""


@dataclass(frozen=True)
class Given:
    """All that the stages need, made before."""

    inputs: ModelInputs
    noise: np.ndarray

    @property
    def frames(self) -> Sequence[np.ndarray | None]:
        return self.inputs.trimmed().frames


class Forward:
    """Call `vision`, `prefix` and `expert` once each, in this order.

    Each asks for what it needs itself and uploads it, so that the frames, which take longest, are under way first, and
    the host writes the tokens and draws the noise while a GPU looks at them. Uploads live as long as this object: the
    device may read them after the host has gone on.
    """

    def __init__(self, stages: base.StageSet, prepared: Prepared, num_steps: int, timer: StageTimer) -> None:
        self._stages, self._prepared, self._num_steps, self._timer = stages, prepared, num_steps, timer
        self._uploaded: list[Tensor] = []

    def _check_padding(self, inputs: ModelInputs) -> None:
        """What trimming leaves masked: an empty prompt, and in a batch the shorter ones."""
        whole = inputs.image_mask.all() and inputs.token_mask.all()
        for stage in (self._stages.prefix, self._stages.expert):
            if not whole and not getattr(stage, "takes_padding", True):
                raise BackendError("observation", expected="at least one camera and one prompt token, one observation "
                                   "at a time", received="masked positions", way_out="Give a prompt, or use backend "
                                   "'eager' for prefix and expert.")

    def vision(self) -> Tensor:
        """Stages 0 and 1: image tokens [B, N*256, W]."""
        with self._timer.stage("images"):
            pixels = self._stages.images.prepare_images(self._prepared.frames)
        with self._timer.stage("vision"):
            return self._stages.vision.encode_images(pixels)

    def prefix(self, image_tokens: Tensor) -> base.PrefixCache:
        inputs = self._prepared.inputs.trimmed()
        self._check_padding(inputs)
        image_mask, tokens, token_mask = map(self._upload, (inputs.image_mask, inputs.tokens, inputs.token_mask))
        with self._timer.stage("prefix"):
            return self._stages.prefix.prefill(image_tokens, image_mask, tokens, token_mask)

    def expert(self, cache: base.PrefixCache, guidance: Guidance | None = None) -> Tensor:
        """Actions x_0, float32 [B, H, 32]."""
        noise, state = self._upload(self._prepared.noise), self._upload(self._prepared.inputs.state)
        with self._timer.stage("expert"):
            return self._stages.expert.denoise(cache, noise, self._num_steps, state, guidance)

    def _upload(self, array: np.ndarray) -> Tensor:
        self._uploaded.append(upload(array, self._stages.device))
        return self._uploaded[-1]


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """To the device, behind the work of the current stream; the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
