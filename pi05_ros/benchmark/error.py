"""Relative error to float32 eager: of the whole forward, and of each stage alone on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pi05_ros.backends.base import StageSet
from pi05_ros.benchmark.inputs import BenchmarkInputs
from pi05_ros.benchmark.setting import Setting
from pi05_ros.model.pi05 import PrefixCache
from pi05_ros.model.weights import parse_dtype

ERROR_LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}  # of one run, stage by stage and in all (PI05_SPEC section 14)
STAGE_ERRORS = ("images", "vision", "keys", "values", "expert")  # `prefix` is judged by the keys and values it makes


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over norm of the reference; infinite for different shapes."""
    if value.shape != reference.shape:
        return float("inf")
    reference = reference.to(value.device).double()
    return float((value.double() - reference).norm() / (reference.norm() or 1.0))


def run_stages(stages: StageSet, inputs: BenchmarkInputs, num_steps: int) -> Tensor:
    """All four stages, from uint8 frames to actions."""
    tokens = stages.vision.encode_images(stages.images.prepare_images(inputs.frames))
    cache = stages.prefix.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
    return stages.expert.denoise(cache, inputs.noise, num_steps, inputs.state)


@contextmanager
def truth(setting: Setting) -> Iterator[StageSet]:
    """Float32 eager without TF32, which PyTorch allows convolutions by default."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        yield setting.build("eager", "float32")


@dataclass(frozen=True)
class StageTruth:
    """What float32 eager made of one input, stage by stage. On the host: 45 MB at full size."""

    prepared: Tensor  # of the camera frames
    pixels: Tensor
    image_tokens: Tensor
    cache: PrefixCache
    actions: Tensor

    @classmethod
    def of(cls, stages: StageSet, inputs: BenchmarkInputs, num_steps: int) -> StageTruth:
        pixels = stages.images.prepare_images(inputs.frames)
        tokens = stages.vision.encode_images(pixels)
        cache = stages.prefix.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
        actions = stages.expert.denoise(cache, inputs.noise, num_steps, inputs.state)
        kept = PrefixCache(cache.keys.cpu(), cache.values.cpu(), cache.pad_mask.cpu())
        return cls(stages.images.prepare_images(inputs.camera_frames).cpu(), pixels.cpu(), tokens.cpu(), kept,
                   actions.cpu())


def stage_errors(stages: StageSet, inputs: BenchmarkInputs, num_steps: int, right: StageTruth,
                 dtype: str) -> dict[str, float]:
    """Each of `STAGE_ERRORS` on the truth's own input to that stage, rounded to `dtype` as stages hand it on."""
    device, kind = stages.device, parse_dtype(dtype)
    found = {"images": relative_error(stages.images.prepare_images(inputs.camera_frames), right.prepared),
             "vision": relative_error(stages.vision.encode_images(right.pixels.to(device)), right.image_tokens)}
    cache = stages.prefix.prefill(right.image_tokens.to(device, kind), inputs.image_mask, inputs.tokens,
                                  inputs.token_mask)
    found["keys"] = relative_error(cache.keys, right.cache.keys)
    found["values"] = relative_error(cache.values, right.cache.values)
    given = PrefixCache(right.cache.keys.to(device, kind), right.cache.values.to(device, kind),
                        right.cache.pad_mask.to(device))
    found["expert"] = relative_error(stages.expert.denoise(given, inputs.noise, num_steps, inputs.state),
                                     right.actions)
    return found
