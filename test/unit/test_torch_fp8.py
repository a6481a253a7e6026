"""Layers in FP8 in torch.export programs: rounded by ModelOpt's operator as they are in eager, and what is refused."""

import sys

import pytest
import torch

from pi05_ros.backends.tensorrt.programs import ExportOptions, stage_program
from pi05_ros.backends.torch_tensorrt.compile import products
from pi05_ros.backends.torch_tensorrt.fp8 import RoundedLinear, round_linears
from pi05_ros.backends.torch_tensorrt.program_files import open_program, write
from pi05_ros.config import tiny_config
from pi05_ros.errors import BackendError
from pi05_ros.model.quantised_linear import QuantisedLinear
from pi05_ros.model.recipe import RecipeSource

OPTIONS, AMAX = ExportOptions(tokens=48), torch.tensor([6.0])


def prefix(precision="fp8", calibrated=True):
    """The stage with the products of its first MLPs quantised."""
    stage = stage_program("prefix", RecipeSource(tiny_config()), OPTIONS)
    for path, linear in list(stage.module.named_modules()):
        if ".mlp." in path and not linear.weight.is_meta:
            parent, _, leaf = path.rpartition(".")
            amax = linear.weight.abs().amax(1, keepdim=True) if precision == "fp8_token" else linear.weight.abs().max()
            setattr(stage.module.get_submodule(parent), leaf, QuantisedLinear.of(
                linear, precision, amax.reshape(-1, 1) if precision == "fp8_token" else amax.reshape(1),
                AMAX if calibrated else None))
    return stage


def test_a_program_rounds_as_the_model_does(tmp_path):
    pytest.importorskip("modelopt", reason="needs the extra `quantize`")
    stage, eager = prefix(), prefix().module
    spec = write(stage, tmp_path, OPTIONS)
    assert spec.precision["quantisation"] == "fp8"
    program = open_program(tmp_path / "prefix.pt2", spec.precision)
    rounded = [name for name, kind in products(program).items() if kind == "float8"]
    assert len(rounded) == 6 and all("mlp" in name for name in rounded)  # nobody reads the last layer's
    rng = torch.Generator().manual_seed(1)
    given = torch.randn(512, 96, generator=rng), torch.randint(0, 512, (17,), generator=rng, dtype=torch.int32)
    with torch.no_grad():
        found, expected = program.module()(*given)[0], eager(*given)[0]
    error = (found - expected).norm() / expected.norm()
    assert error < 1e-2  # a number at the edge between two of float8 may fall on either side
    layers = [module for module in stage.module.modules() if isinstance(module, RoundedLinear)]
    theirs = [module for module in eager.modules() if isinstance(module, QuantisedLinear)]
    assert len(theirs) == len(layers) == 9
    assert torch.equal(layers[0].weight, theirs[0].dequantised())  # stays what it is when it is rounded again


@pytest.mark.parametrize("precision", ["fp8_token", "nvfp4"])
def test_formats_that_torch_tensorrt_does_not_take_are_refused(precision):
    with pytest.raises(BackendError, match=f"one scale a tensor, received {precision}.*recipe fp8"):
        round_linears(prefix(precision).module, torch.float32)


def test_without_modelopt_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "modelopt", None)
    for act in (lambda: round_linears(prefix().module, torch.float32),
                lambda: open_program(tmp_path / "prefix.pt2", {"quantisation": "fp8"})):
        with pytest.raises(BackendError, match=r"expected nvidia-modelopt.*pi05_ros\[quantize\]"):
            act()
    assert round_linears(stage_program("modulation", RecipeSource(tiny_config()), OPTIONS).module, torch.float32) == 0
