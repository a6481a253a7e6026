"""Every stage as a torch.export program: read back it equals eager, and every layer has its own weights."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pi05_ros.backends.tensorrt.names import read_manifest
from pi05_ros.backends.tensorrt.programs import ExportOptions, stage_program
from pi05_ros.backends.torch_tensorrt.program_files import check_weights, export_programs, open_program, weights_of
from pi05_ros.benchmark import reference
from pi05_ros.benchmark.exported import LIMITS, compare, open_runner
from pi05_ros.cli.main import main
from pi05_ros.config import tiny_config
from pi05_ros.errors import BackendError, ConfigError
from pi05_ros.model.fingerprint import fingerprint
from pi05_ros.model.recipe import RecipeSource

SOURCE = RecipeSource(tiny_config())
# graph -> the stack, and a product of its layers that the graph reads
LAYERS = {"vision": ("vision_tower.encoder.layers", "mlp.fc1"),
          "prefix": ("model.language_model.layers", "self_attn.k_proj"),
          "modulation": ("model.action_expert.layers", "post_attention_layernorm.dense"),
          "step": ("model.action_expert.layers", "mlp.down_proj")}


def judged(manifest, directory, shapes, steps=(1, 10), seed=5):
    """Programs against eager, on random observations of (cameras, tokens)."""
    random = np.random.default_rng(seed)
    observations = [reference.random_observation(SOURCE.config, *shape, steps, random) for shape in shapes]
    references = reference.make(SOURCE, observations, reference.last_stage(manifest.stages))
    return list(compare(manifest, references, open_runner("torch", directory)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("programs")
    return directory, export_programs(SOURCE, directory, ("vision", "prefix", "expert", "loop"),
                                      ExportOptions(tokens=48, steps=2), {"fingerprint": fingerprint(SOURCE)})


@pytest.fixture(scope="module")
def programs(exported):
    """Graph to a fresh program of it."""
    return lambda graph: open_program(exported[0] / f"{graph}.pt2")


@pytest.fixture(scope="module")
def modules():
    return {graph: stage_program(graph, SOURCE, ExportOptions(tokens=48)).module for graph in LAYERS}


def test_what_is_read_back_equals_eager_at_all_lengths(exported):
    directory, manifest = exported
    found = judged(manifest, directory, [(3, 48), (1, 1), (2, 7)], (1, 2, 10))
    assert {one.graph for one in found} == set(manifest.stages) and len(found) == 3 * (3 + 3 + 1) + 3
    assert max(one.error for one in found) < 1e-6
    assert all(len(one.layers) == (3 if one.graph == "prefix" else 0) for one in found)


def test_programs_of_16_bits_compute_in_their_own_types(tmp_path):
    manifest = export_programs(SOURCE, tmp_path, ("vision", "prefix"), ExportOptions(dtype="bfloat16", tokens=48),
                               {"fingerprint": fingerprint(SOURCE)})
    found = judged(manifest, tmp_path, [(2, 7)])
    assert 1e-3 < max(one.error for one in found) < LIMITS["bfloat16"]
    types = {tensor.dtype for tensor in weights_of(open_program(tmp_path / "prefix.pt2")).values()}
    assert torch.bfloat16 in types and torch.float64 not in types


@pytest.mark.parametrize("graph", LAYERS)
def test_a_program_holds_what_it_reads_and_no_more(programs, modules, graph):
    program = programs(graph)
    check_weights(program, modules[graph], graph)
    held = weights_of(program)
    assert held and not any(tensor.is_meta for tensor in held.values())
    unread = {"vision": "language_model", "prefix": "layers.2.mlp", "modulation": "self_attn", "step": "time_mlp"}
    assert not any(unread[graph] in name for name in held)
    assert len(held) < len(list(modules[graph].parameters())) or graph == "vision"


def swapped(program, graph):
    """The program with two layers' weights of one product exchanged; their names."""
    stack, product = LAYERS[graph]
    first, second = (f"{stack}.{layer}.{product}.weight" for layer in (0, 1))
    held = program.state_dict
    held[first], held[second] = held[second], held[first]
    return first, second


@pytest.mark.parametrize("graph", LAYERS)
def test_two_layers_with_each_others_weights_are_found_twice(exported, programs, modules, graph, tmp_path):
    """By their bits; and by numbers, which is all that can be seen of an engine."""
    directory, manifest = exported
    for each in directory.iterdir():
        (tmp_path / each.name).symlink_to(each)
    program = programs(graph)
    first, _ = swapped(program, graph)
    (tmp_path / f"{graph}.pt2").unlink()
    torch.export.save(program, tmp_path / f"{graph}.pt2")
    with pytest.raises(BackendError, match=f"weight '{first}'.*other numbers"):
        check_weights(open_program(tmp_path / f"{graph}.pt2"), modules[graph], graph)
    asked = {"modulation", "step"} if graph in ("modulation", "step") else {graph}
    only = replace(manifest, stages={name: manifest.stages[name] for name in asked})
    found = judged(only, tmp_path, [(2, 9)], (3,))
    assert found and max(one.error for one in found) > 10 * LIMITS["float32"]


def test_the_layer_that_has_anothers_weights_is_named(exported, programs, tmp_path):
    directory, manifest = exported
    for each in directory.iterdir():
        (tmp_path / each.name).symlink_to(each)
    program = programs("prefix")
    held, stack = program.state_dict, "model.language_model.layers"
    held[f"{stack}.2.self_attn.v_proj.weight"] = held[f"{stack}.1.self_attn.v_proj.weight"]
    (tmp_path / "prefix.pt2").unlink()
    torch.export.save(program, tmp_path / "prefix.pt2")
    only = replace(manifest, stages={"prefix": manifest.stages["prefix"]})
    keys, values = judged(only, tmp_path, [(1, 9)])
    assert max(keys.layers) < 1e-6 and max(values.layers[:2]) < 1e-6 and values.layers[2] > 0.1


def test_an_operator_that_reads_another_layers_weight_is_found(programs, modules):
    """Every tensor is right, but two layers share one of them: what a compiler that merges equal layers would do."""
    program = programs("step")
    nodes = {node.name: node for node in program.graph.nodes}
    paths = program.graph_signature.inputs_to_parameters
    first, second = (next(nodes[name] for name, path in paths.items()
                          if path.endswith(f"layers.{layer}.mlp.up_proj.weight")) for layer in (0, 1))
    next(iter(second.users)).replace_input_with(second, first)
    with pytest.raises(BackendError, match=r"layers\.0\.mlp\.up_proj.*read by '.*layers\.1\.mlp\.up_proj'"):
        check_weights(program, modules["step"], "step")


def test_what_is_no_program_or_not_whole_is_refused(exported, tmp_path):
    directory, _ = exported
    whole = (directory / "modulation.pt2").read_bytes()
    for contents in (whole[:len(whole) // 2], b"", b"\x00" * 1000):
        (tmp_path / "modulation.pt2").write_bytes(contents)
        with pytest.raises(BackendError, match="torch.export program that PyTorch .* reads.*Export again"):
            open_program(tmp_path / "modulation.pt2")
    (tmp_path / "export.json").write_bytes((directory / "export.json").read_bytes())
    with pytest.raises(ConfigError, match="Copy the whole directory"):
        read_manifest(tmp_path)


def test_lengths_beyond_the_export_are_refused(exported):
    run = open_runner("torch", exported[0])
    with pytest.raises(BackendError, match="pixels.*Export with --cameras"):
        run("vision", {"pixels": np.zeros((4, 3, 224, 224), np.float32)})


def test_the_commands(tmp_path, capsys):
    export = ["export", "--format", "torch", "--output", str(tmp_path)]
    assert main([*export, "--stages", "vision", "--horizon", "7"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(graph["file"], graph["opset"]) for graph in line["graphs"]] == [("vision.pt2", None)]
    assert main(["validate", str(tmp_path), "--cases", "2"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["runner"] == "torch" and line["graphs"]["vision"] < 1e-6
    for wrong in ([*export, "--attention", "fused"], [*export, "--scales", "some"],
                  ["validate", str(tmp_path), "--runner", "onnxruntime"], ["build", str(tmp_path)]):
        assert main(wrong) == 2
        assert "onnx" in json.loads(capsys.readouterr().out.splitlines()[-1])["message"].lower()
