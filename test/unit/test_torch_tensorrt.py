"""From a program to an engine that runs, with stand-ins of torch_tensorrt and TensorRT; what is refused."""

import dataclasses
import json
import math
import sys
from ctypes import c_byte
from functools import partial

import numpy as np
import pytest
import torch
from scripted_tensorrt import Script, plan_of
from scripted_torch_tensorrt import RECORDED, Library, compiled

from pi05_ros.backends import base
from pi05_ros.backends.tensorrt import engine_arrays
from pi05_ros.backends.tensorrt.api import Api, load_api
from pi05_ros.backends.tensorrt.build import BuildOptions
from pi05_ros.backends.tensorrt.build_plans import Builder
from pi05_ros.backends.tensorrt.executions import StageEngine
from pi05_ros.backends.tensorrt.plan_cache import read_entries
from pi05_ros.backends.tensorrt.runner import Engine
from pi05_ros.backends.tensorrt.select import Wanted, select
from pi05_ros.backends.torch_tensorrt import compile as ours
from pi05_ros.backends.torch_tensorrt.program_files import export_programs, open_program
from pi05_ros.backends.torch_tensorrt.settings import OURS
from pi05_ros.cli.build import read_settings
from pi05_ros.cli.main import main
from pi05_ros.config import share_directory, tiny_config
from pi05_ros.errors import BackendError
from pi05_ros.model.fingerprint import fingerprint
from pi05_ros.model.recipe import RecipeSource

SHIPPED = share_directory() / "config" / "torch_tensorrt.yaml"
SOURCE, VERSION, GPU = RecipeSource(tiny_config()), "10.3.0", "Orin, sm_87, 16 SMs"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    directory = tmp_path_factory.mktemp("programs")
    from pi05_ros.backends.tensorrt.programs import ExportOptions

    origin = {"fingerprint": fingerprint(SOURCE), "checkpoint": "tiny"}
    return directory, export_programs(SOURCE, directory, ("prefix", "expert"), ExportOptions(tokens=48), origin)


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def give_engine(manifest):
    """A compile that makes one engine of any program; the stand-in of TensorRT can load it."""

    def give(program, settings):
        names = [spec.name for spec in settings["arg_inputs"]]
        (spec,) = (graph for graph in manifest.stages.values() if [each.name for each in graph.inputs] == names)
        outputs = [dataclasses.replace(each, name=f"output{i}") for i, each in enumerate(spec.outputs)]
        with open(settings["timing_cache_path"], "ab") as timing:
            timing.write(b"measured ")
        return compiled(names, len(outputs), plan_of(spec.inputs, outputs, spec.file))

    return give


@pytest.fixture
def make(export, tmp_path, monkeypatch):
    """(give, settings) to a builder and the stand-in of torch_tensorrt."""
    directory, manifest = export

    def builder(give=None, settings=(), script=None, **release):
        library = Library(give or give_engine(manifest), **release)
        monkeypatch.setitem(sys.modules, "torch_tensorrt", library.module)
        told = ours.all_settings(ours.installed(), {**read_settings(SHIPPED), **dict(settings)})
        api = Api("torch_tensorrt", (script or Script(VERSION)).module, VERSION)
        return Builder(api, directory, manifest, tmp_path, GPU, BuildOptions(settings=told), True,
                       make=ours.build_engine), library

    return builder


def build(builder, graph="modulation"):
    return builder.build(graph, lambda fraction, phase: None)


def test_compile_is_called_with_the_ranges_and_settings(make, export):
    builder, library = make()
    entry, built = build(builder, "prefix")
    (call,) = library.calls
    images, tokens = call["arg_inputs"]
    assert (images.min_shape, images.opt_shape, images.max_shape) == ((256, 96), (768, 96), (768, 96))
    assert (tokens.name, tokens.dtype, tokens.max_shape) == ("tokens", torch.int32, (48,))
    assert call.items() >= {**OURS, "disable_tf32": True, "device": "cuda:0"}.items()
    assert set(call) <= set(RECORDED["defaults"])
    assert built and entry.bindings == {"keys": "output0", "values": "output1"}
    assert entry.key.settings.items() >= {"torch_tensorrt": "2.13.0", "disable_tf32": True}.items()
    assert entry.report["judged"] == 0 and entry.report["inspected"]
    assert any("fell back to float32 is not told" in message for message in entry.report["messages"])


def test_engines_are_kept_under_their_settings_and_release(make, tmp_path):
    builder, library = make()
    first, _ = build(builder)
    again, built = build(builder)
    assert not built and again == first and len(library.calls) == 1
    for changes in ({"settings": {"use_fp32_acc": True}}, {"version": "2.14.0"}):
        other, _ = make(**changes)
        assert build(other)[1]
    assert len({entry.key.digest for entry in read_entries(tmp_path)}) == 3
    assert next(tmp_path.glob("timing-*.cache")).read_bytes() == b"measured " * 3  # each build goes on with it


def at(address, shape, dtype):
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer((c_byte * size).from_address(address), dtype=dtype).view(shape)


@pytest.mark.parametrize("graph", ["prefix", "modulation", "step"])
def test_an_engine_runs_on_the_frozen_buffers_whatever_it_calls_them(make, export, graph):
    """The stand-in of TensorRT computes with the program, by the names that the engine has."""
    directory, manifest = export
    spec, module = manifest.stages[graph], open_program(directory / f"{graph}.pt2").module()

    def compute(name, addresses, shapes):
        made = module(*(at(addresses[s.name], shapes[s.name], getattr(torch, s.dtype)) for s in spec.inputs))
        made = made if isinstance(made, tuple) else (made,)
        for i, tensor in enumerate(made):
            at(addresses[f"output{i}"], tensor.shape, tensor.dtype).copy_(tensor)
        return {f"output{i}": tuple(tensor.shape) for i, tensor in enumerate(made)}

    script = Script(VERSION, compute)
    builder, _ = make(script=script)
    entry, _ = build(builder, graph)
    engine = StageEngine(Engine(builder.api, entry, GPU), torch.device("cpu"), capture=False)
    rng = np.random.default_rng(1)
    for low_or_high in ("min", "max"):
        given = {s.name: rng.standard_normal(getattr(s, low_or_high), np.float32) if s.dtype == "float32"
                 else rng.integers(0, 512, getattr(s, low_or_high)).astype(np.int32) for s in spec.inputs}
        found = engine_arrays.call(engine, given)
        made = module(*map(torch.from_numpy, given.values()))
        for s, tensor in zip(spec.outputs, made if isinstance(made, tuple) else (made,), strict=True):
            np.testing.assert_array_equal(found[s.name], tensor.numpy())


def test_the_backend_finds_these_engines_and_no_others(make, tmp_path):
    builder, _ = make()
    build(builder)
    wanted = Wanted("torch_tensorrt", VERSION, GPU, "float32", fingerprint(SOURCE), dataclasses.asdict(SOURCE.config))
    assert set(select(tmp_path, ["modulation"], wanted)) == {"modulation"}
    with pytest.raises(BackendError, match="for backend 'torch_tensorrt'"):
        select(tmp_path, ["modulation"], dataclasses.replace(wanted, flavour="tensorrt"))
    with pytest.raises(BackendError, match="backend 'torch_tensorrt': expected a CUDA device"):
        base.build("prefix=torch_tensorrt", SOURCE)
    assert base.parse_choice("vision=torch_tensorrt,expert=cuda")["vision"] == "torch_tensorrt"


def refusing(program, settings):
    """As 2.13.0 does where an operator has no converter: an exception without names, or in a dry run, the parts."""
    if settings["require_full_compilation"]:
        raise AssertionError("require_full_compilation=True was specified, but model is not fully supported")
    assert settings["dryrun"]
    inner = compiled(["x"], 1, b"", left=(torch.ops.aten.gelu.default, torch.ops.aten.gelu.default))
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_module("_run_on_gpu_1", (graph.call_module("_run_on_acc_0", (x,)),)),))
    return torch.fx.GraphModule({"_run_on_acc_0": compiled(["x"], 1, b"", left=(torch.neg,)), "_run_on_gpu_1": inner},
                                graph)


def test_operators_without_a_converter_are_named(make):
    builder, library = make(refusing)
    with pytest.raises(BackendError, match=r"no converter for aten.gelu.default \(2\)\. Run this stage elsewhere"):
        build(builder)
    assert [call.get("dryrun", False) for call in library.calls] == [False, True]
    assert not list(read_entries(builder.output))


@pytest.mark.parametrize(("give", "words"), [
    (lambda program, settings: program.module(), "0 engines, and in PyTorch: .*linear"),  # too few operators: untouched
    (lambda program, settings: compiled(["time_features"], 1, left=(torch.ops.aten.neg.default,)),
     "1 engines, and in PyTorch: aten.neg.default"),
    (lambda program, settings: compiled(["time_features"], 1, plan=b""), "0 engines"),
])
def test_a_module_that_is_not_one_engine_is_refused(make, give, words):
    builder, _ = make(give)
    with pytest.raises(BackendError, match=f"expected one engine.*{words}"):
        build(builder)


def test_an_input_that_the_engine_does_not_read_is_refused(make):
    builder, _ = make(lambda program, settings: compiled(["image_tokens", "tokens"], 2, order=["tokens"]))
    with pytest.raises(BackendError, match="input 'image_tokens' of 'prefix.pt2'.*received none"):
        build(builder, "prefix")


@pytest.mark.parametrize(("error", "words"), [
    (RuntimeError("[TensorRT] Error Code 2: OutOfMemory"), "OutOfMemory.*--workspace"),
    (RuntimeError("cudaError 35: CUDA driver version is insufficient"), "driver version.*machine with the GPU"),
    (ValueError("no such format"), "ValueError: no such format")])
def test_what_tensorrt_says_is_told(make, error, words):
    def fails(program, settings):
        raise error

    builder, library = make(fails)
    with pytest.raises(BackendError, match=f"engine from torch_tensorrt 2.13.0.*{words}"):
        build(builder)
    assert len(library.calls) == 2  # and no dry run hides it


def test_a_torch_tensorrt_that_is_not_there_or_another_one(monkeypatch, export, capsys):
    directory, _ = export
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    assert main(["build", str(directory), "--flavour", "torch_tensorrt"]) == 2
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "expected torch_tensorrt for PyTorch" in line["message"] and "[torch_tensorrt]" in line["message"]
    library = Library(partial(AssertionError), package="tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "torch_tensorrt", library.module)
    with pytest.raises(BackendError, match="torch_tensorrt on tensorrt_rtx.*--flavour tensorrt_rtx"):
        ours.installed()
    assert main(["build", str(directory), "--flavour", "tensorrt"]) == 2  # programs are not for it
    assert "--format onnx" in capsys.readouterr().out
    assert main(["build", str(directory), "--flavour", "tensorrt_rtx", "--settings", str(SHIPPED)]) == 2


def test_without_tensorrt_or_a_gpu_it_says_so(monkeypatch, export, capsys):
    directory, manifest = export
    monkeypatch.setitem(sys.modules, "torch_tensorrt", Library(give_engine(manifest)).module)
    for name in ("tensorrt", "tensorrt_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=r"pi05_ros\[torch_tensorrt\]"):
        load_api("torch_tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", Script(VERSION).module)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["build", str(directory), "--flavour", "torch_tensorrt"]) == 2
    assert "PyTorch sees no CUDA device" in json.loads(capsys.readouterr().out.splitlines()[-1])["message"]
