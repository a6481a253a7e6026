"""Normalisation statistics and conventions of openpi's and lerobot's checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoint_samples import (
    FEATURES,
    NORM_MAP,
    NORMALIZER_FILE,
    UNNORMALIZER_FILE,
    WEIGHTS,
    edit_json,
    openpi_stats,
    refusal,
    save_lerobot,
    save_tiny,
    write_arrays,
    write_json,
    write_pipelines,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pi05_ros.errors import CheckpointError
from pi05_ros.model.checkpoint import open_checkpoint
from pi05_ros.model.norm_stats import constant_dimensions, read_openpi_stats
from pi05_ros.schema import Conventions, FieldStats

NAMES = ["l_shoulder", "l_elbow", "L_Gripper", "r_shoulder", "r_elbow", "r_gripper"]


def stats_file(directory, asset_id="robot"):
    return directory / "assets" / asset_id / "norm_stats.json"


# openpi


@pytest.mark.parametrize(("kind", "norm", "prompt"), [("pi05", "quantile", "pi05"), ("pi0", "zscore", "pi0")])
def test_openpis_statistics_and_conventions(tmp_path, kind, norm, prompt):
    checkpoint = open_checkpoint(save_tiny(tmp_path, kind, openpi_stats()))
    assert checkpoint.conventions == Conventions("openpi", "pil", norm, norm, prompt, None)
    assert checkpoint.stats_path == stats_file(tmp_path) and checkpoint.missing == ("tokenizer",)
    for field in ("state", "actions"):
        for name in ("mean", "std", "q01", "q99"):
            ours, theirs = (getattr(getattr(stats, field), name) for stats in (checkpoint.stats, openpi_stats()))
            np.testing.assert_array_equal(ours, theirs)
    assert checkpoint.stats.state.q01.dtype == np.float64


def test_a_model_trained_without_the_state_in_its_prompt_says_so(tmp_path):
    save_tiny(tmp_path, state_in_prompt=False)
    assert open_checkpoint(tmp_path).conventions.prompt_format == "pi0"
    edit_json(tmp_path / "config.json", discrete_state_input=...)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.conventions.prompt_format == "pi05" and "pi05_libero" in checkpoint.notes[0]


def test_without_statistics_they_are_reported_missing(tmp_path):
    checkpoint = open_checkpoint(save_tiny(tmp_path))
    assert checkpoint.stats is None and "statistics" in checkpoint.missing


def test_statistics_are_found_under_a_nested_asset_id_and_beside_the_parent(tmp_path):
    save_tiny(tmp_path / "run" / "ckpt", stats=openpi_stats(), asset_id="physical-intelligence/libero")
    (tmp_path / "run" / "ckpt" / "assets").rename(tmp_path / "run" / "assets")
    found = stats_file(tmp_path / "run", "physical-intelligence/libero")
    assert open_checkpoint(tmp_path / "run" / "ckpt").stats_path == found
    assert open_checkpoint(tmp_path / "run" / "ckpt" / WEIGHTS).stats_path == found
    assert open_checkpoint(tmp_path / "run" / "ckpt", asset_id="physical-intelligence/libero").stats_path == found


def test_of_several_assets_one_must_be_chosen(tmp_path):
    save_tiny(tmp_path, stats=openpi_stats(), asset_id="trossen")
    save_tiny(tmp_path, stats=openpi_stats(6), asset_id="lab/droid")
    error = refusal(tmp_path, "asset_id", "'trossen'", "'lab/droid'")
    assert error.cause == "asset_id"
    assert open_checkpoint(tmp_path, asset_id="lab/droid").stats.state.q01.shape == (6,)
    refusal(tmp_path, "assets/none", "'trossen'", asset_id="none")


@pytest.mark.parametrize(("kind", "name", "values", "words"), [
    ("pi05", "q01", None, ("q01", "quantile", "none")),
    ("pi0", "std", None, ("std", "zscore", "none")),
    ("pi05", "q99", [0.1] * 6, ("q99", "7 numbers", "6")),
    ("pi05", "mean", [], ("mean", "1 to 32")),
    ("pi05", "mean", [0.0] * 33, ("mean", "1 to 32", "33")),
    ("pi05", "mean", [0.0] * 6 + [float("nan")], ("mean", "finite", "NaN")),
    ("pi05", "mean", [0.0] * 6 + [10**400], ("mean", "finite")),
    ("pi05", "mean", [[0.0]] * 7, ("mean", "list of finite numbers")),
    ("pi05", "mean", "abc", ("mean", "list of finite numbers", "'abc'")),
    ("pi05", "std", [0.1] * 6 + [-0.5], ("std", "no negative", "-0.5 in dimension 6")),
    ("pi05", "q01", [-1.0, -1.0, 5.0, -1.0, -1.0, -1.0, -1.0], ("q01", "at most q99", "5 in dimension 2")),
])
def test_statistics_that_cannot_be_are_named(tmp_path, kind, name, values, words):
    save_tiny(tmp_path, kind, openpi_stats())
    content = json.loads(stats_file(tmp_path).read_text())
    content["norm_stats"]["actions"][name] = values
    write_json(stats_file(tmp_path), content)
    refusal(tmp_path, "norm_stats.json", "norm_stats.actions", *words)


@pytest.mark.parametrize(("content", "words"), [
    ({}, ("norm_stats",)), ({"norm_stats": {"state": {}}}, ("q01",)), ([], ("one JSON object",)),
    ({"norm_stats": {"state": {"q01": [0.0], "q99": [1.0]}}}, ("norm_stats.actions", "nothing")),
])
def test_a_statistics_file_of_another_form_is_refused(tmp_path, content, words):
    write_json(stats_file(save_tiny(tmp_path)), content)
    refusal(tmp_path, "norm_stats.json", *words)


NUMBER = st.floats() | st.integers() | st.none()
NUMBERS = st.none() | st.booleans() | st.text(max_size=2) | st.lists(NUMBER, max_size=3)
FIELD = st.dictionaries(st.sampled_from(["mean", "std", "q01", "q99"]), NUMBERS)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["state", "actions"]), FIELD | NUMBERS), st.sampled_from(["quantile", "zscore"]))
def test_whatever_stands_in_norm_stats_json_is_sound_or_refused(tmp_path, content, mode):
    write_json(tmp_path / "norm_stats.json", {"norm_stats": content})
    try:
        stats = read_openpi_stats(tmp_path / "norm_stats.json", mode)
    except CheckpointError as error:
        assert error.way_out
    else:
        assert np.isfinite(stats.state.q01 if mode == "quantile" else stats.state.mean).all()


def test_dimensions_that_never_moved_are_found():
    q01, q99 = np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 2.0])
    stats = FieldStats(mean=np.zeros(3), std=np.array([0.1, 0.0, 1.0]), q01=q01, q99=q99)
    assert constant_dimensions(stats, "quantile") == [0, 2]
    assert constant_dimensions(stats, "zscore") == [1]
    assert constant_dimensions(stats, "identity") == []


# lerobot


@pytest.mark.parametrize(("kind", "prompt"), [("pi05", "pi05"), ("pi0", "pi0_joined")])
def test_lerobots_statistics_and_conventions(tmp_path, kind, prompt):
    checkpoint = open_checkpoint(save_lerobot(tmp_path, kind))
    assert checkpoint.conventions == Conventions("lerobot", "bilinear", "quantile", "zscore", prompt, (False,) * 6)
    assert checkpoint.stats_path == tmp_path / NORMALIZER_FILE
    np.testing.assert_array_equal(checkpoint.stats.state.q99, np.arange(1, 8, dtype=np.float32) / np.float32(10))
    np.testing.assert_allclose(checkpoint.stats.actions.std, np.arange(1, 7) / 5, rtol=1e-6)
    assert checkpoint.stats.actions.mean.dtype == np.float32
    assert any("pi05_padded_state" in note for note in checkpoint.notes) == (kind == "pi05")


def test_what_is_applied_to_actions_is_the_postprocessors(tmp_path):
    save_lerobot(tmp_path)
    write_arrays(tmp_path, action__mean=torch.full((6,), 9.0))
    (tmp_path / UNNORMALIZER_FILE).rename(tmp_path / "kept")
    write_arrays(tmp_path)
    (tmp_path / "kept").replace(tmp_path / UNNORMALIZER_FILE)
    assert open_checkpoint(tmp_path).stats.actions.mean.tolist() == [9.0] * 6


def test_empty_features_mean_no_normalisation(tmp_path):
    save_lerobot(tmp_path)
    write_pipelines(tmp_path, features={})
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.conventions.state_norm, checkpoint.conventions.action_norm) == ("identity", "identity")
    assert "statistics" not in checkpoint.missing and "no normalisation" in checkpoint.notes[-1]


def test_without_pipelines_config_json_tells_the_modes(tmp_path):
    save_lerobot(tmp_path, normalization_mapping={"STATE": "MEAN_STD"})
    (tmp_path / "policy_preprocessor.json").unlink()
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.conventions.state_norm, checkpoint.conventions.action_norm) == ("zscore", "identity")
    assert checkpoint.stats is None and "statistics" in checkpoint.missing
    assert checkpoint.conventions.delta_actions is None


def test_a_normalizer_without_numbers_has_no_statistics(tmp_path):
    save_lerobot(tmp_path)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        steps = json.loads((tmp_path / name).read_text())["steps"]
        write_json(tmp_path / name, {"steps": [{k: v for k, v in s.items() if k != "state_file"} for s in steps]})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.stats is None and "statistics" in checkpoint.missing


@pytest.mark.parametrize(("excluded", "names", "mask"), [
    (["gripper"], NAMES, (True, True, False, True, True, False)),
    (["r_"], NAMES[:5], (True, True, True, False, False, True)),
    (["gripper"], None, (True,) * 6),
    ([], NAMES, (True,) * 6),
])
@pytest.mark.parametrize("step", ["relative_actions_processor", "delta_actions_processor"])
def test_relative_actions_name_the_dimensions_that_are_differences(tmp_path, step, excluded, names, mask):
    save_lerobot(tmp_path, use_relative_actions=True)
    write_pipelines(tmp_path, relative={"enabled": True, "exclude_joints": excluded, "action_names": names})
    file = tmp_path / "policy_preprocessor.json"
    file.write_text(file.read_text().replace("relative_actions_processor", step))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.conventions.delta_actions == mask
    assert not checkpoint.notes  # a checkpoint with that step is too young to have padded its prompt's state


def test_relative_actions_are_read_from_config_json_where_the_step_is_silent(tmp_path):
    save_lerobot(tmp_path, use_relative_actions=True, relative_exclude_joints=["elbow"], action_feature_names=NAMES)
    write_pipelines(tmp_path, relative={"enabled": True})
    assert open_checkpoint(tmp_path).conventions.delta_actions == (True, False, True, True, False, True)


def test_contradicting_or_unknown_settings_of_relative_actions_are_refused(tmp_path):
    save_lerobot(tmp_path, use_relative_actions=False)
    write_pipelines(tmp_path, relative={"enabled": True})
    refusal(tmp_path, "use_relative_actions", "policy_preprocessor.json")
    edit_json(tmp_path / "config.json", use_relative_actions=...)
    write_pipelines(tmp_path, relative={"enabled": True, "relative_joints_dim": 3})
    refusal(tmp_path, "policy_preprocessor.json", "relative_joints_dim")
    write_pipelines(tmp_path, relative={"enabled": True})
    edit_json(tmp_path / "config.json", output_features=...)
    refusal(tmp_path, "output_features.action.shape")


@pytest.mark.parametrize(("changed", "words"), [
    ({"eps": 1e-3}, ("eps", "1e-08", "0.001")),
    ({"norm_map": {"STATE": "MIN_MAX"}}, ("norm_map.STATE", "QUANTILES", "'MIN_MAX'")),
    ({"norm_map": []}, ("norm_map", "an object")),
    ({"features": {**FEATURES, "observation.state": {"shape": [8]}}}, ("observation.state.shape", "[7]", "[8]")),
])
def test_a_normalizer_that_is_not_implemented_is_refused(tmp_path, changed, words):
    save_lerobot(tmp_path)
    write_pipelines(tmp_path, **changed)
    refusal(tmp_path, "policy_preprocessor.json", *words)


@pytest.mark.parametrize(("arrays", "words"), [
    ({"observation__state__q99": None}, ("q99", "observation.state", "quantile")),
    ({f"observation__state__{k}": None for k in ("q01", "q99", "mean", "std")}, ("observation.state", "keys action.")),
    ({"action__std": torch.full((6,), -1.0)}, ("std", "'action'", "no negative")),
    ({"action__mean": torch.full((6,), torch.nan)}, ("mean", "'action'", "finite")),
    ({"action__mean": torch.zeros(5)}, ("std", "5 numbers", "6")),
    ({"observation__state__q01": torch.ones(7)}, ("q01", "at most q99", "dimension 0")),
])
def test_lerobots_statistics_that_cannot_be_are_named(tmp_path, arrays, words):
    write_arrays(save_lerobot(tmp_path), **arrays)
    refusal(tmp_path, ".safetensors", *words)


def test_absent_and_broken_statistics_files_are_refused(tmp_path):
    file = save_lerobot(tmp_path) / NORMALIZER_FILE
    file.write_bytes(file.read_bytes()[:-3])
    refusal(tmp_path, NORMALIZER_FILE, "safetensors", "download it again")
    file.unlink()
    refusal(tmp_path, "state_file", NORMALIZER_FILE, "Download")


def test_a_statistics_file_of_an_impossible_name_is_refused(tmp_path):
    file = save_lerobot(tmp_path) / "policy_preprocessor.json"
    file.write_text(file.read_text().replace(NORMALIZER_FILE, "x" * 300))
    refusal(tmp_path, "state_file", "not there")


@pytest.mark.parametrize(("steps", "words"), [
    ([], ("normalizer_processor", "0")), ({}, ("steps", "a list")), ([1], ("steps", "a list of objects")),
    ([{"registry_name": "my_scaler", "config": {}}], ("my_scaler", "a step this package knows")),
    ([{"registry_name": "normalizer_processor", "state_file": "../x", "config": {"features": FEATURES,
                                                                              "norm_map": NORM_MAP}}], ("../x",)),
])
def test_a_pipeline_of_another_form_is_refused(tmp_path, steps, words):
    write_json(save_lerobot(tmp_path) / "policy_preprocessor.json", {"steps": steps})
    refusal(tmp_path, "policy_preprocessor.json", *words)
