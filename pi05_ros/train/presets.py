"""Sizes to train, and everything that shapes a run. Widths are multiples of 64, head_dims powers of two from 32 on,
so that every backend and precision takes the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pi05_ros.config import GemmaConfig, Pi05Config, SiglipConfig
from pi05_ros.errors import ConfigError

PROMPT_SLOTS = 48


def smallest(horizon: int, vocab_size: int) -> Pi05Config:
    """For tests and first looks on a CPU: 16 image tokens a camera."""
    return Pi05Config(
        vision=SiglipConfig(width=64, depth=1, mlp_dim=128, num_heads=2, image_size=56),
        prefix=GemmaConfig(width=64, depth=2, mlp_dim=128, num_heads=2, head_dim=32, vocab_size=vocab_size),
        expert=GemmaConfig(width=64, depth=2, mlp_dim=128, num_heads=2, head_dim=32),
        action_horizon=horizon, max_token_len=PROMPT_SLOTS,
    )


def small(horizon: int, vocab_size: int) -> Pi05Config:
    """The model that ships: 64 image tokens a camera, below 7.5 million parameters."""
    return Pi05Config(
        vision=SiglipConfig(width=192, depth=6, mlp_dim=640, num_heads=6, image_size=112),
        prefix=GemmaConfig(width=256, depth=4, mlp_dim=512, head_dim=32, vocab_size=vocab_size),
        expert=GemmaConfig(width=192, depth=4, mlp_dim=384, head_dim=32),
        action_horizon=horizon, max_token_len=PROMPT_SLOTS,
    )


PRESETS: dict[str, Callable[[int, int], Pi05Config]] = {"smallest": smallest, "small": small}


@dataclass(frozen=True)
class TrainSettings:
    """What decides the weights of a run, beside the data; a run is resumed only under the same settings.

    Args:
        config: a name of `PRESETS`.
        horizon: actions in a chunk, at the robot's control rate.
        steps: optimiser steps of the whole run; the learning rate follows them.
        batch: samples a step.
        learning_rate: its peak, after `warmup` steps; then a cosine down to 0.
        ema: decay of the averaged weights, which are what is saved.
        goal_weight: of the guess of the episode's last action from the prefix (flow_matching.py), beside the flow.
        scene_weight: likewise of the guess of where things are, if the data set knows.
        augment: small crops and colour changes of the images.
        precision: of the products: `bfloat16` under autocast, or `float32`.
    """

    config: str = "small"
    horizon: int = 50
    steps: int = 30_000
    batch: int = 128
    seed: int = 0
    learning_rate: float = 1e-3
    warmup: int = 500
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 0.999
    goal_weight: float = 1.0
    scene_weight: float = 1.0
    augment: bool = True
    precision: str = "float32"

    def __post_init__(self) -> None:
        _require("config", self.config in PRESETS, " or ".join(PRESETS), self.config)
        _require("precision", self.precision in ("float32", "bfloat16"), "float32 or bfloat16", self.precision)
        for name in ("horizon", "steps", "batch"):
            _require(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        _require("warmup", 0 <= self.warmup, "at least 0", self.warmup)
        for name in ("learning_rate", "clip_norm"):
            _require(name, getattr(self, name) > 0, "more than 0", getattr(self, name))
        for name in ("goal_weight", "scene_weight", "weight_decay"):
            _require(name, getattr(self, name) >= 0, "at least 0", getattr(self, name))
        _require("ema", 0 <= self.ema < 1, "0 up to, not including, 1", self.ema)


def _require(subject: str, holds: bool, expected: str, received: object) -> None:
    if not holds:
        raise ConfigError(subject, expected=expected, received=str(received), way_out="Correct the option.")
