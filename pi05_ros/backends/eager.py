"""The reference backend: plain PyTorch on CPU or GPU, the truth the others are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pi05_ros.model import weights
from pi05_ros.model.pi05 import Pi05, PrefixCache
from pi05_ros.model.quantised_linear import quantised_linears
from pi05_ros.schema import Guidance


class EagerStages:
    """`Pi05` without gradients; batched."""

    overlaps = True  # nothing is kept between calls

    def __init__(self, model: Pi05, device: torch.device, resize: str) -> None:
        self.model, self.device, self.resize = model, device, resize

    def prepare_images(self, frames: Sequence[np.ndarray | None]) -> Tensor:
        return self.model.prepare_images(frames, self.device, self.resize)

    @property
    def runs(self) -> dict[str, str]:
        """Of the quantised layers that have run: in FP8, or at least once simulated."""
        return {name: "FP8" if set(layer.calls) == {"tensor cores"} else "simulated"
                for name, layer in quantised_linears(self.model).items() if layer.calls}

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_images(pixels)

    @torch.no_grad()
    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        return self.model.prefill(image_tokens, image_mask, tokens, token_mask)

    @torch.no_grad()
    def denoise(self, cache: PrefixCache, noise: Tensor, num_steps: int, state: Tensor | None = None,
                guidance: Guidance | None = None) -> Tensor:
        return self.model.denoise(cache, noise, num_steps, state, guidance)


def build(stages: Sequence[str], source: weights.WeightSource, device: torch.device, dtype: str, resize: str,
          on_progress: weights.Progress | None) -> EagerStages:
    return EagerStages(weights.load(source, device, dtype, stages, on_progress), device, resize)
