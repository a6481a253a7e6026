"""Validation must not fool itself: what did not change or did not run fails it."""

import json

import pytest
import torch
from toy_episodes import one_thread  # noqa: F401 (a fixture)

from pi05_ros.cli.main import main
from pi05_ros.config import tiny_config
from pi05_ros.errors import CheckpointError, ConfigError
from pi05_ros.model.quantised_linear import QuantisedLinear
from pi05_ros.model.recipe import RecipeSource
from pi05_ros.model.weights import load
from pi05_ros.quantize.calibration import calibrate
from pi05_ros.quantize.layer_errors import relative
from pi05_ros.quantize.outliers import OutlierSource
from pi05_ros.quantize.ptq import maxima, quantise, quantised_model, with_layers
from pi05_ros.quantize.recipes import GROUPS, LARGE, RECIPES, assign, linear_names, unread_layers
from pi05_ros.quantize.samples import synthetic
from pi05_ros.quantize.sensitivity import actions, calibration_effects, group_effects
from pi05_ros.quantize.validate import STAGES, compare
from pi05_ros.train.presets import smallest

CONFIG = smallest(4, 512)


@pytest.fixture(scope="module")
def model():
    return load(RecipeSource(CONFIG))


@pytest.fixture(scope="module")
def samples():
    return synthetic(CONFIG, 2, seed=3)


@pytest.fixture(scope="module")
def statistics(model):
    return calibrate(model, synthetic(CONFIG, 4, seed=0), {}, batch=2)


def test_what_is_compared(model, samples, statistics):
    quantised = quantised_model(model, RECIPES["balanced"], statistics)
    found = compare(model, quantised, samples, 3)
    assert not found.idle and not found.unchanged
    assert found.runs == {"simulated": len(linear_names(model)) - 10 - len(unread_layers(CONFIG))}
    for stage in STAGES:
        assert 1e-4 < found.largest(stage) < 0.4 and found.largest(stage, "one_minus_cosine") < 0.1
    assert len(found.steps) == 2 and all(len(steps) == 3 for steps in found.steps)
    expected = [relative(a, b) for a, b in zip(actions(quantised, samples, 3), actions(model, samples, 3), strict=True)]
    assert [one.relative for one in found.stages["actions"]] == pytest.approx(expected)
    assert [steps[-1].relative for steps in found.steps] == pytest.approx(expected)
    worst = found.layers[found.worst_layer].output
    assert all((one.output or 0) <= worst for one in found.layers.values()) and worst > 0.02


def test_a_stage_alone_is_blamed_for_itself(model, samples, statistics):
    names = {name: "nvfp4" for name in linear_names(model) if name.startswith("action_expert") and "proj" in name}
    quantised = with_layers(model, quantise(model, names, maxima(model, names, statistics)))
    found = compare(model, quantised, samples, 2)
    assert found.largest("vision") == found.largest("keys") == found.largest("values") == 0
    assert found.largest("expert") == found.largest("actions") > 0.01


def test_layers_that_did_not_change_or_run_are_named(model, samples, statistics, monkeypatch):
    quantised = quantised_model(model, RECIPES["fp8_mlp"], statistics)
    name = "language_model.layers.0.mlp.up_proj"
    layer = quantised.get_submodule(name)
    same = with_layers(model, {})  # a reference whose weights are the quantised ones already
    same.get_submodule(name).weight = torch.nn.Parameter(layer.dequantised(), requires_grad=False)
    assert compare(same, quantised, samples[:1], 1).unchanged == [name]
    monkeypatch.setattr(type(layer), "forward", lambda self, x: x @ self.dequantised().T)  # a fallback, uncounted
    found = compare(model, quantised, samples[:1], 1)
    assert name in found.idle and len(found.idle) == 3 and not found.runs


def test_only_a_pair_is_compared(model, samples, statistics):
    quantised = quantised_model(model, RECIPES["fp8_mlp"], statistics)
    with pytest.raises(CheckpointError, match="two without"):
        compare(model, model, samples, 1)
    with pytest.raises(CheckpointError, match="quantised reference"):
        compare(quantised, quantised, samples, 1)
    with pytest.raises(CheckpointError, match="one size"):
        compare(load(RecipeSource(tiny_config())), quantised, samples, 1)


@pytest.mark.parametrize("config", [CONFIG, smallest(4, 512).__class__(**{**CONFIG.__dict__, "kind": "pi0"})],
                         ids=["pi05", "pi0"])
def test_outliers_change_the_activations_and_not_the_actions(config):
    plain, outlying = (load(source) for source in (RecipeSource(config), OutlierSource(RecipeSource(config), 32.0)))
    few = synthetic(config, 1, seed=0)
    assert relative(actions(outlying, few, 2)[0], actions(plain, few, 2)[0]) < 1e-5
    before, after = (calibrate(one, few, {}, 1) for one in (plain, outlying))
    for name in ("vision_tower.encoder.layers.0.mlp.fc1", "language_model.layers.0.self_attn.q_proj",
                 "language_model.layers.0.mlp.down_proj", "action_expert.layers.1.mlp.gate_proj",
                 "action_expert.layers.0.mlp.down_proj", "action_expert.layers.0.self_attn.v_proj"):
        assert after.input_amax(name) > 2 * before.input_amax(name), name
        assert after.layers[name].root_mean_square < 8 * before.layers[name].root_mean_square
    with pytest.raises(ConfigError, match="power of two"):
        OutlierSource(RecipeSource(config), 30.0)


def test_groups_alone_and_calibrations(model, samples, statistics):
    groups = group_effects(model, statistics, samples[:1], 1, ("fp8", "nvfp4"))
    assert tuple(groups) == LARGE
    for of in groups.values():
        assert 0 < of["fp8"].worst < of["nvfp4"].worst and 0 < of["fp8"].saved_bytes < of["nvfp4"].saved_bytes
    weights = sum(model.get_submodule(name).weight.numel() for name in linear_names(model) if "language_model" in name
                  and ".mlp." in name)
    assert groups["prefix MLP"]["fp8"].saved_bytes == weights
    table = calibration_effects(model, RECIPES["fp8"], {"synthetic": statistics}, (1, 4, 8), samples[:1], 1)
    assert set(table) == {("synthetic", 1), ("synthetic", 4)}  # there are no 8
    assert table["synthetic", 4][1] == 0 < table["synthetic", 1][1] <= 1 and table["synthetic", 4][0].worst > 0
    assert GROUPS


WORDS = ["validate-quantized", "--recipe", "fp8_mlp", "--device", "cpu", "--samples", "1", "--count", "1", "--steps",
         "1"]


def test_the_command_judges_by_gates(capsys):
    assert main([*WORDS, "--outliers", "32"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["simulated"] and report["outliers"] == 32 and "simulated" in report["runs_as"]
    assert all(gate["ok"] for gate in report["gates"]) and report["worst_layer"].startswith("language_model")
    assert main([*WORDS, "--max-error", "1e-6"]) == 1
    failed = [gate for gate in json.loads(capsys.readouterr().out.splitlines()[-1])["gates"] if not gate["ok"]]
    assert [gate["name"] for gate in failed] == ["largest relative error of the actions"]


def test_a_backend_is_judged_by_its_own_word_and_its_own_actions(capsys, monkeypatch):
    """One that does not say how layers ran fails, and one that says it multiplies many of them in a wider form."""
    from pi05_ros.backends.eager import EagerStages

    words, mlps = [*WORDS, "--backend", "prefix=eager"], [
        name for name in assign(RECIPES["fp8_mlp"], linear_names(load(RecipeSource(tiny_config()))))
        if not name.startswith("language_model.layers.2.")]  # nobody reads the last layer's

    def failed():
        assert main(words) in (0, 1)
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert report["backend"] == "prefix=eager" and all(len(of) == 1 for of in report["stages"].values())
        return {gate["name"]: gate["value"] for gate in report["gates"] if not gate["ok"]}, report["runs"]

    simulated = "share of the quantised weights not multiplied in FP8"
    assert failed() == ({simulated: 1.0}, {"simulated": len(mlps)})  # eager, on a CPU
    monkeypatch.setattr(EagerStages, "runs", {})
    assert failed() == ({"quantised layers that did not run": len(mlps)}, {})
    monkeypatch.setattr(EagerStages, "runs", dict.fromkeys(mlps, "FP8"))
    assert failed() == ({}, {"FP8": len(mlps)})
    EagerStages.runs[mlps[0]] = "bfloat16, weights from FP8"
    assert failed()[0] == {simulated: pytest.approx(1 / len(mlps))}
    words += ["--allow-wider", str(1.1 / len(mlps))]
    assert failed()[0] == {}


def test_the_command_fails_where_nothing_was_quantised(monkeypatch):
    """A Linear that calls itself quantised and multiplies as before fails, however small its error."""
    monkeypatch.setattr(QuantisedLinear, "forward", lambda self, x: x @ self.dequantised().T.to(x.dtype))
    assert main(WORDS) == 1


@pytest.mark.parametrize("words", [[], ["--recipe", "fp8", "somewhere"], ["--recipe", "fp8", "--episodes", "2"],
                                   ["--recipe", "fp8", "--observations", "video:x"],
                                   ["--recipe", "fp8", "--observations", "bag:x"]])
def test_wrong_use_exits_with_2(words, capsys):
    assert main(["validate-quantized", "--device", "cpu", *words]) == 2
    assert "expected" in json.loads(capsys.readouterr().out.splitlines()[-1])["message"]


def test_sensitivity_prints_both_tables(capsys):
    assert main(["sensitivity", "--device", "cpu", "--samples", "1,2", "--count", "1", "--steps", "1"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report["groups"]) == set(LARGE) and [row["samples"] for row in report["calibration"]] == [1, 2]


def test_recipes_hold_their_own_gates_with_outliers(samples):
    source = OutlierSource(RecipeSource(CONFIG), 32.0)
    model = load(source)
    statistics = calibrate(model, synthetic(CONFIG, 4, seed=0), {}, batch=2)
    for recipe in RECIPES.values():
        assert assign(recipe, linear_names(model))
        found = compare(model, quantised_model(model, recipe, statistics), samples, 2)
        assert found.largest("actions") <= recipe.max_error
        assert found.largest("actions", "one_minus_cosine") <= 1 - recipe.min_cosine
