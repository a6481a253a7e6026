"""Write a model the way openpi's converter does, so that the ordinary loader reads it (PI05_SPEC section 11a)."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pi05_ros.config import GemmaConfig, Pi05Config
from pi05_ros.model.checkpoint_files import WEIGHTS
from pi05_ros.model.norm_stats import FILE
from pi05_ros.model.pi05 import Pi05
from pi05_ros.model.weights import (
    EMBEDDING,
    TIED_EMBEDDING,
    UNUSED,
    check_names,
    check_tensor,
    expected_shapes,
    openpi_name,
    parse_dtype,
)
from pi05_ros.schema import FieldStats, NormStats

PUBLISHED = Pi05Config()


def save_openpi(weights: Pi05 | Mapping[str, Tensor], directory: str | Path, config: Pi05Config,
                stats: NormStats | None = None, *, asset_id: str = "robot", dtype: str | torch.dtype | None = None,
                state_in_prompt: bool = True, expert_lm_head: bool = False) -> Path:
    """Write model.safetensors, config.json and the statistics into `directory`; files of these names are replaced.

    Args:
        weights: a model, or tensors by openpi's names (the embedding as `...embed_tokens.weight`).
        stats: go to assets/<asset_id>/norm_stats.json.
        dtype: of all tensors in the file; None keeps each as it is.
        state_in_prompt: False for a model trained on prompts without the state (PI05_SPEC trap T5).
        expert_lm_head: also write the random matrix that openpi's files hold and nobody reads.

    Returns:
        The directory.

    Raises:
        CheckpointError: a tensor is missing, one too many, of another shape or not finite.
    """
    directory = Path(directory)
    if isinstance(weights, Pi05):
        weights = {openpi_name(name): parameter for name, parameter in weights.named_parameters()}
    shapes = expected_shapes(config)
    check_names(weights, shapes)
    for name, shape in shapes.items():
        check_tensor(name, weights[name], shape)
    kept = None if dtype is None else parse_dtype(dtype)
    tensors = {name: weights[name].detach().to("cpu", kept).contiguous() for name in shapes}
    tensors[TIED_EMBEDDING] = tensors.pop(EMBEDDING)
    if expert_lm_head:
        generator = torch.Generator().manual_seed(0)
        size = (config.prefix.vocab_size, config.expert.width)
        tensors[UNUSED[0]] = torch.randn(size, generator=generator).to(tensors[TIED_EMBEDDING].dtype)
    directory.mkdir(parents=True, exist_ok=True)
    # A reader that has the old file open keeps it, and a crash leaves no half file under the right name.
    save_file(tensors, directory / (WEIGHTS + ".part"), {"format": "pt", EMBEDDING: TIED_EMBEDDING})
    os.replace(directory / (WEIGHTS + ".part"), directory / WEIGHTS)
    _write_json(directory / "config.json", _settings(config, tensors, state_in_prompt))
    if stats is not None:
        fields = {"state": _lists(stats.state), "actions": _lists(stats.actions)}
        _write_json(directory / "assets" / asset_id / FILE, {"norm_stats": fields})
    return directory


def _settings(config: Pi05Config, tensors: Mapping[str, Tensor], state_in_prompt: bool) -> dict[str, Any]:
    """openpi's keys, then our own: what its converter leaves out and the shapes do not tell."""
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    return {
        "action_dim": config.action_dim,
        "action_horizon": config.action_horizon,
        "paligemma_variant": _variant(config.prefix, PUBLISHED.prefix, "gemma_2b"),
        "action_expert_variant": _variant(config.expert, PUBLISHED.expert, "gemma_300m"),
        "precision": dtypes.most_common(1)[0][0],
        "pi05": config.kind == "pi05",
        "discrete_state_input": config.kind == "pi05" and state_in_prompt,
        "max_token_len": config.max_token_len,
        "vision_num_heads": config.vision.num_heads,
        "vision_depth": config.vision.depth,
        "depth": config.prefix.depth,
    }


def _variant(stack: GemmaConfig, published: GemmaConfig, name: str) -> str:
    return name if stack == published else "custom"


def _lists(stats: FieldStats) -> dict[str, list[float]]:
    return {kind: np.asarray(array, np.float64).tolist() for kind, array in asdict(stats).items() if array is not None}


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n")
