"""Sizes of the model and where the package keeps its files. Frozen and validated; standard library only."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pi05_ros.errors import ConfigError
from pi05_ros.schema import ACTION_DIM, CAMERAS, IMAGE_SIZE


@dataclass(frozen=True)
class SiglipConfig:
    """SigLIP So400m/14 by default (PI05_SPEC section 1)."""

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    patch_size: int = 14
    image_size: int = IMAGE_SIZE

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class GemmaConfig:
    """One Gemma stack. `vocab_size` 0: no token embedding (the action expert)."""

    width: int
    mlp_dim: int
    depth: int = 18
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256
    vocab_size: int = 0


@dataclass(frozen=True)
class Pi05Config:
    """A pi0.5 (or pi0) model: sizes, horizon, and the RoPE switch of PI05_SPEC trap T1."""

    vision: SiglipConfig = field(default_factory=SiglipConfig)
    prefix: GemmaConfig = field(default_factory=lambda: GemmaConfig(width=2048, mlp_dim=16384, vocab_size=257152))
    expert: GemmaConfig = field(default_factory=lambda: GemmaConfig(width=1024, mlp_dim=4096))
    kind: Literal["pi05", "pi0"] = "pi05"
    action_horizon: int = 50
    action_dim: int = ACTION_DIM
    max_token_len: int = 200
    num_cameras: int = len(CAMERAS)
    rope_inv_freq: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        _require("model kind", self.kind in ("pi05", "pi0"), "'pi05' or 'pi0'", self.kind)
        _require("rope_inv_freq", self.rope_inv_freq in ("float32", "bfloat16"), "float32 or bfloat16",
                 self.rope_inv_freq)
        for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            ours, theirs = getattr(self.prefix, name), getattr(self.expert, name)
            _require(f"{name} of prefix and expert", ours == theirs, "the same number", f"{ours} and {theirs}")
        _require("action_horizon", 1 <= self.action_horizon <= 1000, "1 to 1000", self.action_horizon)
        _require("max_token_len", 1 <= self.max_token_len <= 4096, "1 to 4096", self.max_token_len)
        _require("num_cameras", self.num_cameras >= 1, "at least 1", self.num_cameras)
        _require("vision width", self.vision.width % self.vision.num_heads == 0,
                 "a multiple of its number of heads", f"{self.vision.width} for {self.vision.num_heads} heads")
        _require("prefix head_dim", self.prefix.head_dim % 2 == 0, "an even number (RoPE)", self.prefix.head_dim)

    @property
    def prefix_len(self) -> int:
        """Prefix slots with every camera and a full prompt."""
        return self.num_cameras * self.vision.num_patches + self.max_token_len


def tiny_config(**changes) -> Pi05Config:
    """The test model "tiny" of PI05_SPEC section 14; `changes` override fields of Pi05Config."""
    sizes = dict(
        vision=SiglipConfig(width=72, depth=2, mlp_dim=152, num_heads=4),
        prefix=GemmaConfig(width=96, depth=3, mlp_dim=192, head_dim=32, vocab_size=512),
        expert=GemmaConfig(width=64, depth=3, mlp_dim=128, head_dim=32),
        action_horizon=10,
        max_token_len=48,
    )
    return Pi05Config(**{**sizes, **changes})


def share_directory() -> Path:
    """Folder that holds config/ and launch/: the source tree, a colcon install, or a pip install."""
    package = "pi05_ros"
    candidates = [Path(__file__).resolve().parents[1]]
    candidates += [Path(p) / "share" / package for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    candidates.append(Path(sys.prefix) / "share" / package)
    for folder in candidates:
        if (folder / "config" / "policy.yaml").is_file():
            return folder
    raise ConfigError("configuration files", expected="config/policy.yaml in one of "
                      + ", ".join(map(str, candidates)), received="none",
                      way_out="Reinstall the package, or run from its source tree.")


def _require(subject: str, holds: bool, expected: str, received: object) -> None:
    if not holds:
        raise ConfigError(subject, expected=expected, received=str(received),
                          way_out="Correct the model configuration.")
