"""Opening checkpoints: every layout gives the same model, and every fault one clear error."""

from __future__ import annotations

import re

import pytest
import torch
from checkpoint_samples import (
    VISION_SEGMENT,
    WEIGHTS,
    edit_json,
    refusal,
    save_lerobot,
    save_tiny,
    tiny_model,
    tiny_tensors,
    write_json,
    write_tensors,
)
from safetensors.torch import save_file

from pi05_ros.config import Pi05Config, tiny_config
from pi05_ros.errors import CheckpointError, ConfigError
from pi05_ros.model.checkpoint import Checkpoint, open_checkpoint
from pi05_ros.model.checkpoint_sizes import model_sizes
from pi05_ros.model.json_fields import JsonFields
from pi05_ros.model.save import save_openpi
from pi05_ros.model.stored_tensors import StoredTensor
from pi05_ros.model.weights import EMBEDDING, OPENPI, TIED_EMBEDDING, UNUSED, expected_shapes, load, parameter_counts

QUERY = OPENPI + "paligemma.model.language_model.layers.0.self_attn.q_proj.weight"


def assert_same_model(checkpoint: Checkpoint, kind: str = "pi05") -> None:
    loaded, expected = load(checkpoint), tiny_model(kind)
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for (name, ours), theirs in zip(loaded.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


# Layouts


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_openpis_layout_gives_the_weights_and_sizes_back(tmp_path, kind):
    checkpoint = open_checkpoint(save_tiny(tmp_path, kind, expert_lm_head=True))
    assert checkpoint.config == tiny_config(kind=kind) and checkpoint.kind == kind
    assert checkpoint.layout == "openpi" and checkpoint.stored_dtypes == {"float32": 112 if kind == "pi05" else 107}
    assert [tensor.key for tensor in checkpoint.unused] == list(UNUSED)
    assert_same_model(checkpoint, kind)


def test_a_bfloat16_file_is_exact_because_the_recipe_is(tmp_path):
    checkpoint = open_checkpoint(save_tiny(tmp_path, dtype="bfloat16"))
    assert set(checkpoint.stored_dtypes) == {"bfloat16"}
    assert_same_model(checkpoint)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_lerobots_layouts_give_the_weights_and_settings(tmp_path, kind, prefix):
    checkpoint = open_checkpoint(save_lerobot(tmp_path, kind, prefix))
    assert checkpoint.config == tiny_config(kind=kind)
    assert checkpoint.layout == ("lerobot prefixed" if prefix else "lerobot")
    assert checkpoint.camera_keys == ("observation.images.wrist", "observation.images.front",
                                      "observation.images.empty_camera_0")
    assert (checkpoint.robot_action_dim, checkpoint.n_action_steps) == (6, 5)
    assert checkpoint.missing == ("tokenizer",)
    assert_same_model(checkpoint, kind)


@pytest.mark.parametrize(("config", "delay"), [({}, 0), ({"rtc_training_max_delay": 4}, 4)])
def test_what_delay_it_was_trained_with_is_known(tmp_path, config, delay):
    assert open_checkpoint(save_lerobot(tmp_path, **config)).rtc_training_max_delay == delay


def test_the_weight_file_itself_can_be_given(tmp_path):
    assert_same_model(open_checkpoint(save_tiny(tmp_path) / WEIGHTS))


def test_of_two_embeddings_the_untied_one_is_read(tmp_path):
    tensors = tiny_tensors()
    tensors[EMBEDDING] = tensors[TIED_EMBEDDING].clone()
    tensors[TIED_EMBEDDING] = torch.zeros_like(tensors[EMBEDDING])
    save_tiny(tmp_path)
    checkpoint = open_checkpoint(write_tensors(tmp_path, tensors))
    assert [tensor.key for tensor in checkpoint.unused] == [TIED_EMBEDDING]
    assert_same_model(checkpoint)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_without_the_vision_model_segment_are_understood(tmp_path, prefix):
    save_lerobot(tmp_path)
    tensors = {prefix + name.replace(VISION_SEGMENT, "vision_tower."): t for name, t in tiny_tensors().items()}
    assert_same_model(open_checkpoint(write_tensors(tmp_path, tensors)))


def test_a_sharded_checkpoint_is_one_model(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    tensors = sorted(tiny_tensors().items())
    shards = {"model-00001-of-00002.safetensors": tensors[:50], "model-00002-of-00002.safetensors": tensors[50:]}
    for file, part in shards.items():
        save_file({name: tensor.contiguous() for name, tensor in part}, tmp_path / file)
    names = {name: file for file, part in shards.items() for name, _ in part}
    write_json(tmp_path / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})
    assert_same_model(open_checkpoint(tmp_path))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refusal(tmp_path, "model-00002-of-00002.safetensors", "Download")


def test_a_full_size_model_has_the_published_names_and_counts():
    shapes = expected_shapes(Pi05Config())
    assert len(shapes) == 811 and len({*shapes, *UNUSED}) == 812
    assert shapes[EMBEDDING] == (257152, 2048) and shapes[QUERY] == (2048, 2048)
    counts = parameter_counts(Pi05Config())
    assert counts == {"vision": 412_442_352, "projector": 2_361_344, "prefix": 1_981_884_416,
                      "embedding": 526_647_296, "expert": 427_932_672, "heads": 2_165_792}
    assert sum(counts.values()) == 3_353_433_872


def test_the_published_sizes_need_no_config_json_and_lost_layers_show(tmp_path):
    nothing = JsonFields(tmp_path / "config.json")
    full = {name: StoredTensor(tmp_path, name, "bfloat16", tuple(shape))
            for name, shape in expected_shapes(Pi05Config()).items()}
    assert model_sizes(full, "pi05", nothing) == Pi05Config()
    for last in ("encoder.layers.26.", "language_model.layers.17.", "gemma_expert.model.layers.17."):
        with pytest.raises(CheckpointError, match=re.escape(last.rstrip("."))):
            model_sizes({name: t for name, t in full.items() if last not in name}, "pi05", nothing)


# Settings


def test_options_override_config_json(tmp_path):
    checkpoint = open_checkpoint(save_tiny(tmp_path), action_horizon=15, max_token_len=64, rope_inv_freq="bfloat16")
    assert checkpoint.config == tiny_config(action_horizon=15, max_token_len=64, rope_inv_freq="bfloat16")
    with pytest.raises(ConfigError, match="action_horizon"):
        open_checkpoint(tmp_path, action_horizon=0)
    with pytest.raises(ConfigError, match="rope_inv_freq"):
        open_checkpoint(tmp_path, rope_inv_freq="float16")


@pytest.mark.parametrize(("kind", "length"), [("pi05", 200), ("pi0", 48)])
def test_the_prompt_length_defaults_to_the_models_own(tmp_path, kind, length):
    edit_json(save_tiny(tmp_path, kind) / "config.json", max_token_len=...)
    assert open_checkpoint(tmp_path).config.max_token_len == length


def test_without_a_horizon_the_error_names_typical_ones_and_the_option_helps(tmp_path):
    edit_json(save_tiny(tmp_path) / "config.json", action_horizon=...)
    error = refusal(tmp_path, "action_horizon", "chunk_size", "50", "pi05_droid")
    assert error.cause == "action_horizon"
    assert open_checkpoint(tmp_path, action_horizon=16).config.action_horizon == 16


def test_without_config_json_the_heads_of_an_unpublished_vision_tower_are_unknown(tmp_path):
    (save_tiny(tmp_path) / "config.json").unlink()
    refusal(tmp_path, "vision_num_heads", "72", "config.json", action_horizon=10)


def test_a_tokenizer_is_found_beside_the_weights_or_given(tmp_path):
    save_tiny(tmp_path / "a")
    assert open_checkpoint(tmp_path / "a").tokenizer_path is None
    (tmp_path / "own.model").touch()
    assert open_checkpoint(tmp_path / "a", tokenizer=tmp_path / "own.model").tokenizer_path == tmp_path / "own.model"
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "a", tokenizer=tmp_path / "none.model")
    (tmp_path / "a" / "assets").mkdir()
    for name in ("assets/spiece.model", "x.model", "paligemma_tokenizer.model"):  # each is preferred to those before
        (tmp_path / "a" / name).touch()
        assert open_checkpoint(tmp_path / "a").tokenizer_path == tmp_path / "a" / name
    (tmp_path / "a" / "paligemma_tokenizer.model").unlink()
    (tmp_path / "a" / "y.model").touch()
    refusal(tmp_path / "a", "x.model, y.model", "tokenizer option")


# Saving


def test_saving_refuses_what_the_loader_would(tmp_path):
    tensors = {**tiny_tensors(), EMBEDDING: tiny_tensors()[TIED_EMBEDDING]}
    del tensors[TIED_EMBEDDING], tensors[QUERY]
    with pytest.raises(CheckpointError, match=re.escape(QUERY)):
        save_openpi(tensors, tmp_path, tiny_config())
    with pytest.raises(CheckpointError, match="24576 NaN"):
        save_openpi({**tensors, QUERY: torch.full((256, 96), torch.nan)}, tmp_path, tiny_config())
    assert not list(tmp_path.iterdir())


def test_saving_over_a_checkpoint_leaves_an_open_one_readable(tmp_path):
    checkpoint = open_checkpoint(save_tiny(tmp_path))
    before = checkpoint.get(QUERY, torch.Size([256, 96]), torch.device("cpu"))
    save_openpi({**{k: torch.zeros(s) for k, s in expected_shapes(tiny_config()).items()}}, tmp_path, tiny_config())
    assert torch.equal(before, tiny_tensors()[QUERY])
    assert not open_checkpoint(tmp_path).get(QUERY, torch.Size([256, 96]), torch.device("cpu")).any()
