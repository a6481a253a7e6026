"""The four stages for one batch, in the order that there is, each timed and on whatever stream is current."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pi05_ros.backends import base
from pi05_ros.errors import BackendError
from pi05_ros.runtime.timing import StageTimer
from pi05_ros.schema import Guidance, ModelInputs


class Forward:
    """noise: float32 [B, H, 32]. Call `vision`, `prefix` and `expert` once each, in this order.

    Each uploads what it needs itself, so that the frames, which take longest, are under way first. Uploads live as long
    as this object: the device may read them after the host has gone on.
    """

    def __init__(self, stages: base.StageSet, inputs: ModelInputs, noise: np.ndarray, num_steps: int,
                 timer: StageTimer) -> None:
        self._stages, self._inputs, self._noise, self._num_steps = stages, inputs.trimmed(), noise, num_steps
        self._timer = timer
        self._uploaded: list[Tensor] = []
        self._check_padding()

    def _check_padding(self) -> None:
        """What trimming leaves masked: an empty prompt, and in a batch the shorter ones."""
        whole = self._inputs.image_mask.all() and self._inputs.token_mask.all()
        for stage in (self._stages.prefix, self._stages.expert):
            if not whole and not getattr(stage, "takes_padding", True):
                raise BackendError("observation", expected="at least one camera and one prompt token, one observation "
                                   "at a time", received="masked positions", way_out="Give a prompt, or use backend "
                                   "'eager' for prefix and expert.")

    def vision(self) -> Tensor:
        """Stages 0 and 1: image tokens [B, N*256, W]."""
        with self._timer.stage("images"):
            pixels = self._stages.images.prepare_images(self._inputs.frames)
        with self._timer.stage("vision"):
            return self._stages.vision.encode_images(pixels)

    def prefix(self, image_tokens: Tensor) -> base.PrefixCache:
        image_mask, tokens, token_mask = map(self._upload, (self._inputs.image_mask, self._inputs.tokens,
                                                            self._inputs.token_mask))
        with self._timer.stage("prefix"):
            return self._stages.prefix.prefill(image_tokens, image_mask, tokens, token_mask)

    def expert(self, cache: base.PrefixCache, guidance: Guidance | None = None) -> Tensor:
        """Actions x_0, float32 [B, H, 32]."""
        noise, state = self._upload(self._noise), self._upload(self._inputs.state)
        with self._timer.stage("expert"):
            return self._stages.expert.denoise(cache, noise, self._num_steps, state, guidance)

    def _upload(self, array: np.ndarray) -> Tensor:
        self._uploaded.append(upload(array, self._stages.device))
        return self._uploaded[-1]


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """To the device, behind the work of the current stream; the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
