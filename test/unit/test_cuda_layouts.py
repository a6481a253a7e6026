"""The persistent expert's weights in memory: nothing is lost, and threads find what they read."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pi05_ros.backends.cuda import persistent
from pi05_ros.backends.cuda.layouts import PackedLayers
from pi05_ros.backends.cuda.persistent import Misfit, chosen_expert
from pi05_ros.config import Pi05Config, tiny_config
from pi05_ros.errors import BackendError


@dataclass
class Layer:
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(torch.seed() % 2**31)
    shapes = ((2560, 1024), (1024, 2048), (8192, 1024), (1024, 4096))
    return Layer(*(torch.randn(shape).bfloat16() for shape in shapes))


@pytest.mark.parametrize("clusters", [15, 16])
def test_rows_come_back(layer, clusters):
    packed = PackedLayers(2, clusters, torch.device("cpu"))
    packed.append(Layer(*(torch.zeros_like(w) for w in vars(layer).values())))
    packed.append(layer)
    for name, weight in vars(layer).items():
        assert torch.equal(packed.rows(name, 1), weight) and not packed.rows(name, 0).any()


@pytest.mark.parametrize("clusters", [15, 16])
def test_rows_come_back_in_fp8(layer, clusters):
    low = {name: w if name == "out" else w.to(torch.float8_e4m3fn) for name, w in vars(layer).items()}
    packed = PackedLayers(1, clusters, torch.device("cpu"), low=True)
    packed.append(SimpleNamespace(**low, scales=torch.tensor([1.0, 2, 3, 4, 5, 6, 7])))
    factors = {"qkv": torch.tensor([1.0, 2, 3]).repeat_interleave(torch.tensor([2048, 256, 256])),
               "gate_up": torch.tensor([4.0, 5]).repeat_interleave(4096)}
    for name, weight in low.items():
        expected = weight.float() * factors[name][:, None] if name in factors else weight.float()
        assert torch.equal(packed.rows(name, 0).float(), expected)
    wide = PackedLayers(1, clusters, torch.device("cpu")).tensors
    assert 2 * packed.tensors["gate_up"].nbytes == wide["gate_up"].nbytes


def test_a_slot_holds_its_rows_and_k(layer):
    """Thread q of four gets the sums of the rows at 8 j + 2 q and the next: of neighbours in the result."""
    packed = PackedLayers(1, 15, torch.device("cpu"))
    packed.append(layer)
    down = packed.tensors["down"][0][2, 3].view(4, 16, 72, 8)[1, 5]  # cluster 2, block 3; the second slot of 128 k
    k = slice(3 * 512 + 128 + 40, 3 * 512 + 128 + 48)
    for j, q, row in ((0, 3, 24), (3, 1, 14), (4, 0, 32), (7, 2, 54), (8, 3, 70)):
        assert torch.equal(down[8 * j + 2 * q:8 * j + 2 * q + 2], layer.down[2 * 72 + row:2 * 72 + row + 2, k])
    gate_up = packed.tensors["gate_up"][0][7, 0][2]  # block 7 has features 252 to 287
    for j, q, feature in ((0, 0, 252), (5, 1, 265), (7, 3, 283), (8, 2, 286)):
        assert torch.equal(gate_up[8 * j + 2 * q], layer.gate_up[feature, 16:24])
        assert torch.equal(gate_up[8 * j + 2 * q + 1], layer.gate_up[4096 + feature, 16:24])
    qkv = packed.tensors["qkv"][0][3 * 8 + 2, 0][127]  # head 3, block 2: features 32 to 47 and 160 to 175
    for j, q, feature in ((0, 1, 36), (1, 1, 38), (2, 3, 172), (3, 0, 162)):
        assert torch.equal(qkv[8 * j + 2 * q], layer.qkv[3 * 256 + feature, 1016:])


def test_what_is_over_is_zero(layer):
    packed = PackedLayers(1, 15, torch.device("cpu"))
    packed.append(layer)
    last = packed.tensors["out"][0][14]  # has columns 1008 to 1023: two of four threads, in the first four j
    assert not last[:, :, 32:].any() and not last[:, :, :32].unflatten(2, (4, 4, 2))[:, :, :, 2:].any()
    assert last[:, :, :32].unflatten(2, (4, 4, 2))[:, :, :, :2].all()


@pytest.mark.parametrize(("wish", "made"), [(None, None), ("portable", None), ("persistent", Misfit),
                                            ("fast", BackendError)])
def test_a_model_that_does_not_fit_runs_on_the_portable_kernels(monkeypatch, caplog, wish, made):
    monkeypatch.delenv("PI05_EXPERT", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, name="a GPU"))
    if wish:
        monkeypatch.setenv("PI05_EXPERT", wish)
    caplog.set_level("INFO")
    if made is None:
        assert chosen_expert(tiny_config(), torch.device("cuda")) is None
        assert ("portable kernels" in caplog.text) == (wish is None)  # said where nobody chose
        return
    with pytest.raises(made) as refused:
        chosen_expert(tiny_config(), torch.device("cuda"))
    assert type(refused.value) is made


def test_a_gpu_with_too_few_clusters_runs_the_portable_kernels(monkeypatch):
    monkeypatch.delenv("PI05_EXPERT", raising=False)
    gpu = SimpleNamespace(major=9, name="half a GPU", shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    probe = SimpleNamespace(kernel=lambda *_: SimpleNamespace(max_clusters=lambda *_: 14))
    monkeypatch.setattr(persistent, "Program", lambda *_: probe)
    assert chosen_expert(Pi05Config(), torch.device("cuda")) is None
