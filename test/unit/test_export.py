"""Every stage as ONNX, run by onnxruntime on the CPU, against eager; what the graphs are made of; what is refused."""

import gc
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason="needs the extra `export`")

import onnx  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402

from pi05_ros.backends.tensorrt.export import ExportOptions, export_stages  # noqa: E402
from pi05_ros.backends.tensorrt.names import read_manifest  # noqa: E402
from pi05_ros.backends.tensorrt.programs import stage_program  # noqa: E402
from pi05_ros.benchmark import reference  # noqa: E402
from pi05_ros.benchmark.exported import LIMITS, check, compare, draw_shapes, open_runner  # noqa: E402
from pi05_ros.cli.main import main  # noqa: E402
from pi05_ros.config import Pi05Config, tiny_config  # noqa: E402
from pi05_ros.errors import BackendError, ConfigError  # noqa: E402
from pi05_ros.model import weights  # noqa: E402
from pi05_ros.model.fingerprint import fingerprint  # noqa: E402
from pi05_ros.model.recipe import RecipeSource  # noqa: E402
from pi05_ros.train.dataset import DatasetWriter, Episode  # noqa: E402

STAGES = ("vision", "prefix", "expert", "loop")
TINY = RecipeSource(tiny_config())


def export(directory, source, stages, **options):
    options = ExportOptions(**{"cameras": 3, "tokens": source.config.max_token_len, "steps": 3, **options})
    return export_stages(source, directory, stages, options, origin={"fingerprint": fingerprint(source)})


def judge(manifest, source, directory, *shapes, steps=(1, 10), seed=0):
    """Graphs against eager, on random observations of (cameras, tokens)."""
    random = np.random.default_rng(seed)
    observations = [reference.random_observation(source.config, *shape, steps, random) for shape in shapes]
    check(manifest, source, observations)
    references = reference.make(source, observations, reference.last_stage(manifest.stages))
    return list(compare(manifest, references, open_runner("onnxruntime", directory)))


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def exported(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, directory, export(directory, TINY, STAGES, dtype=request.param)


def test_every_graph_computes_what_eager_does_at_all_lengths(exported):
    dtype, directory, manifest = exported
    shapes = [*draw_shapes(manifest, 2, np.random.default_rng(5)), (2, 7)]
    assert shapes == [(3, 48), (1, 1), (2, 7)]
    found = judge(manifest, TINY, directory, *shapes, steps=(1, 3, 10))
    assert Counter(one.graph for one in found) == {"vision": 3, "prefix": 6, "modulation": 3, "step": 9, "loop": 3}
    assert max(one.error for one in found) < LIMITS[dtype]
    if dtype == "float32":
        assert max(one.error for one in found) < 1e-5


def test_graphs_are_of_the_types_and_operators_that_their_readers_take(exported):
    """TensorRT 8.6 reads opset 17 and has neither bfloat16 nor int64 arithmetic of its own."""
    dtype, directory, manifest = exported
    kinds = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16,
             "bfloat16": onnx.TensorProto.BFLOAT16}
    for name, spec in manifest.stages.items():
        model = onnx.load(directory / spec.file, load_external_data=False)
        assert model.opset_import[0].version == (20 if dtype == "bfloat16" else 17) == spec.opset
        assert {node.domain for node in model.graph.node} == {""}
        # 8.6 passes over `start` and `end` of Shape: a length would be a list of sizes, and step/Add no sum.
        shapes = [node for node in model.graph.node if node.op_type == "Shape"]
        assert [len(node.attribute) for node in shapes] == {"prefix": [0, 0], "step": [0], "loop": [0]}.get(name, [])
        assert all(len(node.input) == 2 for node in model.graph.node if node.op_type == "Squeeze")
        large = {t.data_type for t in model.graph.initializer if np.prod(t.dims) > 5000}
        wide = {onnx.TensorProto.FLOAT} if name in ("vision", "modulation", "loop", "step") else set()
        assert large <= {kinds[dtype]} | wide and (name == "modulation" or kinds[dtype] in large)
        given = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
        for tensor in (*spec.inputs, *spec.outputs):
            assert given[tensor.name] == {**kinds, "int32": onnx.TensorProto.INT32}[tensor.dtype]
    names = {node.name for node in onnx.load(directory / "prefix.onnx", load_external_data=False).graph.node}
    assert any(name.startswith("prefix/layer0/") for name in names)


@pytest.mark.parametrize("stage", ["vision", "prefix", "expert"])
def test_layers_of_full_width(stage, tmp_path):
    full, depth = Pi05Config(), 2 if stage == "prefix" else 1  # of the last prefix layer only keys and values go on
    config = replace(full, vision=replace(full.vision, depth=1), expert=replace(full.expert, depth=depth),
                     prefix=replace(full.prefix, depth=depth, vocab_size=256))
    source = RecipeSource(config)
    manifest = export(tmp_path, source, (stage,))
    shape = {"vision": (2, 1), "prefix": (1, 57), "expert": (3, 200)}[stage]
    found = judge(manifest, source, tmp_path, shape, steps=(1,))
    assert found and max(one.error for one in found) < 1e-4


def test_the_commands(tmp_path, capsys):
    assert main(["export", "--output", str(tmp_path), "--stages", "vision,expert", "--horizon", "7"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [graph["graph"] for graph in line["graphs"]] == ["vision", "modulation", "step"] and line["opset"] == 17
    assert main(["validate", str(tmp_path), "--cases", "2"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(line["graphs"]) == {"vision", "modulation", "step"} and max(line["graphs"].values()) < 1e-5
    assert main(["validate", str(tmp_path), "--cases", "1", "--limit", "1e-12"]) == 1
    assert main(["export", "--output", str(tmp_path), "--stages", "visions"]) == 2
    assert main(["export", "--output", str(tmp_path), "--cameras", "4"]) == 2
    assert main(["validate", str(tmp_path / "elsewhere")]) == 2


def test_a_graph_of_other_weights_is_told_and_found(exported, tmp_path):
    """By the fingerprint before anything runs; and by its numbers, where the fingerprint is that of other weights."""
    dtype, directory, manifest = exported
    other = RecipeSource(replace(tiny_config(), action_horizon=11), seed=TINY.seed + 1)
    with pytest.raises(BackendError, match="weights to compare with"):
        judge(manifest, other, directory, (1, 3))
    lying = replace(manifest, source={"fingerprint": fingerprint(other)})
    found = judge(lying, RecipeSource(tiny_config(), seed=TINY.seed + 1), directory, (1, 3))
    assert min(one.error for one in found) > 0.05


def test_one_graph_is_in_memory_at_a_time(tmp_path, monkeypatch):
    held = []

    def load(*args):
        gc.collect()
        assert all(storage.expired() for storage in held)
        program = stage_program(*args)
        held[:] = [StorageWeakRef(parameter.untyped_storage()) for parameter in program.module.parameters()
                   if not parameter.is_meta]
        return program

    monkeypatch.setattr("pi05_ros.backends.tensorrt.export.stage_program", load)
    export(tmp_path, TINY, ("vision", "prefix"))
    assert held


def test_eager_is_kept_and_made_only_where_it_is_missing(tmp_path, monkeypatch):
    """Another export of the same weights, or an interrupted run, goes on from what is there; a reference of anything
    else is refused."""
    drawn = [reference.random_observation(TINY.config, 2, 5, (1, 2), np.random.default_rng(seed)) for seed in (0, 1)]
    loaded = []
    load = weights.load
    monkeypatch.setattr(weights, "load", lambda source, device, dtype, stages, watch: loaded.extend(stages) or load(
        source, device, dtype, stages, watch))
    reference.make(TINY, drawn, "prefix", tmp_path)
    (tmp_path / "1.prefix.npz").unlink()
    kept = reference.make(TINY, drawn, "expert", tmp_path)
    assert loaded == ["vision", "prefix", "prefix", "expert"]
    for mine, stored in zip(reference.make(TINY, drawn, "expert"), kept, strict=True):
        for stage, arrays in mine.made.items():
            assert {name: array.tobytes() for name, array in arrays.items()} == {
                name: array.tobytes() for name, array in stored.made[stage].items()}
    swapped = [replace(drawn[0], arrays=drawn[1].arrays), drawn[1]]
    for source, observations in ((RecipeSource(TINY.config, seed=1), drawn), (TINY, drawn[:1]), (TINY, swapped),
                                 (TINY, [replace(one, steps=(1,)) for one in drawn])):
        with pytest.raises(ConfigError, match="these weights and observations"):
            reference.make(source, observations, "vision", tmp_path)
    (tmp_path / "reference.json").write_text("[]")
    with pytest.raises(ConfigError, match="reference.json"):
        reference.make(TINY, drawn, "vision", tmp_path)


def test_recorded_observations_are_judged(exported, tmp_path, capsys):
    """Frames and prompts of a data set, through the transforms of its robot; only the cameras that are there."""
    dtype, directory, manifest = exported
    with DatasetWriter(tmp_path / "data", "arm6", ("base_0_rgb", "left_wrist_0_rgb")) as writer:
        random = np.random.default_rng(0)
        state, actions = random.standard_normal((2, 3, 7), np.float32)
        writer.add(Episode(random.integers(0, 256, (3, 2, 40, 60, 3), np.uint8), state, actions,
                           ("pick up the red block",), "pick", 0))
    recorded = f"dataset:{tmp_path / 'data'}"
    assert main(["validate", str(directory), "--observations", recorded, "--cases", "2", "--steps", "1,3"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {one["graph"] for one in line["cases"]} == set(manifest.stages)
    assert max(line["graphs"].values()) < LIMITS[dtype]
    assert all("2 cameras" in one["case"] for one in line["cases"] if one["graph"] == "vision")


@pytest.mark.parametrize("words", [["--shapes", "4x1"], ["--shapes", "1x49"], ["--observations", "bag:nowhere"],
                                   ["--observations", "films"]])
def test_observations_that_the_graphs_do_not_take_are_refused(exported, words, capsys):
    assert main(["validate", str(exported[1]), *words]) == 2
    assert "expected" in json.loads(capsys.readouterr().out.splitlines()[-1])["message"]


def test_a_manifest_that_is_not_whole_is_refused(exported, tmp_path):
    dtype, directory, manifest = exported
    stored = json.loads((directory / "export.json").read_text())
    for change, words in (({"format": 9}, "format 1"), ({"stages": None}, "whole manifest"),
                          ({"config": None, "more": 1}, "whole manifest")):
        (tmp_path / "export.json").write_text(json.dumps({**stored, **change}))
        with pytest.raises(ConfigError, match=words):
            read_manifest(tmp_path)
    (tmp_path / "export.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="Copy the whole directory"):
        read_manifest(tmp_path)
