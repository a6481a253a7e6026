"""Engines of every stage, built by TensorRT-RTX on the CPU for GPUs that are not here; and what a build refuses."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pi05_ros.backends.tensorrt.api import Api, load_api
from pi05_ros.backends.tensorrt.build import BuildOptions, build_engine, way_out
from pi05_ros.backends.tensorrt.build_log import BuildLog, PhaseProgress
from pi05_ros.backends.tensorrt.names import read_manifest
from pi05_ros.backends.tensorrt.plan_cache import read_entries, read_plan
from pi05_ros.backends.tensorrt.precision import engine_layers, fell_back, kept_wider, seen
from pi05_ros.cli.main import main
from pi05_ros.config import Pi05Config, tiny_config
from pi05_ros.errors import BackendError, ConfigError
from pi05_ros.model.recipe import RecipeSource

LIBRARIES = ("onnx", "onnxscript", "tensorrt_rtx_bindings")
TARGETS = ("8.6", "8.9", "12.0")


@pytest.fixture(scope="module")
def rtx():
    for library in LIBRARIES:
        pytest.importorskip(library, reason="needs the extras export and tensorrt_rtx (x86 Linux)")
    return load_api("tensorrt_rtx")


@pytest.fixture(scope="module")
def exports(tmp_path_factory, rtx):
    """Directories of exports in bfloat16: `tiny` with every graph; `wide`, single layers at full width (the prefix has
    two: of its last one only keys and values are needed); `float8`, those with the products of the MLPs quantised."""
    from pi05_ros.backends.tensorrt.export import ExportOptions, OnnxOptions, export_stages
    from pi05_ros.backends.tensorrt.fp8 import Scales

    full, scale = Pi05Config(), Scales(np.array(0.002, np.float32), np.array(0.05, np.float32))
    wide = replace(full, vision=replace(full.vision, depth=1), expert=replace(full.expert, depth=2),
                   prefix=replace(full.prefix, depth=2, vocab_size=512))
    scales = {f"{stack}.layers.{layer}.mlp.{product}": scale for stack in ("language_model", "action_expert")
              for layer in range(2) for product in ("gate_proj", "up_proj", "down_proj")}
    made = {}
    for name, config, stages, quantised in (("tiny", tiny_config(), ("vision", "prefix", "expert", "loop"), {}),
                                            ("wide", wide, ("vision", "prefix", "expert"), {}),
                                            ("float8", wide, ("prefix", "expert"), scales)):
        made[name] = tmp_path_factory.mktemp(name)
        options = ExportOptions(dtype="bfloat16", cameras=3, tokens=config.max_token_len, steps=1)
        export_stages(RecipeSource(config), made[name], stages, options, OnnxOptions(scales=quantised))
    yield made
    for directory in made.values():
        shutil.rmtree(directory)  # half a gigabyte


def build(api, directory, graph, target, **options):
    manifest = read_manifest(directory)
    return build_engine(api, directory / manifest.stages[graph].file, manifest.stages[graph],
                        BuildOptions(target=target, **options), inspect=False)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("size", "graph"), [("tiny", "vision"), ("tiny", "prefix"), ("tiny", "modulation"),
                                             ("tiny", "step"), ("tiny", "loop"), ("wide", "vision"),
                                             ("wide", "prefix"), ("wide", "step")])
def test_every_stage_in_bfloat16(rtx, exports, size, graph, target):
    spec = read_manifest(exports[size]).stages[graph]
    built = build(rtx, exports[size], graph, target)
    plan = memoryview(built.plan)
    assert plan.nbytes > 0.9 * spec.bytes  # the weights are in it
    assert all(binding.name.encode() in bytes(plan) for binding in (*spec.inputs, *spec.outputs))
    types = Counter(built.products.values())  # read from TensorRT's network: bfloat16 but for what the model keeps wide
    wide = {"vision": 1, "prefix": 0, "modulation": types["float32"], "step": 2, "loop": 2}[graph]
    assert types == Counter({"bfloat16": types.total() - wide, "float32": wide}) - Counter() and types.total() > 8


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("graph", ["prefix", "step"])
def test_float8_where_the_gpu_has_it(rtx, exports, graph, target):
    if target == "8.6":
        with pytest.raises(BackendError, match="fp8_e4m3.*FP8: 8.9 and later"):
            build(rtx, exports["float8"], graph, target)
        return
    built, wide = (build(rtx, exports[name], graph, target) for name in ("float8", "wide"))
    kinds, size = Counter(built.products.values()), memoryview(built.plan).nbytes
    assert kinds["float8"] == {"prefix": 3, "step": 6}[graph]
    assert kinds.total() == len(wide.products) and size < 0.8 * memoryview(wide.plan).nbytes
    assert all("mlp" in name for name, kind in built.products.items() if kind == "float8")


def test_the_command_builds_once_and_lists(rtx, exports, tmp_path, capsys):
    command = ["build", str(exports["tiny"]), "--flavour", "tensorrt_rtx", "--gpu", "8.9", "--output",
               str(tmp_path), "--graphs", "vision,modulation", "--workspace", "1"]
    runs = []
    for more in ([], [], ["--again"], ["--gpu", "12.0"]):
        assert main([*command, *more]) == 0
        runs.append(json.loads(capsys.readouterr().out))
    assert [[engine["built"] for engine in run["engines"]] for run in runs] == [[True] * 2, [False] * 2, [True] * 2,
                                                                               [True] * 2]
    assert [run["gpu"] for run in runs] == ["sm_89"] * 3 + ["sm_120"]
    entries = list(read_entries(tmp_path))
    assert Counter(entry.key.graph for entry in entries) == {"vision": 2, "modulation": 2}
    assert all(len(read_plan(entry)) == entry.bytes for entry in entries)
    assert "vision/projector" in next(tmp_path.glob("vision-*.log")).read_text()
    assert main(["engines", str(tmp_path), "--check"]) == 0
    listed = json.loads(capsys.readouterr().out)["engines"]
    pixels = [["vision", "in pixels", "float32", "cameras x 3 x 224 x 224", "1 x 3 x 224 x 224", "3 x 3 x 224 x 224",
               "3 x 3 x 224 x 224"]]
    assert [engine["bindings"][:1] for engine in listed if engine["graph"] == "vision"] == [pixels, pixels]
    entries[0].path.write_bytes(b"")
    assert main(["engines", str(tmp_path), "--check"]) == 1
    assert "pi05 build" in [e["problem"] for e in json.loads(capsys.readouterr().out)["engines"] if e["problem"]][0]
    assert main(command) == (2 if entries[0].key.gpu == "sm_89" else 0)


def test_a_graph_of_other_bindings_is_refused(rtx, exports):
    directory = exports["tiny"]
    spec = read_manifest(directory).stages["modulation"]
    (given,) = spec.inputs
    for change in ({"name": "times"}, {"dtype": "bfloat16"}, {"shape": ("steps", 65)}):
        with pytest.raises(BackendError, match="Export again"):
            build_engine(rtx, directory / spec.file, replace(spec, inputs=(replace(given, **change),)), inspect=False)
    with pytest.raises(BackendError, match="also modulation"):
        build_engine(rtx, directory / spec.file, replace(spec, outputs=()), inspect=False)


def test_files_that_changed_after_the_export_are_refused(rtx, exports, tmp_path):
    from pi05_ros.backends.tensorrt.build_plans import Builder

    manifest = read_manifest(exports["tiny"])
    other = replace(manifest, stages={"modulation": replace(manifest.stages["modulation"], weights_hash="0")})
    builder = Builder(rtx, exports["tiny"], other, tmp_path, "sm_89", BuildOptions(target="8.9"), inspect=False)
    with pytest.raises(BackendError, match="other contents"):
        builder.build("modulation", lambda fraction, phase: None)
    assert not list(tmp_path.iterdir())


def test_what_is_no_graph_is_refused(rtx, exports, tmp_path):
    (tmp_path / "vision.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(BackendError, match="a graph that TensorRT's ONNX parser reads"):
        build_engine(rtx, tmp_path / "vision.onnx", read_manifest(exports["tiny"]).stages["vision"], inspect=False)


def test_a_target_that_rtx_does_not_know_is_refused(rtx, exports):
    with pytest.raises(BackendError, match="--gpu: expected SM75.*SM120.*received 9.0"):
        build(rtx, exports["tiny"], "modulation", "9.0")


def test_progress_only_grows_and_reaches_the_end(rtx, exports):
    directory, fractions = exports["tiny"], []
    spec = read_manifest(directory).stages["vision"]
    build_engine(rtx, directory / spec.file, spec, BuildOptions(target="8.9"), inspect=False,
                 progress=lambda fraction, phase: fractions.append(fraction))
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and len(set(fractions)) > 20


def test_progress_shares_a_step_out_among_the_phases_inside_it():
    told = []
    phases = PhaseProgress(lambda fraction, phase: told.append(round(fraction, 3)))
    phases.start("build", None, 4)
    phases.step("build", 0)
    phases.start("tactics", "build", 2)
    assert phases.step("tactics", 0)
    phases.finish("tactics")
    phases.step("build", 1)
    phases.finish("build")
    assert told == [0, 0.25, 0.25, 0.375, 0.375, 0.5, 1.0]
    stops = PhaseProgress(lambda fraction, phase: False)
    stops.start("build", None, 2)
    assert not stops.step("build", 0)


INSPECTED = {"Layers": [
    {"Name": "step/layer0/mlp/gate", "LayerType": "gemm", "Metadata": "[ONNX Layer: step/layer0/mlp/gate]",
     "Inputs": [{"Name": "x", "Format/Datatype": "BFloat16"}], "TacticName": "sm87_xmma_gemm_bf16bf16_bf16f32_f32_tn"},
    {"Name": "__myl_Fc_1", "LayerType": "gemm", "Metadata": "[ONNX Layer: step/layer0/mlp/up]\u001f[ONNX Layer: Add]",
     "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}, {"Name": "w", "Format/Datatype": "Float"}]},
    {"Name": "step/layer1/attention/q", "LayerType": "gemm", "TacticName": "sm80_xmma_gemm_f32f32_f32f32_f32_nn"},
    {"Name": "Reformatting CopyNode for step/layer1/mlp/up", "LayerType": "Reformat",
     "Inputs": [{"Format/Datatype": "Float"}]},
    {"Name": "ForeignNode[step/layer1/mlp/up...step/layer1/mlp/gate]", "LayerType": "Myelin", "Inputs": []},
    {"Name": "step/layer10/mlp/gate", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "Float"}]},
    "a layer without details"]}
WANTED = {"step/layer0/mlp/gate": "bfloat16", "step/layer0/mlp/up": "bfloat16", "step/layer1/attention/q": "float8",
          "step/layer1/mlp/up": "bfloat16", "step/layer10/mlp/gate": "float32"}


def test_layers_of_a_higher_precision_are_named():
    layers = engine_layers(json.dumps(INSPECTED))
    found = fell_back(WANTED, layers)
    assert [(each.product, each.wanted, each.found) for each in found] == [
        ("step/layer0/mlp/up", "bfloat16", "float32"), ("step/layer1/attention/q", "float8", "float32")]
    # What a fused block hides is not judged, and is said to be so; a reformatting layer is no product.
    assert seen(WANTED, [layer for layer in layers if layer.kind != "Reformat"]) == 4
    assert not fell_back(WANTED, engine_layers("no JSON")) and len(layers) == 7
    assert len(engine_layers(json.dumps(INSPECTED).replace("gate", "ga\nte"))) == 7  # 8.6 has line ends in strings


def test_an_engine_whose_layers_fell_back_is_refused_unless_allowed(rtx, exports, monkeypatch):
    from pi05_ros.backends.tensorrt import build as module

    inspected = {"Layers": [{"Name": "modulation/time_mlp_in", "LayerType": "gemm",
                             "Inputs": [{"Format/Datatype": "Float"}]}]}
    monkeypatch.setattr(module, "look", lambda *args: (json.dumps(inspected), 4096))
    monkeypatch.setattr(module, "wanted_products", lambda *args: {"modulation/time_mlp_in": "bfloat16"})
    directory = exports["tiny"]
    spec = read_manifest(directory).stages["modulation"]
    with pytest.raises(BackendError, match="modulation/time_mlp_in: float32 instead of bfloat16.*--allow-fallback"):
        build_engine(rtx, directory / spec.file, spec, BuildOptions(target="8.9"))
    built = build_engine(rtx, directory / spec.file, spec, BuildOptions(target="8.9", allow_fallback=True))
    assert len(built.fallbacks) == 1 and built.judged == 1 and built.memory_bytes == 4096


def test_an_engine_that_keeps_its_weights_wider_than_the_graph_is_refused_unless_allowed(rtx, exports, monkeypatch):
    """What a fused block hides shows in its size; these are those of TensorRT 8.6, float16 `step` and `prefix`."""
    from pi05_ros.backends.tensorrt import precision

    (found,) = kept_wider(278_365_612, 138_739_712)
    assert str(found) == "all weights: 278 MB instead of 139 MB (in 'the engine')"
    assert not kept_wider(798_493_852, 796_983_296) and not kept_wider(2_500_000, 1_000_000) and not kept_wider(9, 0)
    monkeypatch.setattr(precision, "MORE_BYTES", 0)
    directory = exports["tiny"]
    spec = replace(read_manifest(directory).stages["modulation"], bytes=1)
    with pytest.raises(BackendError, match="1 of higher precision: all weights.*--allow-fallback"):
        build_engine(rtx, directory / spec.file, spec, BuildOptions(target="8.9"), inspect=False)
    allowed = BuildOptions(target="8.9", allow_fallback=True)
    assert len(build_engine(rtx, directory / spec.file, spec, allowed, inspect=False).fallbacks) == 1


def test_contexts_share_the_profile_where_that_must_be_asked_for():
    asked = []
    config = SimpleNamespace(set_preview_feature=lambda feature, on: asked.append((feature, on)))
    module = SimpleNamespace(PreviewFeature=SimpleNamespace(PROFILE_SHARING_0806="sharing"))
    for flavour, version in (("tensorrt", "8.6.0"), ("tensorrt", "10.3.0"), ("tensorrt_rtx", "1.7.1.116")):
        Api(flavour, module, version).share_profile(config)
    assert asked == [("sharing", True)]


@pytest.mark.parametrize(("words", "advice"), [
    ("Cuda Runtime (out of memory)", "--workspace"), ("Requested amount of GPU memory is insufficient", "--workspace"),
    ("Cannot compile for target(s) sm86, because the model contains HW-specific datatypes: fp8_e4m3", "FP8"),
    ("CUDA initialization failure with error: 35", "--gpu 8.9"),
    ("Could not find any implementation for node x", "report the log")])
def test_the_way_out_follows_tensorrts_words(words, advice):
    assert advice in way_out(words)


def test_the_log_keeps_each_warning_once_and_the_errors_apart():
    log = BuildLog()
    for severity, text in (("info", "a"), ("warning", "b"), ("warning", "b"), ("error", "c"), ("error", "d"),
                           ("internal_error", "e"), ("error", "f")):
        log(severity, text)
    assert log.lines == ["warning: b", "error: c", "error: d", "internal_error: e", "error: f"]
    assert log.reason == "c | d | f" and BuildLog().reason == "no message"


def test_flavours_that_are_not_there_say_how_to_get_them(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_bindings", None)
    with pytest.raises(BackendError, match="python3-libnvinfer"):
        load_api("tensorrt")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", SimpleNamespace(__version__="8.5.3"))
    with pytest.raises(BackendError, match="release 8.6 or later, received 8.5.3"):
        load_api("tensorrt")


def test_the_command_refuses_wrong_use(tmp_path, rtx, exports):
    from pi05_ros.cli import build as command

    manifest = read_manifest(exports["tiny"])
    with pytest.raises(ConfigError, match="--graphs.*received expert"):
        command.graph_names("vision,expert", manifest)
    for target in ("89", "8.x", ""):
        with pytest.raises(ConfigError, match="a compute capability such as 8.9"):
            command.place(rtx, target, "cuda")
    with pytest.raises(ConfigError, match="flavour tensorrt_rtx"):
        command.place(replace(rtx, flavour="tensorrt"), "8.9", "cuda")
