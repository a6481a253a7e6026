"""Our forward against recorded runs of the reference implementation: actions and every intermediate."""

from pathlib import Path

import numpy as np
import pytest

from pi05_ros.benchmark import conformance
from pi05_ros.errors import ConfigError
from pi05_ros.model import weights
from pi05_ros.model.recipe import RecipeSource
from pi05_ros.model.save import save_openpi

FILES = sorted((Path(__file__).parents[1] / "data" / "conformance").glob("*.npz"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_reproduces_the_recorded_run(path):
    results = conformance.compare(path)
    assert len(results) >= 8
    assert [r for r in results if not r.ok] == []


def test_compares_every_tensor_that_is_recorded():
    path = next(p for p in FILES if p.stem == "pi05_tiny_float32_case_b_steps3")
    compared = {r.name for r in conformance.compare(path)}
    recorded = {key.removeprefix("out/") for key in conformance.read_case(path).arrays if key.startswith("out/")}
    not_values = {"stride_tok_dim", "prefix_pad_masks", "kv_dtype", "kv_shape"}
    assert recorded - compared == not_values | {"prefix_out"}  # nothing reads prefix_out, so we do not compute it


def test_a_changed_answer_is_found(tmp_path):
    path = next(p for p in FILES if p.stem == "pi05_tiny_float32_case_a_steps3")
    arrays = dict(conformance.read_case(path).arrays)
    arrays["out/actions"] = arrays["out/actions"] * np.float32(1.0001)
    np.savez(tmp_path / path.name, **arrays)
    assert [r.name for r in conformance.compare(tmp_path / path.name) if not r.ok] == ["actions"]


def test_refuses_a_file_of_another_layout(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ConfigError, match="expected the key 'meta'"):
        conformance.compare(tmp_path / "other.npz")


def test_recorded_weights_given_as_a_file_take_the_place_of_the_recipe(tmp_path):
    path = next(p for p in FILES if p.stem == "pi05_tiny_float32_case_a_steps3")
    config = conformance.case_config(conformance.read_case(path))
    right = save_openpi(weights.load(RecipeSource(config)), tmp_path / "right", config)
    wrong = save_openpi(weights.load(RecipeSource(config, seed=1)), tmp_path / "wrong", config)
    assert all(r.ok for r in conformance.compare(path, right))
    assert not any(r.ok for r in conformance.compare(path, wrong) if r.name == "actions")
