"""How the persistent expert's weights lie in memory: block after block, as wgmma reads them (csrc/expert_products.cuh).

A slot of the kernel's ring is `columns` rows of a weight and 128 k of it (q, k, v: 32 rows and 256 k), as
[k / 8][row][8]. `out` and `down` split k over the 8 blocks of a cluster, which has the rows; of `qkv` and `gate_up` a
block has some rows and all of k. wgmma gives a thread q of four the sums of rows 8 j + 2 q and the next, for every j;
the rows lie so that these are neighbours in the result. In FP8 all but `out` are e4m3, [k / 16][row][16], and a slot is
256 k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pi05_ros.model.low_precision import FP8

WIDTH, MLP, HEADS, HEAD_DIM, CLUSTER = 1024, 4096, 8, 256, 8


def order(columns: int, run: int) -> list[int]:
    """Which row lies where, so that a thread has runs of that many neighbours; of the 8 rows that may be left, two."""
    whole = columns - columns % (4 * run)
    return [first + run * q + 2 * j + i for first in range(0, whole, 4 * run)
            for j in range(run // 2) for q in range(4) for i in (0, 1)] + list(range(whole, columns))


@dataclass(frozen=True)
class Slots:
    """A weight [rows, k] as `owners` groups of rows in `order`, k over `blocks` blocks; rows beyond are zeros. FP8 with
    `low`, else bfloat16."""

    rows: int
    k: int
    owners: int
    order: list[int]
    blocks: int
    low: bool = False

    @property
    def columns(self) -> int:
        return len(self.order)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.owners, self.blocks, self.k // self.blocks // self.unit, self.columns, self.unit

    @property
    def unit(self) -> int:
        """Numbers in 16 bytes."""
        return 16 if self.low else 8

    @property
    def dtype(self) -> torch.dtype:
        """FP8 as bytes, which PyTorch can pad and pick."""
        return torch.uint8 if self.low else torch.bfloat16

    def pack(self, weight: Tensor) -> Tensor:
        """[rows, k] of `dtype` to `shape`."""
        padded = F.pad(weight, (0, 0, 0, self.owners * self.columns - self.rows))
        ordered = padded.view(self.owners, self.columns, self.k)[:, self.order]
        return ordered.view(self.owners, self.columns, self.blocks, -1, self.unit).permute(0, 2, 3, 1, 4)

    def unpack(self, packed: Tensor) -> Tensor:
        """Back to [rows, k]."""
        ordered = packed.view(self.shape).permute(0, 3, 1, 2, 4).reshape(self.owners, self.columns, self.k)
        rows = torch.empty_like(ordered)
        rows[:, self.order] = ordered
        return rows.view(-1, self.k)[:self.rows]


class PackedLayers:
    """All layers of the expert, one tensor a product; reads back as rows for the modulation tables.

    `scales` float32 [depth + 1, 8]: in FP8 (`low`) those of each layer (packing_fp8.Fp8ExpertLayer), then what the
    kernel rounds a step's first activations by: mean squares of the residual, of each action dimension and of the bias.
    """

    def __init__(self, depth: int, clusters: int, device: torch.device, low: bool = False) -> None:
        self.depth, self.low, columns = 0, low, math.ceil(WIDTH / 8 / clusters) * 8  # depth: layers so far
        eights = order(columns, 8)
        self.slots = {"qkv": Slots((HEADS + 2) * HEAD_DIM, WIDTH, (HEADS + 2) * CLUSTER, order(32, 4), 1, low),
                      "out": Slots(WIDTH, HEADS * HEAD_DIM, clusters, eights, CLUSTER),
                      "gate_up": Slots(2 * MLP, WIDTH, math.ceil(2 * MLP / columns), order(columns, 16), 1, low),
                      "down": Slots(WIDTH, MLP, clusters, eights, CLUSTER, low)}
        self.tensors = {name: torch.empty(depth, *slots.shape, dtype=slots.dtype, device=device)
                        for name, slots in self.slots.items()}
        self.scales = torch.zeros(depth + 1, 8, device=device)

    def append(self, layer: Any) -> None:
        """A GemmaLayerWeights, with `low` a Fp8ExpertLayer. Blocks of `qkv` have 16 features of a head and their
        partners in the rotation; of `gate_up`, gate and up in turn."""
        bits = {name: getattr(layer, name).view(slots.dtype) for name, slots in self.slots.items()}
        weights = {"out": bits["out"], "down": bits["down"],
                   "qkv": bits["qkv"].view(HEADS + 2, 2, CLUSTER, 16, WIDTH).transpose(1, 2).reshape(-1, WIDTH),
                   "gate_up": bits["gate_up"].view(2, MLP, WIDTH).transpose(0, 1).reshape(-1, WIDTH)}
        for name, weight in weights.items():
            self.tensors[name][self.depth].copy_(self.slots[name].pack(weight))
        if self.low:
            self.scales[self.depth, :len(layer.scales)] = layer.scales
        self.depth += 1

    def enter_by(self, weight: Tensor, bias: Tensor) -> None:
        """`action_in_proj`, [WIDTH, action_dim] and [WIDTH]."""
        self.scales[-1, 0], self.scales[-1, 1] = weight.square().mean(), bias.square().mean() + 1e-6

    def rows(self, name: str, index: int) -> Tensor:
        """The weight of one layer as nn.Linear has it; gate, then up. FP8 ones float32, but `down` as it is stored."""
        rows = self.slots[name].unpack(self.tensors[name][index])
        if name == "qkv":
            rows = rows.view(HEADS + 2, CLUSTER, 2, 16, WIDTH).transpose(1, 2).reshape(-1, WIDTH)
        elif name == "gate_up":
            rows = rows.view(MLP, 2, WIDTH).transpose(0, 1).reshape(-1, WIDTH)
        if not self.slots[name].low:
            return rows
        if name == "down":
            return rows.view(FP8)
        first, sizes = {"qkv": (0, (HEADS * HEAD_DIM, HEAD_DIM, HEAD_DIM)), "gate_up": (3, (MLP, MLP))}[name]
        scale = torch.cat([self.scales[index, first + i].expand(size) for i, size in enumerate(sizes)])
        return rows.view(FP8).float() * scale[:, None]
