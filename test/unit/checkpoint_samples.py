"""Checkpoints of the tiny model in every layout, for the tests of the loader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pi05_ros.config import tiny_config
from pi05_ros.errors import CheckpointError
from pi05_ros.model.checkpoint import open_checkpoint
from pi05_ros.model.pi05 import Pi05
from pi05_ros.model.recipe import RecipeSource
from pi05_ros.model.save import save_openpi
from pi05_ros.model.weights import EMBEDDING, TIED_EMBEDDING, load, openpi_name
from pi05_ros.schema import FieldStats, NormStats

WEIGHTS = "model.safetensors"
NORMALIZER_FILE = "policy_preprocessor_step_3_normalizer_processor.safetensors"
UNNORMALIZER_FILE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
VISION_SEGMENT = "vision_tower.vision_model."
FEATURES = {"observation.state": {"type": "STATE", "shape": [7]}, "action": {"type": "ACTION", "shape": [6]}}
NORM_MAP = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "MEAN_STD"}
LEROBOT_CONFIG = {
    "type": "pi05", "paligemma_variant": "tiny", "dtype": "bfloat16", "chunk_size": 10, "n_action_steps": 5,
    "max_state_dim": 32, "max_action_dim": 32, "tokenizer_max_length": 48, "image_resolution": [224, 224],
    "min_period": 0.004, "max_period": 4.0, "normalization_mapping": NORM_MAP, "use_visual_memory": False,
    "input_features": {
        "observation.images.wrist": {"type": "VISUAL", "shape": [3, 480, 640]},
        "observation.state": FEATURES["observation.state"],
        "observation.images.front": {"type": "VISUAL", "shape": [3, 480, 640]},
        "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 224, 224]},
    },
    "output_features": {"action": FEATURES["action"]},
}


@cache
def tiny_model(kind: str = "pi05") -> Pi05:
    return load(RecipeSource(tiny_config(kind=kind)), dtype="float32")


def tiny_tensors(kind: str = "pi05") -> dict[str, Tensor]:
    """By openpi's names, the embedding where files have it."""
    tensors = {openpi_name(name): p.detach() for name, p in tiny_model(kind).named_parameters()}
    tensors[TIED_EMBEDDING] = tensors.pop(EMBEDDING)
    return tensors


def openpi_stats(width: int = 7) -> NormStats:
    ramp = np.arange(1, width + 1) / 10
    return NormStats(FieldStats(mean=ramp, std=ramp, q01=-ramp, q99=ramp), FieldStats(ramp, ramp, -2 * ramp, 2 * ramp))


def save_tiny(directory: Path, kind: str = "pi05", stats: NormStats | None = None, **options: Any) -> Path:
    return save_openpi(tiny_model(kind), directory, tiny_config(kind=kind), stats, **options)


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
    return directory


def write_json(file: Path, values: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))


def edit_json(file: Path, **changes: Any) -> None:
    """Set top-level keys; `...` takes a key out."""
    values = json.loads(file.read_text()) | changes
    write_json(file, {key: value for key, value in values.items() if value is not ...})


def edit_tensors(directory: Path, **changes: Tensor | None) -> None:
    """Set tensors by key; None takes one out."""
    tensors = load_file(directory / WEIGHTS) | changes
    write_tensors(directory, {key: tensor for key, tensor in tensors.items() if tensor is not None})


def save_lerobot(directory: Path, kind: str = "pi05", prefix: str = "model.", **config: Any) -> Path:
    """As lerobot saves a fine-tuned policy: prefixed keys, config.json, both pipelines with their statistics."""
    write_tensors(directory, {prefix + name: tensor for name, tensor in tiny_tensors(kind).items()})
    write_json(directory / "config.json", LEROBOT_CONFIG | {"type": kind} | config)
    write_pipelines(directory)
    return directory


def lerobot_arrays() -> dict[str, Tensor]:
    state, action = torch.arange(1, 8) / 10, torch.arange(1, 7) / 10
    return {"observation.state.q01": -state, "observation.state.q99": state, "observation.state.mean": 0 * state,
            "observation.state.std": state, "action.mean": action, "action.std": 2 * action,
            "action.q01": -action, "action.q99": action, "observation.images.front.mean": torch.zeros(3, 1, 1)}


def write_pipelines(directory: Path, relative: Mapping[str, Any] | None = None, **settings: Any) -> None:
    """`settings` override those of both normalising steps; `relative` are those of the relative-actions step."""
    common = {"eps": 1e-8, "features": FEATURES, "norm_map": NORM_MAP} | settings
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "normalizer_processor", "config": common, "state_file": NORMALIZER_FILE},
        {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}},
        {"registry_name": "tokenizer_processor", "config": {"max_length": 48}},
        {"registry_name": "device_processor", "config": {"device": "cpu"}},
    ]
    if relative is not None:
        before.insert(2, {"registry_name": "relative_actions_processor", "config": dict(relative)})
    after = [{"registry_name": "unnormalizer_processor", "config": common, "state_file": UNNORMALIZER_FILE},
             {"registry_name": "device_processor", "config": {"device": "cpu"}}]
    write_json(directory / "policy_preprocessor.json", {"name": "policy_preprocessor", "steps": before})
    write_json(directory / "policy_postprocessor.json", {"name": "policy_postprocessor", "steps": after})
    write_arrays(directory)


def write_arrays(directory: Path, **changes: Tensor | None) -> None:
    """The statistics of both pipelines; keys in `changes` have "__" for ".", and None takes one out."""
    arrays = lerobot_arrays() | {key.replace("__", "."): value for key, value in changes.items()}
    for name in (NORMALIZER_FILE, UNNORMALIZER_FILE):
        save_file({key: value.clone() for key, value in arrays.items() if value is not None}, directory / name)


def refusal(path: Path, *words: str, **options: Any) -> CheckpointError:
    """Opening must fail with a CheckpointError that says all of `words` and a way out."""
    with pytest.raises(CheckpointError) as caught:
        load(open_checkpoint(path, **options))
    for word in words:
        assert word in str(caught.value)
    assert caught.value.expected and caught.value.received and caught.value.way_out
    return caught.value
