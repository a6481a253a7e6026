"""The stages on engines against the eager forward: the stand-in of TensorRT computes with the exported modules."""

import ctypes
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripted_tensorrt import RELEASES, Script, plan_of

from pi05_ros.backends import base, eager
from pi05_ros.backends.tensorrt import engine_arrays, executions
from pi05_ros.backends.tensorrt.api import Api
from pi05_ros.backends.tensorrt.executions import StageEngine
from pi05_ros.backends.tensorrt.names import STAGE_GRAPHS
from pi05_ros.backends.tensorrt.plan_cache import PlanEntry, PlanKey, write_plan
from pi05_ros.backends.tensorrt.programs import ExportOptions, bindings, module_of
from pi05_ros.backends.tensorrt.runner import Engine
from pi05_ros.backends.tensorrt.stages import TensorRtStages
from pi05_ros.config import tiny_config
from pi05_ros.errors import BackendError
from pi05_ros.model import weights
from pi05_ros.model.fingerprint import fingerprint
from pi05_ros.model.recipe import RecipeSource
from pi05_ros.runtime.forward import Forward, Given
from pi05_ros.runtime.timing import StageTimer
from pi05_ros.schema import Guidance, ModelInputs

CONFIG, CPU = tiny_config(), torch.device("cpu")
OPTIONS = ExportOptions(cameras=3, tokens=48, steps=3)
ALIKE = dict(rtol=1e-4, atol=1e-5)


def at(address, shape, dtype):
    """The tensor at an address."""
    size = math.prod(shape) * torch.tensor([], dtype=dtype).element_size()
    return torch.frombuffer((ctypes.c_byte * size).from_address(address), dtype=dtype).view(shape)


@pytest.fixture(scope="module")
def modules():
    """Graph to the module that is exported for it."""
    made = {}
    for name, stage in (("vision", "vision"), ("prefix", "prefix"), ("modulation", "expert"), ("step", "expert"),
                        ("loop", "expert")):
        model = weights.load(RecipeSource(CONFIG), CPU, torch.float32, [stage])
        made[name] = module_of(name, model, OPTIONS)
    return made


@pytest.fixture(scope="module")
def reference():
    return eager.build(base.STAGES, RecipeSource(CONFIG), CPU, "float32", "pil", None)


@pytest.fixture
def make(tmp_path, modules):
    """(graphs, version of TensorRT) to the stages, with the script of the calls."""

    def stages(graphs=(*STAGE_GRAPHS["vision"], *STAGE_GRAPHS["prefix"], *STAGE_GRAPHS["expert"]), version="10.3.0"):
        specs = bindings(CONFIG, OPTIONS)

        def compute(graph, addresses, shapes):
            inputs, outputs = specs[graph]
            with torch.no_grad():
                made = modules[graph](*(at(addresses[s.name], shapes[s.name], getattr(torch, s.dtype)) for s in inputs))
            made = dict(zip(outputs, made if isinstance(made, tuple) else (made,), strict=True))
            for spec, tensor in made.items():
                at(addresses[spec.name], tensor.shape, getattr(torch, spec.dtype)).copy_(tensor)
            return {spec.name: tuple(tensor.shape) for spec, tensor in made.items()}

        script = Script(version, compute)
        api, engines = Api(script.flavour, script.module, version), {}
        for graph in graphs:
            inputs, outputs = specs[graph]
            key = PlanKey(graph, "", {}, {"dtype": "float32"}, script.flavour, version, "sm_87")
            entry = PlanEntry(key, "", "", 0, inputs, outputs, asdict(CONFIG), {}, 3 if graph == "loop" else None)
            entry = write_plan(tmp_path, entry, plan_of(inputs, outputs, graph))
            engines[graph] = StageEngine(Engine(api, entry, "sm_87"), CPU, capture=False)
        return TensorRtStages(CONFIG, engines, CPU, "pil"), script

    return stages


def observation(cameras, tokens, seed=0):
    rng = np.random.default_rng(seed)
    frames = [rng.integers(0, 256, (1, 60, 80, 3), dtype=np.uint8) for _ in range(cameras)]
    return ModelInputs(frames, np.ones((1, cameras), bool), rng.integers(3, 512, (1, tokens)),
                       np.ones((1, tokens), bool), rng.uniform(-1, 1, (1, 32)).astype(np.float32))


def run(stages, cameras, tokens, steps, guidance=None, seed=0):
    """Image tokens, keys, values, actions."""
    inputs = observation(cameras, tokens, seed)
    noise = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((1, 10, 32), dtype=np.float32))
    images = stages.encode_images(stages.prepare_images(inputs.frames)).clone()
    cache = stages.prefill(images, *map(torch.from_numpy, (inputs.image_mask, inputs.tokens, inputs.token_mask)))
    keys, values = cache.keys.clone(), cache.values.clone()
    return images, keys, values, stages.denoise(cache, noise, steps, torch.from_numpy(inputs.state), guidance)


@pytest.mark.parametrize("version", RELEASES)
@pytest.mark.parametrize(("cameras", "tokens", "steps"), [(3, 48, 10), (1, 1, 1), (2, 17, 3)])
def test_the_stages_give_what_eager_gives(make, reference, version, cameras, tokens, steps):
    stages, _ = make(version=version)
    for ours, expected in zip(run(stages, cameras, tokens, steps), run(reference, cameras, tokens, steps), strict=True):
        assert ours.shape == expected.shape and ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, **ALIKE)


def test_shapes_and_steps_change_from_chunk_to_chunk(make, reference):
    stages, script = make()
    for seed, shape in enumerate([(3, 48, 3), (1, 20, 3), (1, 20, 1), (3, 48, 3), (2, 1, 10)]):
        ours, expected = run(stages, *shape, seed=seed)[3], run(reference, *shape, seed=seed)[3]
        torch.testing.assert_close(ours, expected, **ALIKE)
    # One context a graph; addresses are bound once, whatever the shapes; modulations only when the steps changed.
    assert script.names().count("create_context") == 4 and script.names().count("set_tensor_address") == 15
    assert script.names().count("execute_async_v3") == 5 * 2 + (3 + 3 + 1 + 3 + 10) + 4


def test_guidance_with_the_identity_jacobian(make, reference):
    stages, _ = make()
    previous = np.random.default_rng(3).standard_normal((1, 10, 32)).astype(np.float32)
    guidance = Guidance(previous, delay=2, end=7)
    ours, expected = (run(each, 2, 9, 5, guidance)[3] for each in (stages, reference))
    torch.testing.assert_close(ours, expected, **ALIKE)
    for other in (replace(guidance, jacobian="vjp"), replace(guidance, trained=True)):
        with pytest.raises(BackendError, match="expert=eager"):
            run(stages, 2, 9, 5, other)


def test_the_loop_is_one_engine_for_its_number_of_steps(make, reference):
    stages, _ = make(("vision", "prefix", "loop"))
    torch.testing.assert_close(run(stages, 2, 9, 3)[3], run(reference, 2, 9, 3)[3], **ALIKE)
    with pytest.raises(BackendError, match="expected 3 steps without guidance, received 10 steps"):
        run(stages, 2, 9, 10)


@pytest.mark.parametrize("choice", [{"vision"}, {"prefix"}, {"expert"}, {"vision", "expert"}])
def test_every_mix_with_another_backend(make, reference, choice):
    stages, _ = make()
    chosen = {name: stages if name in choice else reference for name in base.STAGES}
    mixed = base.StageSet(**chosen, config=CONFIG, device=CPU, names={})
    noise = np.random.default_rng(8).standard_normal((1, 10, 32)).astype(np.float32)

    def actions(of):
        forward = Forward(of, Given(observation(2, 11), noise), 3, StageTimer(CPU))
        return forward.expert(forward.prefix(forward.vision()))

    whole = base.StageSet(*[reference] * 4, config=CONFIG, device=CPU, names={})
    torch.testing.assert_close(actions(mixed), actions(whole), **ALIKE)


def test_masked_positions_are_refused_and_never_become_actions(make, reference):
    stages, _ = make()
    inputs = observation(2, 5)
    padded = replace(inputs, token_mask=np.zeros((1, 5), bool))  # an empty prompt: trimming keeps one slot
    both = base.StageSet(images=reference, vision=stages, prefix=stages, expert=stages, config=CONFIG, device=CPU,
                         names={})
    noise = np.zeros((1, 10, 32), np.float32)
    with pytest.raises(BackendError, match="masked positions"):
        Forward(both, Given(padded, noise), 3, StageTimer(CPU)).prefix(torch.empty(0))
    images = stages.encode_images(stages.prepare_images(inputs.frames))
    mask = torch.tensor([[True, False]])
    cache = stages.prefill(images, mask, torch.from_numpy(inputs.tokens), torch.from_numpy(inputs.token_mask))
    assert cache.keys[-1].isnan().all() and stages.denoise(cache, torch.from_numpy(noise), 1).isnan().all()


class RecordedGraphs:
    """Stands for `StageGraphs`: runs the work once for warming up and once for capturing, then on every replay."""

    made: list[object] = []

    def __init__(self, works, device):
        ((self.key, self.work),) = works
        self.made.append(self.key)
        self.work(), self.work()

    def replay(self, key):
        assert key == self.key
        self.work()


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(executions, "StageGraphs", RecordedGraphs)
    monkeypatch.setattr(executions.torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(RecordedGraphs, "made", [])
    return RecordedGraphs.made


def test_a_shape_gets_a_graph_and_a_context_of_its_own_the_second_time(make, capturing):
    stages, script = make(("vision",))
    engine = stages.engines["vision"]
    engine._capture = True
    pixels = {n: {"pixels": (n, 3, 224, 224)} for n in (1, 2, 3)}
    for count, (cameras, graphs, contexts) in enumerate([(1, 0, 1), (2, 0, 1), (1, 1, 2), (1, 1, 2), (2, 2, 3),
                                                        (3, 2, 3), (1, 2, 3)]):
        engine.run(pixels[cameras])
        assert (len(capturing), script.names().count("create_context")) == (graphs, contexts), count
    shared = {call[1] for call in script.calls if call[0] == "set_device_memory"}
    assert len(shared) == 1 and script.names().count("set_input_shape") == 1 + 1 + 1 + 1 + 1


def test_only_so_many_shapes_get_a_graph(make, capturing, monkeypatch):
    monkeypatch.setattr(executions, "MOST_GRAPHS", 2)
    stages, _ = make(("prefix",))
    engine = stages.engines["prefix"]
    engine._capture = True
    for tokens in (3, 4, 5, 3, 4, 5, 5):
        engine.run({"image_tokens": (256, 96), "tokens": (tokens,)})
    assert [dict(key)["tokens"] for key in capturing] == [(3,), (4,)]


def test_vision_is_captured_when_it_is_loaded(make, capturing):
    stages, _ = make(("vision",))
    stages.engines["vision"]._capture = True
    stages.prepare()
    assert [dict(key)["pixels"][0] for key in capturing] == [1, 2, 3]


def test_a_context_that_may_not_be_captured_is_enqueued(make, capturing):
    stages, script = make(("vision",), "1.7.1.116")
    stages.engines["vision"]._capture, script.fails = True, {"is_stream_capturable"}
    for _ in range(3):
        stages.engines["vision"].run({"pixels": (1, 3, 224, 224)})
    assert not capturing and script.names().count("execute_async_v3") == 3


def test_a_capture_that_fails_says_how_to_go_without(make, capturing, monkeypatch):
    def fails(works, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(executions, "StageGraphs", fails)
    stages, _ = make(("vision",))
    stages.engines["vision"]._capture = True
    with pytest.raises(BackendError, match="PI05_TENSORRT_GRAPHS=0"):
        stages.prepare()
    monkeypatch.setenv("PI05_TENSORRT_GRAPHS", "0")
    assert not executions.graphs_wanted()


def test_engines_called_with_arrays(make, modules):
    stages, _ = make(("prefix",))
    rng = np.random.default_rng(2)
    for images, tokens in ((512, 7), (256, 48)):
        given = {"image_tokens": rng.standard_normal((images, 96), dtype=np.float32),
                 "tokens": rng.integers(0, 512, tokens).astype(np.int32)}
        found = engine_arrays.call(stages.engines["prefix"], given)
        with torch.no_grad():
            keys, values = modules["prefix"](*map(torch.from_numpy, given.values()))
        np.testing.assert_allclose(found["keys"], keys.numpy(), **ALIKE)
        np.testing.assert_allclose(found["values"], values.numpy(), **ALIKE)


def test_the_engine_of_an_export_is_the_one_of_its_weights(make, tmp_path):
    stages, script = make(("prefix", "vision"))
    engine, api = stages.engines["prefix"].engine, stages.engines["prefix"].engine.api
    assert engine_arrays.entry_of("", "prefix", api, "Orin, sm_87, 16 SMs", tmp_path) == engine.entry
    for weights_hash, gpu in (("other", "sm_87"), ("", "sm_89")):
        with pytest.raises(BackendError, match="received 0. Run `pi05 build`"):
            engine_arrays.entry_of(weights_hash, "prefix", api, gpu, tmp_path)


def test_what_is_larger_than_the_engine_is_refused(make):
    stages, _ = make()
    with pytest.raises(BackendError, match="--cameras"):
        stages.encode_images(torch.zeros(1, 4, 3, 224, 224))
    with pytest.raises(BackendError, match="batch"):
        stages.encode_images(torch.zeros(2, 1, 3, 224, 224))


def test_a_full_device_says_what_it_needs(make, monkeypatch):
    stages, _ = make(("vision",))

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(executions.torch, "zeros", full)
    with pytest.raises(BackendError, match="GPU memory.*Close other programs"):
        StageEngine(stages.engines["vision"].engine, CPU, capture=False)


def test_the_backend_needs_a_gpu():
    with pytest.raises(BackendError, match="backend 'tensorrt_rtx': expected a CUDA device"):
        base.build("vision=tensorrt_rtx", RecipeSource(CONFIG))


def test_fingerprints_tell_weights_apart():
    ours = fingerprint(RecipeSource(CONFIG))
    assert ours == fingerprint(RecipeSource(replace(CONFIG, action_horizon=7)))
    assert len({ours, fingerprint(RecipeSource(CONFIG, seed=1)),
                fingerprint(RecipeSource(tiny_config(vision=replace(CONFIG.vision, depth=3))))}) == 3
