"""Which weights these are, in milliseconds: whoever made something of them can tell later whether they are the same."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from safetensors import SafetensorError, safe_open

from pi05_ros.config import Pi05Config
from pi05_ros.errors import CheckpointError
from pi05_ros.model.checkpoint import Checkpoint


def fingerprint(source: Any) -> str:
    """Hex digits that depend on the sizes of the model and, of a checkpoint, on every tensor's name, shape, type, and
    first and last row; of random weights on how they are drawn. The action horizon, on which no weight depends, does
    not count. A change that keeps all those rows would not be seen.

    Raises:
        CheckpointError: a file that cannot be read any more.
    """
    digest = hashlib.sha256(repr(_sizes(source.config)).encode())
    if isinstance(source, Checkpoint):
        _add_tensors(digest, source)
    elif hasattr(source, "source"):  # the same weights for another horizon
        return fingerprint(source.source)
    else:
        digest.update(f"{type(source).__name__} {getattr(source, 'seed', None)}".encode())
    return digest.hexdigest()[:32]


def _sizes(config: Pi05Config) -> Pi05Config:
    return replace(config, action_horizon=1, max_token_len=1, num_cameras=1, rope_inv_freq="float32")


def _add_tensors(digest: Any, checkpoint: Checkpoint) -> None:
    opened: dict[Any, Any] = {}
    for name in sorted(checkpoint.tensors):
        stored = checkpoint.tensors[name]
        digest.update(f"{name} {stored.shape} {stored.dtype}".encode())
        try:
            if stored.file not in opened:
                opened[stored.file] = safe_open(stored.file, framework="pt")
            rows = opened[stored.file].get_slice(stored.key)
            for row in (rows[:1], rows[-1:]) if stored.shape else ():
                digest.update(row.float().numpy().tobytes())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor '{stored.key}' in {stored.file}", expected="to be read",
                                  received=str(error), way_out="Did the file change? Open it again.") from error
