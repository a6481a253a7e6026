"""The runner against a stand-in of TensorRT: order of calls, lifetimes, streams, and words when something fails."""

import ast
import gc
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import scripted_tensorrt
from scripted_tensorrt import Script, plan_of

import pi05_ros
from pi05_ros.backends.tensorrt.api import Api
from pi05_ros.backends.tensorrt.names import TensorSpec
from pi05_ros.backends.tensorrt.plan_cache import PlanEntry, PlanKey, gpu_name, write_plan
from pi05_ros.backends.tensorrt.precision import engine_layers
from pi05_ros.backends.tensorrt.runner import Engine, Execution
from pi05_ros.errors import BackendError

GPU = gpu_name("Orin", (8, 7), 16)
INPUTS = (TensorSpec("image_tokens", "float32", ("image_rows", 8), (1, 8), (4, 8), (6, 8)),
          TensorSpec("tokens", "int32", ("text_rows",), (1,), (3,), (5,)))
OUTPUTS = (TensorSpec("keys", "float32", (2, "prefix_rows", 4), (2, 2, 4), (2, 7, 4), (2, 11, 4)),)
ADDRESSES = {"image_tokens": 0x1000, "tokens": 0x2000, "keys": 0x3000}
SHAPES = {"image_tokens": (4, 8), "tokens": (3,)}
MEMORY = 0x100000


def api_of(script):
    return Api(script.flavour, script.module, script.version)


def entry_in(directory, script, gpu=GPU, plan=None, **changes):
    key = PlanKey("prefix", "hash", {}, {"dtype": "float32"}, script.flavour, script.version, gpu)
    key = replace(key, **changes)
    entry = PlanEntry(key, "", "", 0, INPUTS, OUTPUTS, {}, {})
    return write_plan(directory, entry, plan_of(INPUTS, OUTPUTS) if plan is None else plan)


@pytest.fixture(params=scripted_tensorrt.RELEASES)
def script(request):
    return Script(request.param)


def test_every_release_runs_in_the_order_that_tensorrt_wants(tmp_path, script):
    execution = Execution(Engine(api_of(script), entry_in(tmp_path, script), GPU), ADDRESSES, SHAPES, MEMORY)
    bound = list(script.calls)
    execution.enqueue(77)
    execution.enqueue(78)
    first = script.names().index
    assert (first("Runtime") < first("deserialize_cuda_engine") < first("create_context")
            < first("set_tensor_address") < first("set_input_shape"))
    memory = [call for call in bound if "device_memory" in call[0]]
    assert [call[1] for call in memory] == [MEMORY] and bound.index(memory[0]) < first("set_tensor_address")
    assert {call[1:] for call in bound if call[0] == "set_tensor_address"} == set(ADDRESSES.items())
    assert {call[1:] for call in bound if call[0] == "set_input_shape"} == set(SHAPES.items())
    # Once bound, running is one call, on the stream that is asked for.
    assert script.calls[len(bound):] == [("execute_async_v3", 77), ("execute_async_v3", 78)]


def test_two_executions_of_one_engine_have_contexts_of_their_own(tmp_path, script):
    ran = []
    script.compute = lambda graph, addresses, shapes: ran.append((addresses["keys"], shapes["tokens"]))
    engine = Engine(api_of(script), entry_in(tmp_path, script), GPU)
    one = Execution(engine, ADDRESSES, SHAPES, MEMORY)
    two = Execution(engine, ADDRESSES | {"keys": 0x9000}, SHAPES | {"tokens": (5,)}, 2 * MEMORY)
    for execution, stream in ((one, 1), (two, 2), (one, 1)):
        execution.enqueue(stream)
    assert ran == [(0x3000, (3,)), (0x9000, (5,)), (0x3000, (3,))]
    assert script.names().count("create_context") == 2 and script.names().count("deserialize_cuda_engine") == 1


def test_every_context_of_8_6_is_given_the_profile_before_its_tensors(tmp_path, script):
    engine = Engine(api_of(script), entry_in(tmp_path, script), GPU)
    held = [Execution(engine, ADDRESSES, SHAPES, MEMORY, stream) for stream in (5, 6, 7)]
    given = [call for call in script.calls if call[0] == "set_optimization_profile_async"]
    assert given == ([("set_optimization_profile_async", 0, stream) for stream in (6, 7)]
                     if script.version == "8.6.0" else [])
    for execution in held:  # the stand-in lets nothing be bound before
        execution.enqueue(9)
    if script.version == "8.6.0":
        script.fails, script.words = {"set_optimization_profile_async"}, "Profile 0 has been chosen by another"
        with pytest.raises(BackendError, match="an execution context, received Profile 0 has been chosen by another"):
            Execution(engine, ADDRESSES, SHAPES, MEMORY)


def test_an_engine_is_inspected_with_shapes_without_which_it_tells_no_types(tmp_path, script):
    engine = Engine(api_of(script), entry_in(tmp_path, script), GPU)
    assert [layer.types for layer in engine_layers(engine.inspect())] == [("float16",)]
    script.fails = {"create_context"}
    assert [layer.types for layer in engine_layers(engine.inspect())] == [()]


def test_what_an_execution_needs_lives_as_long_as_it(tmp_path, script):
    execution = Execution(Engine(api_of(script), entry_in(tmp_path, script), GPU), ADDRESSES, SHAPES, MEMORY)
    gc.collect()  # the stand-in's context asserts that engine, runtime and logger are still there
    execution.enqueue(5)
    logger = script.logger
    del execution
    gc.collect()
    assert logger() is None


def test_shapes_change_between_two_runs(tmp_path, script):
    ran = []
    script.compute = lambda graph, addresses, shapes: ran.append(shapes["tokens"])
    execution = Execution(Engine(api_of(script), entry_in(tmp_path, script), GPU), ADDRESSES, SHAPES, MEMORY)
    for rows in (5, 1):
        execution.set_shapes(SHAPES | {"tokens": (rows,)})
        execution.enqueue(1)
    assert ran == [(5,), (1,)] and script.names().count("set_tensor_address") == 3


@pytest.mark.parametrize("tokens", [(0,), (6,), (3, 1), ()])
def test_a_shape_outside_the_profile_is_refused_before_tensorrt_sees_it(tmp_path, tokens):
    script = Script()
    engine = Engine(api_of(script), entry_in(tmp_path, script), GPU)
    with pytest.raises(BackendError, match=r"shape of 'tokens': expected \[1\] to \[5\]"):
        Execution(engine, ADDRESSES, SHAPES | {"tokens": tokens}, MEMORY)
    assert ("set_input_shape", "tokens", tokens) not in script.calls


@pytest.mark.parametrize(("changes", "memory", "words"), [
    ({"keys": 0}, MEMORY, "binding 'keys'"), ({}, 0, "memory of engine"), ({}, MEMORY + 4, "multiple of 256")])
def test_addresses_that_cannot_be_right_are_refused(tmp_path, changes, memory, words):
    script = Script()
    engine = Engine(api_of(script), entry_in(tmp_path, script), GPU)
    with pytest.raises(BackendError, match=words):
        Execution(engine, ADDRESSES | changes, SHAPES, memory)
    assert "execute_async_v3" not in script.names()


@pytest.mark.parametrize(("changes", "cause", "words"), [
    ({"version": "10.7.0"}, "engine_version", "built by the installed TensorRT 10.3.0, received one built by 10.7.0"),
    ({"gpu": gpu_name("Thor", (11, 0), 20)}, "engine_gpu", "for this GPU .*Orin.*received one built for Thor"),
    ({"gpu": "sm_89"}, "engine_gpu", "received one built for sm_89"),
    ({"flavour": "tensorrt_rtx"}, "engine_flavour", "received one of 'tensorrt_rtx'")])
def test_engines_of_elsewhere_are_refused_without_being_loaded(tmp_path, changes, cause, words):
    script = Script()
    with pytest.raises(BackendError, match=words) as raised:
        Engine(api_of(script), entry_in(tmp_path, script, **changes), GPU)
    assert raised.value.cause == cause and "pi05 build" in str(raised.value) or cause == "engine_flavour"
    assert not script.calls


def test_an_engine_for_a_compute_capability_runs_on_every_gpu_of_it(tmp_path):
    script = Script("1.7.1.116")
    Engine(api_of(script), entry_in(tmp_path, script, gpu="sm_87"), GPU)


@pytest.mark.parametrize(("call", "words", "advice"), [
    ("deserialize_cuda_engine", "Cuda Runtime (out of memory)", "Close other programs"),
    ("deserialize_cuda_engine", "Serialization assertion magic failed", "report the log"),
    ("create_context", "Error Code 2: OutOfMemory", "Close other programs"),
    ("set_input_shape", "dimension mismatch", "pi05 build"),
    ("execute_async_v3", "CUDA error 700: an illegal memory access", "report the log")])
def test_what_fails_in_tensorrt_is_told_in_its_own_words(tmp_path, script, call, words, advice):
    script.fails, script.words = {call}, words
    with pytest.raises(BackendError) as raised:
        Execution(Engine(api_of(script), entry_in(tmp_path, script), GPU), ADDRESSES, SHAPES, MEMORY).enqueue(9)
    assert words in str(raised.value) and advice in str(raised.value)
    assert script.names()[-1] == call


@pytest.mark.parametrize("change", [
    lambda i, o: plan_of(i[:1], o), lambda i, o: plan_of((*i, replace(i[0], name="more")), o),
    lambda i, o: plan_of((i[0], replace(i[1], dtype="float32")), o),
    lambda i, o: plan_of(i, (replace(o[0], shape=(2, "prefix_rows", 5)),)),
    lambda i, o: plan_of(i, (*o, replace(o[0], name="more")))])
def test_bindings_are_compared_with_the_description(tmp_path, change):
    script = Script()
    with pytest.raises(BackendError, match="binding|bindings"):
        Engine(api_of(script), entry_in(tmp_path, script, plan=change(INPUTS, OUTPUTS)), GPU)


def test_an_engine_that_needs_no_memory_gets_none(tmp_path, script):
    entry = entry_in(tmp_path, script, plan=plan_of(INPUTS, OUTPUTS, memory=0))
    Execution(Engine(api_of(script), entry, GPU), ADDRESSES, SHAPES, 0).enqueue(1)
    assert not [name for name in script.names() if "device_memory" in name]


def test_rtx_compiles_as_it_is_told_and_leaves_graphs_to_us(tmp_path, monkeypatch):
    script = Script("1.7.1.116")
    entry = entry_in(tmp_path, script)
    for value, wanted in ((None, "none"), ("eager", "eager"), ("lazy", "lazy")):
        if value:
            monkeypatch.setenv("PI05_RTX_SPECIALISE", value)
        config = Engine(api_of(script), entry, GPU)._runtime_config
        assert config.dynamic_shapes_kernel_specialization_strategy == wanted
        assert config.cuda_graph_strategy == "disabled"
    execution = Execution(Engine(api_of(script), entry, GPU), ADDRESSES, SHAPES, MEMORY)
    monkeypatch.setenv("PI05_RTX_SPECIALISE", "always")
    with pytest.raises(BackendError, match="none, lazy or eager"):
        Engine(api_of(script), entry, GPU)
    assert execution.capturable(3)
    script.fails = {"is_stream_capturable"}
    assert not execution.capturable(3)


RUNNER_FILES = ("api", "build", "build_log", "build_plans", "names", "plan_cache", "precision", "runner", "select",
                "weak_types")


def test_the_runner_needs_neither_pytorch_nor_a_newer_python():
    folder = Path(pi05_ros.__file__).parent
    for name in RUNNER_FILES:
        ast.parse((folder / "backends/tensorrt" / f"{name}.py").read_text(), feature_version=(3, 10))
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy', 'tensorrt')))"
    imports = "; ".join(f"import pi05_ros.backends.tensorrt.{name}" for name in RUNNER_FILES)
    subprocess.run([sys.executable, "-c", f"{blocked}; {imports}"], check=True, cwd=folder.parent)


def test_the_stand_in_has_only_names_that_tensorrt_rtx_has():
    real = pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra tensorrt_rtx (x86 Linux)")
    script = Script("1.7.1.116")
    for name, stand_in in script.classes.items():
        assert {each for each in vars(stand_in) if not each.startswith("_")} <= set(dir(getattr(real, name))), name
    assert set(vars(script.module)) <= set(dir(real))
    assert set(script.module.NetworkDefinitionCreationFlag.__members__) == set(
        real.NetworkDefinitionCreationFlag.__members__)


def test_the_stand_in_differs_between_releases():
    surfaces = [{name for name in vars(Script(version).module)} for version in scripted_tensorrt.RELEASES]
    flags = [tuple(Script(version).module.NetworkDefinitionCreationFlag.__members__)
             for version in scripted_tensorrt.RELEASES]
    assert len(set(flags)) == 3 and any(a != b for a, b in itertools.pairwise(surfaces))
