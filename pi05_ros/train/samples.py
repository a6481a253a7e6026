"""A data set as tensors: encoded once by the code that encodes observations at inference, then drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pi05_ros.errors import ConfigError
from pi05_ros.model.images import to_unit
from pi05_ros.schema import Observation
from pi05_ros.train.augment import augment, draw_changes
from pi05_ros.train.dataset import Episode
from pi05_ros.train.flow_matching import Batch, draw_times
from pi05_ros.train.statistics import action_chunk, check_robot
from pi05_ros.transforms.images import resize_with_pad
from pi05_ros.transforms.robot import RobotTransforms

GPU_SHARE = 0.5  # of the free memory that images may take; larger data sets stay in host memory


@dataclass(frozen=True, eq=False)
class Samples:
    """F frames: images uint8 [F, N, s, s, 3] of the cameras that are there, tokens int64 [F, L] and their mask bool
    [F, L], actions float32 [F, H, A], normalised and zero padded, goals float32 [F, A]: each episode's last action as
    it would be encoded at a state of zeros, scenes float32 [F, K]."""

    images: Tensor
    tokens: Tensor
    token_mask: Tensor
    actions: Tensor
    goals: Tensor
    scenes: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Samples:
        """On `device`, but for images that do not fit: those stay here, and every batch copies its own."""
        fits = device.type != "cuda" or self.images.nbytes < GPU_SHARE * torch.cuda.mem_get_info(device)[0]
        return Samples(self.images.to(device) if fits else self.images, self.tokens.to(device),
                       self.token_mask.to(device), self.actions.to(device), self.goals.to(device),
                       self.scenes.to(device))

    def batch(self, rows: Tensor, noise: Tensor, time: Tensor, changes: Tensor | None) -> Batch:
        """The frames `rows` (int64 [B], on the CPU as all arguments); `changes` of the images or None."""
        device = self.tokens.device
        here = rows.to(device, non_blocking=True)
        images = self.images[rows.to(self.images.device)].to(device, non_blocking=True)
        pixels = (to_unit(images.flatten(0, 1)) * 2.0 - 1.0).unflatten(0, images.shape[:2])
        if changes is not None:
            pixels = augment(pixels, changes.to(device, non_blocking=True))
        return Batch(pixels, self.tokens[here], self.token_mask[here], self.actions[here], self.goals[here],
                     self.scenes[here], noise.to(device, non_blocking=True), time.to(device, non_blocking=True))


def draw_batch(samples: Samples, count: int, seed: int, step: int, changed: bool) -> Batch:
    """Frames, noise, times and changes of optimiser step `step`: a function of (seed, step) alone, on any device, so
    that a run can be resumed without its generators' states."""
    generator = step_generator(seed, step)
    rows = torch.randint(len(samples), (count,), generator=generator)
    noise = torch.randn((count, *samples.actions.shape[1:]), generator=generator)
    time = draw_times(count, generator)
    changes = draw_changes(count, samples.images.shape[1], generator) if changed else None
    return samples.batch(rows, noise, time, changes)


def step_generator(seed: int, step: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def encode_episodes(episodes: Iterable[Episode], frames: int, cameras: tuple[str, ...], transforms: RobotTransforms,
                    seed: int, on_progress: Callable[[int, int], None] | None = None) -> Samples:
    """Every frame as a sample; which of an episode's wordings it gets is drawn from `seed`.

    Args:
        frames: in all the episodes, so that their images are laid out once.
        cameras: slots of the episodes' images.

    Raises:
        ConfigError, ObservationError: episodes that do not suit the robot, or a prompt that is too long.
    """
    size, horizon = transforms.config.vision.image_size, transforms.config.action_horizon
    images: Tensor | None = None
    tokens, masks, chunks, goals, scenes = [], [], [], [], []
    wording, row, origin = np.random.default_rng([seed, 1]), 0, np.zeros(transforms.robot.state_dim)
    for episode in episodes:
        check_robot(episode, transforms.robot)
        goal = transforms.encode_actions(episode.actions[-1:], origin)[0]  # the same for all its frames
        assert episode.frame_steps is not None and episode.scene is not None
        scenes.append(episode.scene)
        for frame, step in zip(episode.images, episode.frame_steps, strict=True):
            state = episode.state[step]
            prompt = episode.prompts[wording.integers(len(episode.prompts))]
            inputs = transforms.encode(Observation(dict(zip(cameras, frame, strict=True)), state, prompt))
            if inputs.token_mask.all():
                raise ConfigError(f"prompt of {episode.name}", expected=f"fewer than {inputs.tokens.shape[1]} tokens",
                                  received=f"'{prompt}'", way_out="Say it in fewer words.")
            present = [camera[0] for camera in inputs.frames if camera is not None]
            if images is None:
                images = torch.empty((frames, len(present), size, size, 3), dtype=torch.uint8)
            images[row] = torch.from_numpy(np.stack([resize_with_pad(camera, size) for camera in present]))
            tokens.append(inputs.tokens[0])
            masks.append(inputs.token_mask[0])
            chunks.append(transforms.encode_actions(action_chunk(episode, int(step), horizon), state))
            goals.append(goal)
            row += 1
        if on_progress:
            on_progress(row, frames)
    if images is None or row != frames:
        raise ConfigError("frames of the data set", expected=f"{frames}, at least 1", received=str(row),
                          way_out="Record the data set again.")
    longest = int(np.stack(masks).sum(axis=1).max())
    return Samples(images, torch.from_numpy(np.stack(tokens)[:, :longest]),
                   torch.from_numpy(np.stack(masks)[:, :longest]), torch.from_numpy(np.stack(chunks)),
                   torch.from_numpy(np.stack(goals)), torch.from_numpy(np.concatenate(scenes)))
