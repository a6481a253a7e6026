"""ONNX graphs whose Linears go through float8: names, types, numbers, and scales that are refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pi05_ros.cli.main import main
from pi05_ros.config import tiny_config
from pi05_ros.errors import ConfigError
from pi05_ros.model import weights
from pi05_ros.model.recipe import RecipeSource

ir = pytest.importorskip("onnx_ir", reason="needs the extra `export`")
pytest.importorskip("onnxscript", reason="needs the extra `export`")
pytest.importorskip("onnxruntime", reason="needs the extra `export`")

from pi05_ros.backends.tensorrt.export import OnnxOptions, export_stages, onnx_model  # noqa: E402
from pi05_ros.backends.tensorrt.fp8 import fake_quantise_linears, read_scales  # noqa: E402
from pi05_ros.backends.tensorrt.onnx_cpu import OnnxRunner  # noqa: E402
from pi05_ros.backends.tensorrt.onnx_names import readable  # noqa: E402
from pi05_ros.backends.tensorrt.programs import ExportOptions, stage_program  # noqa: E402

SOURCE, OPTIONS = RecipeSource(tiny_config()), ExportOptions(tokens=48)
QUANTISED = [f"{stack}.layers.{layer}.mlp.{part}_proj" for stack in ("language_model", "action_expert")
             for layer in (0, 1) for part in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def scale_file(tmp_path_factory):
    """Synthetic scales: one an output channel for weights, one for all inputs."""
    model, path = weights.load(SOURCE), tmp_path_factory.mktemp("scales") / "scales.safetensors"
    save_file({f"{name}.weight_scale": (model.get_submodule(name).weight.abs().amax(1) / 448).numpy()
               for name in QUANTISED} | {f"{name}.input_scale": np.array(0.01, np.float32) for name in QUANTISED}, path)
    return path


@pytest.fixture(scope="module")
def scales(scale_file):
    return read_scales(scale_file)


def test_a_graph_rounds_as_a_fake_quantised_model_does(scales, tmp_path):
    export_stages(SOURCE, tmp_path, ["prefix"], OPTIONS, OnnxOptions(scales=scales))
    plain, rounded = weights.load(SOURCE), weights.load(SOURCE)
    fake_quantise_linears(rounded, scales)
    rng = np.random.default_rng(3)
    images, tokens = rng.standard_normal((256, 96), np.float32), rng.integers(0, 512, 17)
    masks = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 17, dtype=torch.bool)
    found = OnnxRunner(tmp_path, threads=1)("prefix", {"image_tokens": images, "tokens": tokens})["keys"]

    def error(model):
        with torch.no_grad():
            keys = model.prefill(torch.tensor(images)[None], masks[0], torch.tensor(tokens)[None], masks[1]).keys
        return np.linalg.norm(found - keys[:, 0].numpy()) / np.linalg.norm(keys)

    assert error(rounded) < 1e-3  # a number at the edge between two of float8 may fall on either side
    assert error(plain) > 1e-2  # and float8 is really there


def test_the_command_tells_the_error_of_the_graph_from_that_of_float8(scale_file, tmp_path, capsys):
    """In bfloat16, where the scales are rounded too; float8 makes much of the little that else differs."""
    words = ["--stages", "prefix", "--dtype", "bfloat16", "--scales", str(scale_file)]
    assert main(["export", "--output", str(tmp_path), *words]) == 0
    words = ["validate", str(tmp_path), "--cases", "2", "--limit", "0.015"]
    assert main(words) == 1
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])["graphs"]["prefix"]
    assert main([*words, "--scales", str(scale_file)]) == 0
    own = json.loads(capsys.readouterr().out.splitlines()[-1])["graphs"]["prefix"]
    assert own < whole / 5


def test_products_keep_their_names_and_weights_are_float8(scales):
    model = onnx_model(stage_program("step", SOURCE, OPTIONS), OPTIONS, OnnxOptions(scales=scales))
    nodes = {node.name: node for node in model.graph}
    product = nodes["step/layer1/mlp/gate"]
    assert [value.producer().op_type for value in product.inputs] == ["DequantizeLinear"] * 2
    assert model.graph.initializers["step/layer1/mlp/gate/weight"].dtype == ir.DataType.FLOAT8E4M3FN
    assert model.graph.initializers["step/layer2/mlp/gate/weight"].dtype == ir.DataType.FLOAT  # not in the scales
    assert nodes["step/layer2/attention/q"].op_type == nodes["step/layer1/mlp/down"].op_type == "MatMul"
    assert "step/action_in_proj" in nodes and not [name for name in nodes if "." in name]


@pytest.mark.parametrize(("path", "name"), [
    ("action_expert.layers.0.self_attn.q_proj", "layer0/attention/q"),
    ("action_expert.layers.3.mlp.down_proj", "layer3/mlp/down"),
    ("action_out_proj", "action_out_proj"),
])
def test_names_are_readable_whatever_the_stack(path, name):
    assert readable(path) == name


@pytest.mark.parametrize("bad", [{"m.weight_scale": 1.0}, {"m.weight_scale": 1.0, "m.input_scale": 0.0},
                                 {"m.weight_scale": np.nan, "m.input_scale": 1.0}, {"other": 1.0}])
def test_scales_that_are_not_whole_are_refused(bad, tmp_path):
    save_file({name: np.array(value, np.float32) for name, value in bad.items()}, tmp_path / "s.safetensors")
    with pytest.raises(ConfigError, match="Calibrate again"):
        read_scales(tmp_path / "s.safetensors")
