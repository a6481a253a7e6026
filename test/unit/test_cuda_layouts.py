"""The persistent expert's weights in memory: nothing is lost, and threads find what they read."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pi05_ros.backends.cuda import persistent
from pi05_ros.backends.cuda.layouts import PackedLayers
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


def test_a_thread_finds_its_row_and_eight_neighbours_of_k(layer):
    packed = PackedLayers(1, 15, torch.device("cpu"))
    packed.append(layer)
    down = packed.tensors["down"][0][2, 3].view(4, 9, 128, 8)  # cluster 2, block 3: k's block, tiles of 8, threads
    warp, r, q = 2, 5, 3  # warp: the quarter of this block's 512 of k
    k = 3 * 512 + warp * 128 + 1 * 32 + q * 8
    tile_0 = packed.tensors["down"][0][2, 3].view(4, -1)[1].view(-1, 8)
    assert torch.equal(tile_0[warp * 32 + r * 4 + q], layer.down[2 * 72 + r, k:k + 8])
    assert torch.equal(tile_0[4 * 256 + warp * 32 + r * 4 + q], layer.down[2 * 72 + 64 + r, k:k + 8])  # the extra tile
    assert down.numel() == 72 * 512
    gate_up = packed.tensors["gate_up"][0][7, 0].view(8, -1, 8)  # block 7 has features 252 to 287
    assert torch.equal(gate_up[0][0], layer.gate_up[252, :8])
    assert torch.equal(gate_up[0][4], layer.gate_up[4096 + 252, :8])  # gate and up take turns


def test_what_is_over_is_zero(layer):
    packed = PackedLayers(1, 15, torch.device("cpu"))
    packed.append(layer)
    beyond = packed.tiles["out"].unpack(packed.tensors["out"][0])
    assert beyond.shape == layer.out.shape and packed.tensors["out"].count_nonzero() <= layer.out.count_nonzero()


def test_the_kernel_runs_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("PI05_EXPERT", raising=False)
    assert not persistent.asked_for()
    monkeypatch.setenv("PI05_EXPERT", "persistent")
    assert persistent.asked_for()
    monkeypatch.setenv("PI05_EXPERT", "fast")
    with pytest.raises(BackendError, match="portable or persistent"):
        persistent.asked_for()
