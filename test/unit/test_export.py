"""Every stage as ONNX, run by onnxruntime on the CPU, against eager; what the graphs are made of; what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason="needs the extra `export`")

import onnx  # noqa: E402

from pi05_ros.backends.tensorrt.export import ExportOptions, export_stages  # noqa: E402
from pi05_ros.backends.tensorrt.names import read_manifest  # noqa: E402
from pi05_ros.benchmark.exported import LIMITS, Case, cases_of, compare, open_runner  # noqa: E402
from pi05_ros.cli.main import main  # noqa: E402
from pi05_ros.config import Pi05Config, tiny_config  # noqa: E402
from pi05_ros.errors import BackendError, ConfigError  # noqa: E402
from pi05_ros.model.fingerprint import fingerprint  # noqa: E402
from pi05_ros.model.recipe import RecipeSource  # noqa: E402

STAGES = ("vision", "prefix", "expert", "loop")
TINY = RecipeSource(tiny_config())


def export(directory, source, stages, **options):
    options = ExportOptions(**{"cameras": 3, "tokens": source.config.max_token_len, "steps": 3, **options})
    return export_stages(source, directory, stages, options, origin={"fingerprint": fingerprint(source)})


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def exported(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, directory, export(directory, TINY, STAGES, dtype=request.param)


def test_every_graph_computes_what_eager_does_at_all_lengths(exported):
    dtype, directory, manifest = exported
    cases = [*cases_of(manifest, 2, np.random.default_rng(5)), Case(2, 7, 10)]
    found = list(compare(manifest, TINY, open_runner("onnxruntime", directory), cases, seed=5))
    assert {one.graph for one in found} == {"vision", "prefix", "step", "loop"} and len(found) == 5 * len(cases)
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
    run, steps = open_runner("onnxruntime", tmp_path), 1
    case = {"vision": Case(2, 1, steps), "prefix": Case(1, 57, steps), "expert": Case(3, 200, steps)}[stage]
    found = list(compare(manifest, source, run, [case]))
    assert found and max(one.error for one in found) < 1e-4


def test_the_commands(tmp_path, capsys):
    assert main(["export", "--output", str(tmp_path), "--stages", "vision,expert", "--horizon", "7"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [graph["graph"] for graph in line["graphs"]] == ["vision", "modulation", "step"] and line["opset"] == 17
    assert main(["validate", str(tmp_path), "--cases", "2"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(line["graphs"]) == {"vision", "step"} and max(line["graphs"].values()) < 1e-5
    assert main(["validate", str(tmp_path), "--cases", "1", "--limit", "1e-12"]) == 1
    assert main(["export", "--output", str(tmp_path), "--stages", "visions"]) == 2
    assert main(["export", "--output", str(tmp_path), "--cameras", "4"]) == 2
    assert main(["validate", str(tmp_path / "elsewhere")]) == 2


def test_a_graph_of_other_weights_is_told_and_found(exported, tmp_path):
    """By the fingerprint before anything runs; and by its numbers, where the fingerprint is that of other weights."""
    dtype, directory, manifest = exported
    other = RecipeSource(replace(tiny_config(), action_horizon=11), seed=TINY.seed + 1)
    with pytest.raises(BackendError, match="weights to compare with"):
        list(compare(manifest, other, open_runner("onnxruntime", directory), [Case(1, 3, 1)]))
    lying = replace(manifest, source={"fingerprint": fingerprint(other)})
    found = list(compare(lying, RecipeSource(tiny_config(), seed=TINY.seed + 1), open_runner("onnxruntime", directory),
                         [Case(1, 3, 1)]))
    assert min(one.error for one in found) > 0.05


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
