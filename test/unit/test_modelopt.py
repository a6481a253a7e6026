"""ModelOpt quantises what the recipe says, and its largest absolute values are ours."""

import json

import pytest
import torch
from toy_episodes import one_thread  # noqa: F401 (a fixture)

mtq = pytest.importorskip("modelopt.torch.quantization", reason="ModelOpt is not installed (250 MB with what it needs)")

from pi05_ros.cli.main import main  # noqa: E402
from pi05_ros.model.recipe import RecipeSource  # noqa: E402
from pi05_ros.model.weights import load  # noqa: E402
from pi05_ros.quantize import calibration  # noqa: E402
from pi05_ros.quantize.calibration import calibrate  # noqa: E402
from pi05_ros.quantize.modelopt import configuration, modelopt_maxima  # noqa: E402
from pi05_ros.quantize.ptq import maxima, quantise, with_layers  # noqa: E402
from pi05_ros.quantize.recipes import RECIPES, assign, linear_names  # noqa: E402
from pi05_ros.quantize.samples import synthetic  # noqa: E402
from pi05_ros.train.presets import smallest  # noqa: E402

CONFIG = smallest(4, 512)


@pytest.fixture(scope="module")
def model():
    return load(RecipeSource(CONFIG))


@pytest.fixture(scope="module")
def samples():
    return synthetic(CONFIG, 2, seed=0)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_both_find_the_same(model, samples, recipe):
    chosen = assign(recipe, linear_names(model))
    theirs, statistics = modelopt_maxima(model, recipe, chosen, lambda running: calibrate(running, samples, {}, 1))
    ours = maxima(model, chosen, statistics)
    for name in chosen:
        assert torch.equal(theirs[name].weight, ours[name].weight)
        assert theirs[name].input == ours[name].input
    assert not hasattr(model.language_model.layers[0].mlp.up_proj, "weight_quantizer")  # the model is left alone


def test_the_weights_are_modelopts_own(model, samples):
    """Its simulated FP8 weights, and its inputs' range, are those of our file, layer by layer."""
    recipe = RECIPES["fp8"]
    chosen = assign(recipe, linear_names(model))
    found, _ = modelopt_maxima(model, recipe, chosen, lambda running: calibrate(running, samples, {}, 1))
    layers = quantise(model, chosen, found)
    theirs = mtq.quantize(load(RecipeSource(CONFIG)), configuration(recipe),
                          lambda running: calibrate(running, samples, {}, 1))
    for name, layer in layers.items():
        linear = theirs.get_submodule(name)
        if name.endswith(("q_proj", "k_proj", "v_proj")):  # we give them one scale, of the largest
            three = [theirs.get_submodule(f"{name[:-6]}{one}_proj").weight.abs().max() for one in "qkv"]
            linear.weight_quantizer.amax = torch.stack(three).max()
        mine, its = layer.dequantised(), linear.weight_quantizer(linear.weight.float())
        # It multiplies by a rounded reciprocal where we divide: numbers half way between two may go either way.
        other = (mine - its).abs() > 1e-6 * its.abs()
        assert other.float().mean() < 0.03 and ((mine - its).abs()[other] <= 0.126 * mine.abs()[other]).all()
        if layer.input_scale is not None:
            assert linear.input_quantizer.amax.item() / 448 == pytest.approx(layer.input_scale.item(), rel=1e-6)
    assert with_layers(model, layers)


def test_a_resumed_calibration_keeps_what_ran_before(model, samples, tmp_path, monkeypatch):
    recipe, file = RECIPES["fp8_mlp"], tmp_path / "c.safetensors"
    chosen = assign(recipe, linear_names(model))
    calibrate(model, samples, {}, 1, file=file)
    passes = []
    monkeypatch.setattr(calibration, "forward", lambda *_: passes.append(1))
    found, statistics = modelopt_maxima(model, recipe, chosen,
                                        lambda running: calibrate(running, samples, {}, 1, file=file))
    assert not passes and {n: a.input for n, a in found.items()} == {
        n: a.input for n, a in maxima(model, chosen, statistics).items()}


def test_the_command_by_modelopt(tmp_path, capsys):
    words = ["quantize", "--recipe", "balanced", "--samples", "1", "--device", "cpu", "--output", str(tmp_path / "q")]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["quantiser"].startswith("nvidia-modelopt")
    assert main(["validate-quantized", str(tmp_path / "q"), "--device", "cpu", "--count", "1", "--steps", "1"]) == 0
