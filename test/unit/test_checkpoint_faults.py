"""Every fault of a checkpoint gives one clear error: what is wrong, what was expected, and the way out."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from checkpoint_samples import (
    LEROBOT_CONFIG,
    VISION_SEGMENT,
    WEIGHTS,
    edit_json,
    edit_tensors,
    refusal,
    save_lerobot,
    save_tiny,
    tiny_tensors,
    write_tensors,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pi05_ros.errors import CheckpointError, Pi05Error
from pi05_ros.model.checkpoint import open_checkpoint
from pi05_ros.model.weights import EMBEDDING, OPENPI, TIED_EMBEDDING

EXPERT_NORM = OPENPI + "gemma_expert.model.norm.dense.weight"
QUERY = OPENPI + "paligemma.model.language_model.layers.0.self_attn.q_proj.weight"

# Tensors that are wrong


def test_a_missing_tensor_is_named(tmp_path):
    edit_tensors(save_tiny(tmp_path), **{EXPERT_NORM: None})
    refusal(tmp_path, EXPERT_NORM, "no such key", "1 missing", "download")


def test_a_missing_embedding_is_named(tmp_path):
    edit_tensors(save_tiny(tmp_path), **{TIED_EMBEDDING: None})
    refusal(tmp_path, EMBEDDING, "no such key")


@pytest.mark.parametrize("stack", [VISION_SEGMENT + "encoder.", "language_model.", "gemma_expert.model."])
def test_a_model_that_lost_its_last_layers_is_not_a_smaller_model(tmp_path, stack):
    last = f"{stack}layers.{1 if 'vision' in stack else 2}."
    edit_tensors(save_tiny(tmp_path), **{name: None for name in tiny_tensors() if last in name})
    refusal(tmp_path, last.rstrip("."), "without layer", "incomplete")


def test_an_extra_tensor_is_named(tmp_path):
    edit_tensors(save_tiny(tmp_path), **{"proprio_history_proj.weight": torch.zeros(3)})
    refusal(tmp_path, "proprio_history_proj.weight", "does not have", "feature")


def test_lora_adapters_are_refused(tmp_path):
    edit_tensors(save_tiny(tmp_path), **{QUERY.replace("weight", "lora_A.weight"): torch.zeros(4, 96)})
    refusal(tmp_path, "lora_A", "Merge")


def test_a_tensor_twice_is_refused(tmp_path):
    edit_tensors(save_tiny(tmp_path), **{"model.action_in_proj.bias": torch.zeros(64)})
    refusal(tmp_path, "action_in_proj.bias", "once")


@pytest.mark.parametrize(("key", "shape"), [(QUERY, (256, 95)), (EXPERT_NORM, (192, 63)), (TIED_EMBEDDING, (512,)),
                                            ("action_in_proj.weight", (64, 31)), (TIED_EMBEDDING, (0, 96))])
def test_a_misshaped_tensor_is_named_with_both_shapes(tmp_path, key, shape):
    edit_tensors(save_tiny(tmp_path), **{key: torch.zeros(shape)})
    with pytest.raises(CheckpointError) as caught:  # from the header alone
        open_checkpoint(tmp_path)
    name = EMBEDDING if key == TIED_EMBEDDING else key
    assert name in str(caught.value) and str(shape[-1]) in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_found_when_it_is_read(tmp_path, bad):
    weight = tiny_tensors()[QUERY].clone()
    weight[3, 4] = bad
    edit_tensors(save_tiny(tmp_path), **{QUERY: weight})
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(QUERY) + ".*1 NaN"):
        checkpoint.get(QUERY, weight.shape, torch.device("cpu"))
    refusal(tmp_path, QUERY, "finite")


def test_quantised_tensors_are_refused(tmp_path):
    edit_tensors(save_tiny(tmp_path), **{QUERY: torch.zeros(256, 96, dtype=torch.int8)})
    refusal(tmp_path, QUERY, "I8", "bfloat16", "quantised")


def test_asking_for_an_unknown_tensor_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="nothing.weight"):
        open_checkpoint(save_tiny(tmp_path)).get("nothing.weight", torch.Size([1]), torch.device("cpu"))


# Files that are wrong


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.01, 0.5, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    file = save_tiny(tmp_path) / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[:int(keep * len(data)) if isinstance(keep, float) else keep])
    refusal(tmp_path, WEIGHTS, "safetensors", "download it again")


@pytest.mark.parametrize(("data", "words"), [
    (pickle.dumps({"a": 1}), ("pickle", "Convert")),
    (pickle.dumps({"a": 1}, protocol=2), ("pickle", "Convert")),
    (b"PK\x03\x04" + bytes(60), ("pickle", "Convert")),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", ("git-lfs", "git lfs pull")),
    (b"<html>404</html>", ("safetensors",)),
    ((8).to_bytes(8, "little") + b"[1,2,3] ", ("safetensors",)),
])
def test_what_is_no_safetensors_file_is_told_apart(tmp_path, data, words):
    (tmp_path / WEIGHTS).write_bytes(data)
    refusal(tmp_path, WEIGHTS, *words)


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "pytorch_model.bin", "last.ckpt", "model.pkl"])
def test_pickles_are_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    refusal(tmp_path, name, "pickle", "safetensors")
    refusal(tmp_path / name, name, "pickle", "safetensors")


@pytest.mark.parametrize(("file", "words"), [
    ("params/_METADATA", ("orbax", "convert_jax_model_to_pytorch.py")),
    ("_METADATA", ("orbax", "convert_jax_model_to_pytorch.py")),
    ("adapter_model.safetensors", ("LoRA", "Merge")),
    ("pretrained_model/model.safetensors", ("lerobot", "pretrained_model")),
    ("README.md", ("README.md", WEIGHTS)),
])
def test_other_directories_are_told_apart(tmp_path, file, words):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    refusal(tmp_path, *words)


def test_an_empty_directory_a_wrong_path_and_another_file_are_refused(tmp_path):
    refusal(tmp_path, "empty", WEIGHTS)
    refusal(tmp_path / "nowhere", "nowhere", "No such file", "downloaded")
    (tmp_path / "config.json").write_text("{}")
    refusal(tmp_path / "config.json", "config.json", "directory")


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-that-name", "x" * 5000])
def test_a_path_that_cannot_be_one_is_refused(tmp_path, path):
    refusal(path, "checkpoint directory")
    refusal(save_tiny(tmp_path), "no such file", tokenizer=path)


def test_another_model_is_refused(tmp_path):
    write_tensors(tmp_path, {"vae.encoder.weight": torch.zeros(2)})
    refusal(tmp_path, "vae.encoder.weight", OPENPI, "no pi0.5")


# config.json that is wrong


@pytest.mark.parametrize(("changes", "words"), [
    ({"type": "act"}, ("type", "'act'", "pi05")),
    ({"type": "pi0"}, ("'pi05', as the tensors have", "'pi0'")),
    ({"type": 5}, ("type", "a string", "5")),
    ({"use_visual_memory": True}, ("use_visual_memory", "false", "not implement")),
    ({"use_proprioceptive_memory": True}, ("use_proprioceptive_memory", "false", "not implement")),
    ({"max_action_dim": 7}, ("max_action_dim", "32", "7")),
    ({"min_period": 0.1}, ("min_period", "0.004", "0.1")),
    ({"image_resolution": [448, 448]}, ("image_resolution", "224", "448")),
    ({"chunk_size": 0}, ("chunk_size", "1 to 1000", "0")),
    ({"chunk_size": True}, ("chunk_size", "whole number", "True")),
    ({"n_action_steps": 11}, ("n_action_steps", "1 to 10", "11")),
    ({"paligemma_variant": "gemma_2b"}, ("vision_num_heads", "72")),
    ({"vision_num_heads": 5}, ("vision_num_heads", "4", "5")),
    ({"depth": 4}, ("language_model.layers.3", "layers 0 to 3", "3 layers")),
    ({"input_features": {f"c{i}": {"type": "VISUAL"} for i in range(4)}}, ("input_features", "3 cameras", "c3")),
    ({"input_features": {"c": None}}, ("input_features.c", "an object")),
    ({"output_features": {"action": {"shape": [6, 2]}}}, ("output_features.action.shape", "1 to 32", "[6, 2]")),
    ({"output_features": {"action": {"shape": [33]}}}, ("output_features.action.shape", "1 to 32", "33")),
])
def test_a_setting_that_cannot_be_is_named(tmp_path, changes, words):
    edit_json(save_lerobot(tmp_path) / "config.json", **changes)
    refusal(tmp_path, "config.json", *words)


@pytest.mark.parametrize(("text", "word"), [
    ("", "Expecting value"), ("{", "column"), ("[1]", "one JSON object"), ("\xff", "utf-8"),
    ("[" * 100_000, "recursion"),
])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text, word):
    (save_tiny(tmp_path) / "config.json").write_bytes(text.encode("latin-1"))
    refusal(tmp_path, "config.json", word)


def test_an_openpi_config_that_contradicts_the_tensors_is_refused(tmp_path):
    edit_json(save_tiny(tmp_path) / "config.json", pi05=False)
    refusal(tmp_path, "'pi05', as the tensors have", "'pi0'")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*LEROBOT_CONFIG, "depth", "vision_num_heads", "pi05"]), JSON, max_size=4))
def test_whatever_stands_in_config_json_only_our_errors_come_out(tmp_path, changes):
    save_lerobot(tmp_path) if not (tmp_path / WEIGHTS).exists() else None
    (tmp_path / "config.json").write_text(json.dumps(LEROBOT_CONFIG | changes))
    try:
        open_checkpoint(tmp_path)
    except Pi05Error as error:
        assert error.way_out
