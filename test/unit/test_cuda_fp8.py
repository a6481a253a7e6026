"""FP8 in the CUDA backend, as far as no GPU is needed: which layers run how, packed weights, memory, refusals."""

import dataclasses
from collections import Counter
from dataclasses import replace

import pytest
import torch
from fp8_models import SMALL, MetaSource, described, small_source
from test_cuda_tables import tensors

from pi05_ros.backends import base
from pi05_ros.backends.cuda import checks, packing
from pi05_ros.backends.cuda.quantised import (
    IN_BF16,
    IN_FP8,
    check_quantisation,
    how_layers_run,
    plain_source,
)
from pi05_ros.config import Pi05Config, tiny_config
from pi05_ros.errors import BackendError, CheckpointError
from pi05_ros.model.low_precision import FP8
from pi05_ros.model.weights import openpi_name

CPU, STAGES, FULL = torch.device("cpu"), ["vision", "prefix", "expert"], Pi05Config()
ADA, HOPPER = (8, 9), (9, 0)


@pytest.fixture(scope="module")
def source():
    return small_source("fp8")


def pack(source, host_embedding=False):
    runs = how_layers_run(source.quantisation, source.config, STAGES, ADA)
    low = [name for name, how in runs.items() if how == IN_FP8]
    return packing.pack(plain_source(source, runs), CPU, STAGES, None, 0, low, host_embedding), runs


@pytest.mark.parametrize(("gpu", "recipe", "fp8", "wider"), [
    (ADA, "fp8_mlp", 3 * 17, 0), (ADA, "fp8", 7 * 17 + 2 + 6 * 27, 7 * 18),
    (HOPPER, "fp8_mlp", 3 * 17, 0), (HOPPER, "fp8", 7 * 17 + 2 + 5 * 27, 7 * 18 + 27)])
def test_every_layer_says_how_it_runs(gpu, recipe, fp8, wider):
    runs = how_layers_run(described(FULL, recipe), FULL, STAGES, gpu)
    assert Counter(runs.values()) == Counter({how: n for how, n in ((IN_FP8, fp8), (IN_BF16, wider)) if n})
    assert all(name.startswith("action_expert.") or gpu == HOPPER and name.endswith(".out_proj")
               for name, how in runs.items() if how == IN_BF16)
    assert not how_layers_run(described(FULL, recipe), FULL, ["images"], gpu)
    assert not how_layers_run(None, FULL, STAGES, gpu)


def test_layers_that_one_product_merges_are_in_fp8_together_or_not_at_all():
    quantisation, up = described(FULL, "fp8"), "language_model.layers.3.mlp.up_proj"
    rest = {name: layer for name, layer in quantisation.layers.items() if name != up}
    runs = how_layers_run(replace(quantisation, layers=rest), FULL, STAGES, ADA)
    assert [name for name, how in runs.items() if how == IN_BF16 and "language_model" in name] == [
        up.replace("up", "gate"), up.replace("up", "down")]
    tiny = how_layers_run(described(tiny_config(), "fp8"), tiny_config(), STAGES, ADA)  # its vision tower is 72 wide
    assert {how for name, how in tiny.items() if "vision" in name} == {IN_BF16}


def test_what_no_kernel_multiplies_is_refused_by_name():
    for recipe, layer in (("balanced", "nvfp4"), ("fp8_token", "fp8_token")):
        with pytest.raises(BackendError, match=rf"_proj in {layer}|fc1 in {layer}|fc2 in {layer}"):
            check_quantisation(described(FULL, recipe), FULL, STAGES, HOPPER)
    with pytest.raises(BackendError, match=r"received 8\.6"):
        check_quantisation(described(FULL, "fp8"), FULL, STAGES, (8, 6))
    for accepted in (described(FULL, "fp8"), described(FULL, "fp8_mlp"), None):
        check_quantisation(accepted, FULL, STAGES, (8, 9))
    check_quantisation(described(FULL, "fp8_mlp"), FULL, ["vision", "expert"], (8, 0))  # reads none of its layers


def test_packed_weights_are_the_stored_numbers_and_scales(source):
    packed, _ = pack(source)

    def stored(name, leaf="weight"):
        return source.tensors[f"{openpi_name(name)}.{leaf}"]

    layer, at = packed.prefix.layers[0], "language_model.layers.0."
    gate, up, down = (f"{at}mlp.{name}_proj" for name in ("gate", "up", "down"))
    assert layer.gate_up.weight.dtype == layer.qkv.weight.dtype == FP8
    assert torch.equal(layer.gate_up.weight.float(), torch.cat([stored(gate).float(), stored(up).float()]))
    seen = stored(gate, "input_scale")
    assert torch.equal(layer.gate_up.factors, torch.cat([
        stored(gate, "weight_scale") * seen, stored(up, "weight_scale") * seen, stored(down, "input_scale")]))
    assert layer.down.scale.shape == (1, 1) and layer.down.scale == stored(down, "weight_scale") * stored(
        down, "input_scale")
    q, k = (f"{at}self_attn.{name}_proj" for name in "qk")  # quantised with one scale
    assert layer.qkv.scale.shape == (1, 1) and layer.qkv.scale == stored(q, "weight_scale") * stored(q, "input_scale")
    k_alone, _ = pack(change(source, k, "weight_scale", lambda scale: 2 * scale))
    scale = k_alone.prefix.layers[0].qkv.scale
    assert scale.shape == (1, 320) and (scale[0, 256:288] == 2 * layer.qkv.scale).all()
    assert (scale[0, :256] == layer.qkv.scale).all() and (scale[0, 288:] == layer.qkv.scale).all()
    assert packed.vision.layers[1].fc1.bias.shape == (208,) and packed.vision.layers[1].fc1.norm[1].shape == (96,)
    q = "action_expert.layers.1.self_attn.q_proj"
    widened = (stored(q).float() * stored(q, "weight_scale")).bfloat16()
    assert torch.equal(packed.expert.layers[1].qkv[:len(widened)], widened)


def change(source, name, leaf, value):
    key = f"{openpi_name(name)}.{leaf}"
    return replace(source, tensors={**source.tensors, key: value(source.tensors[key])})


@pytest.mark.parametrize(("name", "leaf", "value", "message"), [
    ("language_model.layers.1.mlp.up_proj", "input_scale", lambda t: 2 * t, "1.mlp.gate_proj, which has the same"),
    ("language_model.layers.0.self_attn.v_proj", "input_scale", lambda t: t / 2, "q_proj, which has the same input"),
    ("vision_tower.encoder.layers.1.mlp.fc2", "input_scale", lambda t: t * float("nan"), "finite number above 0"),
    ("language_model.layers.0.mlp.down_proj", "weight_scale", lambda t: -t, "finite number above 0"),
    ("language_model.layers.0.mlp.gate_proj", "weight", lambda t: t.bfloat16(), "float8_e4m3fn"),
])
def test_scales_that_cannot_be_right_are_refused(source, name, leaf, value, message):
    with pytest.raises(CheckpointError, match=message):
        pack(change(source, name, leaf, value))


@pytest.mark.parametrize("recipe", ["fp8_mlp", "fp8"])
@pytest.mark.parametrize("host_embedding", [False, True])
def test_packed_weights_take_the_bytes_that_were_asked_for(recipe, host_embedding):
    packed, runs = pack(MetaSource(SMALL, recipe), host_embedding)
    on_gpu = dataclasses.replace(packed.prefix, embedding=torch.empty(0)) if host_embedding else packed.prefix
    counted = checks.weight_bytes(SMALL, STAGES, runs, host_embedding)
    taken = sum(t.nbytes for part in (packed.vision, on_gpu, packed.expert) for t in nested(part))
    dense = sum(t.nbytes for t in packed.expert.dense + packed.expert.dense_b)  # counted as float32, here bfloat16
    assert 0.97 * counted <= taken + dense <= counted


def nested(value):
    if isinstance(value, tuple):
        for part in value:
            yield from nested(part)
    elif dataclasses.is_dataclass(value) or isinstance(value, list):
        for part in vars(value).values() if dataclasses.is_dataclass(value) else value:
            yield from nested(part)
    else:
        yield from tensors(value)


@pytest.mark.parametrize(("gpu", "one_kernel"), [(ADA, False), (HOPPER, True)])
def test_full_size_in_fp8_needs_less_than_its_goal(gpu, one_kernel):
    runs = how_layers_run(described(FULL, "fp8"), FULL, STAGES, gpu, one_kernel)
    assert checks.bytes_needed(FULL, STAGES, runs, host_embedding=True) <= 4.6e9


def test_the_embedding_stays_on_the_host_for_quantised_models_and_where_there_is_no_room():
    needed = checks.bytes_needed(FULL, STAGES)
    runs = how_layers_run(described(FULL, "fp8_mlp"), FULL, STAGES, HOPPER)
    assert not checks.embedding_on_host(FULL, STAGES, {}, needed)
    assert checks.embedding_on_host(FULL, STAGES, {}, needed - 1)
    assert checks.embedding_on_host(FULL, STAGES, runs, needed)
    with pytest.raises(BackendError, match="6.5 GB free"):
        checks.embedding_on_host(FULL, STAGES, {}, needed - 2 * 10**9)
    with pytest.raises(BackendError, match="GPU memory"):  # no embedding among the stages: nothing to be saved
        checks.embedding_on_host(FULL, ["expert"], {}, checks.bytes_needed(FULL, ["expert"]) - 1)


def test_an_embedding_on_the_host_is_the_same_embedding(source):
    assert torch.equal(pack(source, True)[0].prefix.embedding, pack(source)[0].prefix.embedding)


def test_a_hybrid_tells_what_each_of_its_backends_does(source, monkeypatch):
    assert base.build("eager", source, "cpu", "float32").runs == {}
    from pi05_ros.backends import eager

    monkeypatch.setattr(eager.EagerStages, "runs", {"a": IN_FP8})
    built = base.build("eager", source, "cpu", "float32")
    assert built.runs == {"a": IN_FP8} and built.how_layers_run() == "1 layers FP8"
