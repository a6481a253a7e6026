"""`pi05 inspect`: one table for a person, one JSON line for a program."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_samples import WEIGHTS, edit_json, edit_tensors, openpi_stats, save_lerobot, save_tiny

from pi05_ros.cli.main import main


@pytest.fixture
def inspect(capsys):
    """Runs the verb; returns the exit status, the JSON, and what a person reads."""

    def run(*words):
        status = main(["inspect", *map(str, words)])
        printed = capsys.readouterr()
        return status, json.loads(printed.out.splitlines()[-1]), printed.err

    return run


def test_a_whole_checkpoint_is_described(tmp_path, inspect):
    (save_tiny(tmp_path, stats=openpi_stats(), expert_lm_head=True) / "tokenizer.model").touch()
    status, data, text = inspect(tmp_path, "--check")
    assert status == 0 and data["ok"] and data["missing"] == [] and data["checked"]
    assert (data["kind"], data["layout"], data["action_horizon"], data["max_token_len"]) == ("pi05", "openpi", 10, 48)
    assert data["sizes"]["expert"]["width"] == 64 and data["stored_dtypes"] == {"float32": 112}
    assert data["parameters"]["used"] == sum(n for part, n in data["parameters"].items() if part != "used") == 820_632
    assert data["unused_bytes"] == 512 * 64 * 4
    assert data["statistics"]["state"] == {"norm": "quantile", "width": 7, "constant_dimensions": []}
    assert "820,632" in text and "action horizon" in text


def test_a_lerobot_checkpoint_is_described(tmp_path, inspect):
    status, data, text = inspect(save_lerobot(tmp_path))
    assert status == 0 and data["layout"] == "lerobot prefixed" and data["robot_action_dim"] == 6
    assert data["camera_keys"][:2] == ["observation.images.wrist", "observation.images.front"]
    assert data["conventions"]["action_norm"] == "zscore" and not data["checked"]
    assert "pi05_padded_state" in text.replace("\n", " ")


def test_what_options_can_give_is_missing_but_not_wrong(tmp_path, inspect):
    for asset_id in ("a", "b"):
        save_tiny(tmp_path, stats=openpi_stats(), asset_id=asset_id)
    edit_json(tmp_path / "config.json", action_horizon=...)
    status, data, text = inspect(tmp_path)
    assert status == 0 and data["missing"] == ["action_horizon", "asset_id", "tokenizer"]
    assert data["action_horizon"] is None and data["statistics"] is None and data["asset_ids"] == ["a", "b"]
    assert "--horizon" in text and "--asset-id" in text
    (tmp_path / "own.model").touch()
    options = ("--horizon", 16, "--asset-id", "b", "--tokenizer", tmp_path / "own.model")
    status, data, _ = inspect(tmp_path / WEIGHTS, *options)
    assert status == 0 and data["missing"] == [] and data["action_horizon"] == 16
    assert data["statistics"]["file"].endswith("assets/b/norm_stats.json")


def test_dimensions_that_never_moved_are_shown(tmp_path, inspect):
    stats = openpi_stats()
    stats.state.q01[3] = stats.state.q99[3]
    _, data, text = inspect(save_tiny(tmp_path, stats=stats))
    assert data["statistics"]["state"]["constant_dimensions"] == [3] and "[3]" in text


def test_a_nan_is_found_only_by_reading(tmp_path, inspect):
    edit_tensors(save_tiny(tmp_path), **{"action_in_proj.bias": torch.full((64,), torch.nan)})
    assert inspect(tmp_path)[0] == 0
    status, data, text = inspect(tmp_path, "--check")
    assert status == 1 and not data["ok"] and data["error"] == "CheckpointError"
    assert "action_in_proj.bias" in data["message"] and "64 NaN" in text


def test_a_broken_checkpoint_is_an_error_and_a_wrong_option_wrong_use(tmp_path, inspect):
    status, data, _ = inspect(tmp_path / "nowhere")
    assert status == 1 and "nowhere" in data["message"]
    assert inspect(save_tiny(tmp_path / "a"), "--horizon", 0)[0] == 2
