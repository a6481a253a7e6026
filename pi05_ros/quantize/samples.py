"""Whole observations to calibrate and to judge with: inputs of the model, noise, and a flow time each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pi05_ros.config import Pi05Config
from pi05_ros.model.pi05 import Pi05
from pi05_ros.schema import ModelInputs
from pi05_ros.transforms.collate import collate

TIME_MIN = 0.001
STEPS = 10  # with which the model's own actions are sampled, where nobody recorded any


@dataclass(frozen=True, eq=False)
class Sample:
    """One observation, trimmed (a batch of 1); noise float32 [1, H, A]; time in [0.001, 1]; actions float32
    [1, H, A], normalised, or None where none are known."""

    inputs: ModelInputs
    noise: np.ndarray
    time: float
    actions: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Samples of one shape make a batch without padding."""
        frames = (frame.shape[1:3] for frame in self.inputs.frames if frame is not None)
        return (*self.inputs.token_mask.shape, *(size for frame in frames for size in frame), self.actions is None)


def drawn(inputs: Sequence[tuple[ModelInputs, np.ndarray | None]], config: Pi05Config, seed: int) -> list[Sample]:
    """Noise and flow time for each of `inputs`, uniform in time: sampling visits all of it alike."""
    rng = np.random.default_rng([seed, 1])
    shape = (1, config.action_horizon, config.action_dim)
    return [Sample(one.trimmed(), rng.standard_normal(shape, np.float32), float(rng.uniform(TIME_MIN, 1)), actions)
            for one, actions in inputs]


def synthetic(config: Pi05Config, count: int, seed: int) -> list[Sample]:
    """Pictures of random patches at random brightness, random prompts of random length, random states."""
    rng, size = np.random.default_rng([seed, 0]), config.vision.image_size
    made = []
    for _ in range(count):
        frames: list[np.ndarray | None] = []
        for _ in range(config.num_cameras):
            cell = int(rng.integers(4, max(5, size // 4)))
            coarse = rng.integers(0, 256, (1, -(-size // cell), -(-size // cell), 3), np.uint8)
            frames.append(coarse.repeat(cell, axis=1).repeat(cell, axis=2)[:, :size, :size])
        length = int(rng.integers(config.max_token_len // 4, config.max_token_len + 1))
        made.append((ModelInputs(
            frames=frames, image_mask=np.ones((1, config.num_cameras), bool),
            tokens=rng.integers(3, config.prefix.vocab_size, (1, length)), token_mask=np.ones((1, length), bool),
            state=rng.uniform(-1, 1, (1, config.action_dim)).astype(np.float32)), None))
    return drawn(made, config, seed)


def batches(samples: Sequence[Sample], size: int) -> Iterator[tuple[list[int], list[Sample]]]:
    """Samples of one shape, at most `size` together, with their indices: padding would be calibrated too."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        by_shape.setdefault(sample.shape, []).append(index)
    for indices in by_shape.values():
        for first in range(0, len(indices), size):
            part = indices[first:first + size]
            yield part, [samples[index] for index in part]


@dataclass(frozen=True)
class OnDevice:
    """A batch of samples as tensors: what the four stages take."""

    frames: Sequence[np.ndarray | None]
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor
    noise: Tensor
    time: Tensor
    actions: Tensor | None

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device) -> OnDevice:
        inputs = collate([sample.inputs for sample in samples])
        put = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(device)  # noqa: E731
        known = [sample.actions for sample in samples if sample.actions is not None]
        return cls(inputs.frames, put(inputs.image_mask), put(inputs.tokens), put(inputs.token_mask), put(inputs.state),
                   put(np.concatenate([sample.noise for sample in samples])),
                   put(np.array([[sample.time] for sample in samples], np.float32)),
                   put(np.concatenate(known)) if len(known) == len(samples) else None)


@torch.no_grad()
def forward(model: Pi05, samples: Sequence[Sample], resize: str = "pil") -> None:
    """The training-like pass: every stage once, the expert at each sample's flow time. Where no actions are known they
    are the model's own, which passes through the expert at the times of inference too."""
    device = next(model.parameters()).device
    batch = OnDevice.of(samples, device)
    pixels = model.prepare_images(batch.frames, device, resize)
    cache = model.prefill(model.encode_images(pixels), batch.image_mask, batch.tokens, batch.token_mask)
    actions, t = batch.actions, batch.time[..., None]
    if actions is None:
        actions = model.denoise(cache, batch.noise, STEPS, batch.state)
    if model.config.kind == "pi0":  # one time for the whole batch
        t = t.mean()
        model.velocity(cache, t * batch.noise + (1 - t) * actions, t, batch.state)
    else:
        model.velocity(cache, t * batch.noise + (1 - t) * actions, batch.time)
