"""Calibration, quantisation, and the checkpoint it leaves."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_episodes import TOY, one_thread, record  # noqa: F401 (one_thread is a fixture)

from pi05_ros.backends.cuda.quantised import check_quantisation
from pi05_ros.cli.main import main
from pi05_ros.config import tiny_config
from pi05_ros.errors import BackendError, CheckpointError, ConfigError
from pi05_ros.model.checkpoint import open_checkpoint
from pi05_ros.model.quantised_linear import quantised_linears
from pi05_ros.model.recipe import RecipeSource
from pi05_ros.model.weights import load
from pi05_ros.quantize import calibration
from pi05_ros.quantize.calibration import Statistics, calibrate
from pi05_ros.quantize.layer_errors import layer_errors
from pi05_ros.quantize.ptq import described, maxima, quantise, with_layers
from pi05_ros.quantize.recipes import RECIPES, assign, linear_names, unread_layers
from pi05_ros.quantize.recorded import dataset_samples, transforms_for
from pi05_ros.quantize.samples import batches, synthetic
from pi05_ros.quantize.save import save_quantised
from pi05_ros.quantize.sensitivity import actions
from pi05_ros.runtime.policy import Policy
from pi05_ros.schema import Observation
from pi05_ros.train.presets import smallest

CONFIG = replace(smallest(4, 512), max_token_len=24)
MADE = {"observations": "synthetic", "seed": 0}


@pytest.fixture(scope="module")
def source():
    return RecipeSource(CONFIG)


@pytest.fixture(scope="module")
def model(source):
    return load(source)


@pytest.fixture(scope="module")
def samples():
    return synthetic(CONFIG, 4, seed=0)


@pytest.fixture(scope="module")
def statistics(model, samples):
    return calibrate(model, samples, MADE, batch=2)


def quantised(model, statistics, name="balanced"):
    chosen = assign(RECIPES[name], linear_names(model))
    return quantise(model, chosen, maxima(model, chosen, statistics))


@pytest.fixture(scope="module")
def written(source, model, statistics, tmp_path_factory):
    """(directory, layers) of a quantised checkpoint in every precision but fp8_token."""
    directory, layers = tmp_path_factory.mktemp("quantised"), quantised(model, statistics)
    save_quantised(source, model, layers, described(RECIPES["balanced"], layers, "test", MADE), directory)
    return directory, layers


def test_statistics_are_of_every_layer_that_runs_and_of_each_observation(model, samples, statistics):
    for name, layer in statistics.layers.items():
        assert (layer.count == 0) == (name in unread_layers(CONFIG))
    seen = []
    handle = model.language_model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    alone = calibrate(model, samples[2:3], MADE, batch=1)
    handle.remove()
    name = "language_model.layers.0.mlp.down_proj"
    assert alone.input_amax(name).item() == seen[0].abs().max().item()
    assert alone.layers[name].root_mean_square == pytest.approx(seen[0].square().mean().sqrt().item(), rel=1e-5)
    assert statistics.layers[name].sample_amax[2].item() == pytest.approx(alone.input_amax(name).item(), rel=1e-5)
    assert statistics.layers[name].sample_amax.max() == statistics.layers[name].channel_amax.max()
    assert statistics.input_amax(name, 1) <= statistics.input_amax(name)


def test_batches_have_no_padding(samples):
    for indices, part in batches(samples + samples, 3):
        assert len({one.inputs.tokens.shape for one in part}) == 1 and len(indices) <= 3
        assert all(one.inputs.token_mask.all() for one in part)


def test_an_interrupted_calibration_goes_on(model, samples, statistics, tmp_path, monkeypatch):
    file, run, passes = tmp_path / "c.safetensors", calibration.forward, []

    def interrupted(*args):
        if len(passes) == 2:
            raise KeyboardInterrupt
        passes.append(1)
        run(*args)

    monkeypatch.setattr(calibration, "SAVE_EVERY", 1)
    monkeypatch.setattr(calibration, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, samples, MADE, 1, file=file)
    monkeypatch.setattr(calibration, "forward", lambda *args: (passes.append(1), run(*args)))
    resumed = calibrate(model, samples, MADE, 1, file=file)
    assert len(passes) == len(samples)
    for name, layer in resumed.layers.items():
        assert layer.sample_amax.tolist() == pytest.approx(statistics.layers[name].sample_amax.tolist(), rel=1e-5)
        assert layer.count == statistics.layers[name].count
    again = calibrate(model, samples, MADE, 1, file=file)  # nothing left to run
    assert len(passes) == len(samples) and again.layers.keys() == resumed.layers.keys()
    with pytest.raises(ConfigError, match="seed"):
        calibrate(model, samples, {**MADE, "seed": 1}, 1, file=file)
    with pytest.raises(CheckpointError, match="another model"):
        calibrate(load(RecipeSource(CONFIG, seed=1)), samples, MADE, 1, file=file)
    with pytest.raises(CheckpointError, match="66"):
        Statistics.read(file).check_model(load(RecipeSource(tiny_config())))
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="quantize"):
        Statistics.read(file)


def test_no_calibration_and_nan_are_refused(model, samples, statistics):
    with pytest.raises(ConfigError, match="at least one observation"):
        calibrate(model, [], MADE, 1)
    with pytest.raises(ConfigError, match="at least one forward pass"):
        quantised(model, Statistics.empty(model, MADE, 1))
    hurt = load(RecipeSource(CONFIG))
    hurt.language_model.layers[0].mlp.gate_proj.weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="finite activations"):
        quantised(hurt, calibrate(hurt, samples[:1], MADE, 1))
    with pytest.raises(CheckpointError, match="finite numbers above 0"):
        quantised(hurt, statistics)


@pytest.mark.parametrize("name", RECIPES)
def test_the_file_gives_the_actions_of_the_model_in_memory(source, model, statistics, samples, name, tmp_path):
    layers = quantised(model, statistics, name)
    save_quantised(source, model, layers, described(RECIPES[name], layers, "test", MADE), tmp_path)
    opened = open_checkpoint(tmp_path)
    loaded = load(opened)
    assert opened.quantisation.recipe == name and opened.config == CONFIG
    assert quantised_linears(loaded).keys() == layers.keys()
    expected = actions(with_layers(model, layers), samples[:1], 2)[0]
    assert torch.equal(actions(loaded, samples[:1], 2)[0], expected)
    assert not torch.equal(actions(model, samples[:1], 2)[0], expected)
    assert ("NVFP4" in opened.quantisation.summary().upper()) == (name in ("balanced", "nvfp4"))


def test_layers_that_are_merged_share_a_weight_scale(model, statistics):
    layers = quantised(model, statistics)
    at = "language_model.layers.0.self_attn."
    most = max(model.get_submodule(f"{at}{name}_proj").weight.abs().max() for name in "qkv")
    for name in "qkv":
        assert layers[f"{at}{name}_proj"].weight_scale.item() == pytest.approx(most.item() / 448)
    own = [model.get_submodule(f"{at}{name}_proj").weight.abs().max().item() / 448 for name in "qo"]
    assert layers[f"{at}o_proj"].weight_scale.item() == pytest.approx(own[1])
    token = quantised(model, statistics, "fp8_token")[f"{at}q_proj"].weight_scale
    assert token.shape == (len(layers[f"{at}q_proj"].weight), 1) and token.max().item() == pytest.approx(own[0])


def test_errors_of_layers_are_of_the_layers_own_inputs(model, statistics, samples):
    layers = quantised(model, statistics)
    errors = layer_errors(model, layers, samples[:1])
    assert {name for name, one in errors.items() if one.output is None} == unread_layers(CONFIG)
    assert all(1e-3 < one.output < 0.25 for one in errors.values() if one.output is not None)
    assert all(1e-3 < one.weight < 0.2 for one in errors.values())


LAYER = "language_model.layers.0.mlp.up_proj"
STORED = f"paligemma_with_expert.paligemma.model.{LAYER}"


def changed(directory, tmp_path, change):
    """A copy of the checkpoint with its tensors and layers changed; opened and loaded."""
    shutil.copytree(directory, tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    config = json.loads((tmp_path / "copy" / "quant_config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "copy" / "model.safetensors")
    (tmp_path / "copy" / "quant_config.json").write_text(json.dumps(config))
    return load(open_checkpoint(tmp_path / "copy"))


def as_embedding(tensors, config):
    """A quantised token embedding, which no recipe makes."""
    table = tensors.pop("paligemma_with_expert.paligemma.lm_head.weight")
    name = "paligemma_with_expert.paligemma.model.language_model.embed_tokens"
    tensors |= {f"{name}.weight": table.to(torch.float8_e4m3fn), f"{name}.weight_scale": torch.ones(1)}
    config["layers"]["language_model.embed_tokens"] = {"precision": "fp8", "shape": list(table.shape),
                                                       "weight_scale": 1.0, "input_scale": None}


def set_scale(value, leaf="weight_scale_2"):
    return lambda tensors, config: tensors[f"{STORED}.{leaf}"].fill_(value)


@pytest.mark.parametrize(("change", "message"), [
    (set_scale(float("nan")), "NaN"), (set_scale(0.5), "another model"), (set_scale(-1.0), "above 0"),
    (set_scale(float("inf"), "input_scale"), "infinite"), (set_scale(0.5, "input_scale"), "another model"),
    (lambda tensors, config: tensors.pop(f"{STORED}.input_scale"), "no such tensor"),
    (lambda tensors, config: tensors.update({f"{STORED}.weight": torch.zeros(128, 64)}), "expected uint8"),
    (lambda tensors, config: config["layers"].pop(LAYER), "no layer of this name"),
    (lambda tensors, config: config["layers"][LAYER].update(shape=[128, 32]), "shape"),
    (lambda tensors, config: config["layers"][LAYER].update(precision="int3"), "fp8 or"),
    (lambda tensors, config: config["layers"][LAYER].update(weight_scale="1"), "number"),
    (lambda tensors, config: config.update(layers={"elsewhere": config["layers"][LAYER]}), "no such tensor"),
    (lambda tensors, config: as_embedding(tensors, config), "a Linear of the model"),
    (lambda tensors, config: config.update(format=2), "format"),
    (lambda tensors, config: config.update(layers={}), "at least one layer"),
])
def test_a_quantised_checkpoint_that_is_not_whole_is_refused(written, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        changed(written[0], tmp_path, change)


def test_without_its_quant_config_it_is_refused_and_no_other_backend_takes_it(written, tmp_path):
    shutil.copy(written[0] / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="quant_config.json"):
        open_checkpoint(tmp_path, action_horizon=4)
    with pytest.raises(BackendError, match="simulated"):
        check_quantisation(open_checkpoint(written[0]).quantisation, CONFIG, ["vision", "prefix", "expert"], (9, 0))


def test_a_checkpoint_keeps_its_files_and_a_policy_says_how_it_runs(tmp_path):
    """As a user does: a checkpoint, quantised by the command, loaded by the ordinary loader, and run."""
    from test_train import FEW, train

    data = record(tmp_path / "data")
    train(data, tmp_path / "trained", replace(FEW, steps=2))
    words = ["--samples", "2", "--by", "max", "--device", "cpu", "--recipe", "fp8", "--checkpoint",
             str(tmp_path / "trained")]
    assert main(["quantize", *words, "--output", str(tmp_path / "fp8")]) == 0
    summary = json.loads((tmp_path / "fp8" / "summary.json").read_text())
    assert summary["calibration"]["samples"] == 2 and summary["coverage"]["recipe"] == "fp8"
    assert summary["worst_layer"] in summary["layers"]
    policy = Policy.load(tmp_path / "fp8", TOY)
    assert "recipe fp8" in policy.summary() and "simulated" in policy.summary()
    seen = Observation({"base_0_rgb": np.full((56, 56, 3), 90, np.uint8)}, np.zeros(2, np.float32), "go left")
    before = Policy.load(tmp_path / "trained", TOY).infer(seen, 2, chunk_index=0)
    after = policy.infer(seen, 2, chunk_index=0)
    assert 0 < np.abs(before.normalised - after.normalised).max() < 0.5
    # A recipe more without a forward pass, from the statistics of the first.
    again = [*words[:-4], "--recipe", "fp8_mlp", *words[-2:], "--calibration",
             f"activations:{tmp_path / 'fp8' / 'calibration.safetensors'}"]
    assert main(["quantize", *again, "--output", str(tmp_path / "mlp")]) == 0
    assert main(["quantize", *words, "--output", str(tmp_path / "trained")]) == 2  # onto itself
    assert main(["quantize", *words[:-1], str(tmp_path / "fp8"), "--output", str(tmp_path / "twice")]) == 2


def test_recorded_episodes_are_encoded_as_at_inference(tmp_path):
    data = record(tmp_path / "data")
    transforms = transforms_for(RecipeSource(CONFIG), TOY)
    found = dataset_samples(data, transforms, 5, seed=0)
    few = dataset_samples(data, transforms, 2, seed=0)
    assert [one.inputs.state.tolist() for one in found[:2]] == [one.inputs.state.tolist() for one in few]
    for one in found:
        assert one.actions.shape == (1, 4, 32) and one.actions[0, :, :2].any() and not one.actions[0, :, 2:].any()
        assert 0.001 <= one.time <= 1 and one.inputs.token_mask.all()
    with pytest.raises(ConfigError, match="at most 48"):
        dataset_samples(data, transforms, 49, seed=0)
