"""The four stages for one batch, in the order that there is, each timed and on whatever stream is current."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pi05_ros.backends import base
from pi05_ros.runtime.timing import StageTimer
from pi05_ros.schema import Guidance, ModelInputs


class Forward:
    """noise: float32 [B, H, 32]. Call `vision`, `prefix` and `expert` once each, in this order."""

    def __init__(self, stages: base.StageSet, inputs: ModelInputs, noise: np.ndarray, num_steps: int,
                 guidance: Guidance | None, timer: StageTimer) -> None:
        self._stages, self._inputs, self._noise, self._num_steps = stages, inputs.trimmed(), noise, num_steps
        self._guidance, self._timer = guidance, timer
        self._uploaded: dict[str, Tensor] = {}

    def vision(self) -> Tensor:
        """Everything to the device, then stages 0 and 1: image tokens [B, N*256, W]."""
        i = self._inputs
        arrays = dict(image_mask=i.image_mask, tokens=i.tokens, token_mask=i.token_mask, state=i.state,
                      noise=self._noise)
        self._uploaded = {name: upload(array, self._stages.device) for name, array in arrays.items()}
        with self._timer.stage("images"):
            pixels = self._stages.images.prepare_images(i.frames)
        with self._timer.stage("vision"):
            return self._stages.vision.encode_images(pixels)

    def prefix(self, image_tokens: Tensor) -> base.PrefixCache:
        u = self._uploaded
        with self._timer.stage("prefix"):
            return self._stages.prefix.prefill(image_tokens, u["image_mask"], u["tokens"], u["token_mask"])

    def expert(self, cache: base.PrefixCache) -> Tensor:
        """Actions x_0, float32 [B, H, 32]."""
        u = self._uploaded
        with self._timer.stage("expert"):
            return self._stages.expert.denoise(cache, u["noise"], self._num_steps, u["state"], self._guidance)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """To the device, behind the work of the current stream; the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
