"""How the persistent expert's weights lie in memory: block after block, as wgmma reads them (csrc/expert_products.cuh).

A slot of the kernel's ring is `columns` rows of a weight and 128 k of it (q, k, v: 32 rows and 256 k), as
[k / 8][row][8]. `out` and `down` split k over the 8 blocks of a cluster, which has the rows; of `qkv` and `gate_up` a
block has some rows and all of k. wgmma gives a thread q of four the sums of rows 8 j + 2 q and the next, for every j;
the rows lie so that these are neighbours in the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, MLP, HEADS, HEAD_DIM, CLUSTER = 1024, 4096, 8, 256, 8


def order(columns: int, run: int) -> list[int]:
    """Which row lies where, so that a thread has runs of that many neighbours; of the 8 rows that may be left, two."""
    whole = columns - columns % (4 * run)
    return [first + run * q + 2 * j + i for first in range(0, whole, 4 * run)
            for j in range(run // 2) for q in range(4) for i in (0, 1)] + list(range(whole, columns))


@dataclass(frozen=True)
class Slots:
    """A weight [rows, k] as `owners` groups of rows in `order`, k over `blocks` blocks; rows beyond are zeros."""

    rows: int
    k: int
    owners: int
    order: list[int]
    blocks: int

    @property
    def columns(self) -> int:
        return len(self.order)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.owners, self.blocks, self.k // self.blocks // 8, self.columns, 8

    def pack(self, weight: Tensor) -> Tensor:
        """[rows, k] to `shape`."""
        padded = F.pad(weight, (0, 0, 0, self.owners * self.columns - self.rows))
        ordered = padded.view(self.owners, self.columns, self.k)[:, self.order]
        return ordered.view(self.owners, self.columns, self.blocks, -1, 8).permute(0, 2, 3, 1, 4)

    def unpack(self, packed: Tensor) -> Tensor:
        """Back to [rows, k]."""
        ordered = packed.view(self.shape).permute(0, 3, 1, 2, 4).reshape(self.owners, self.columns, self.k)
        rows = torch.empty_like(ordered)
        rows[:, self.order] = ordered
        return rows.view(-1, self.k)[:self.rows]


class PackedLayers:
    """All layers of the expert, one tensor a product; reads back as rows for the modulation tables."""

    def __init__(self, depth: int, clusters: int, device: torch.device) -> None:
        self.depth, columns = 0, math.ceil(WIDTH / 8 / clusters) * 8  # depth: layers so far
        eights = order(columns, 8)
        self.slots = {"qkv": Slots((HEADS + 2) * HEAD_DIM, WIDTH, (HEADS + 2) * CLUSTER, order(32, 4), 1),
                      "out": Slots(WIDTH, HEADS * HEAD_DIM, clusters, eights, CLUSTER),
                      "gate_up": Slots(2 * MLP, WIDTH, math.ceil(2 * MLP / columns), order(columns, 16), 1),
                      "down": Slots(WIDTH, MLP, clusters, eights, CLUSTER)}
        self.tensors = {name: torch.empty(depth, *slots.shape, dtype=torch.bfloat16, device=device)
                        for name, slots in self.slots.items()}

    def append(self, layer: Any) -> None:
        """A GemmaLayerWeights. Blocks of `qkv` have 16 features of a head and their partners in the rotation; of
        `gate_up`, gate and up in turn."""
        weights = {"out": layer.out, "down": layer.down,
                   "qkv": layer.qkv.view(HEADS + 2, 2, CLUSTER, 16, WIDTH).transpose(1, 2).reshape(-1, WIDTH),
                   "gate_up": layer.gate_up.view(2, MLP, WIDTH).transpose(0, 1).reshape(-1, WIDTH)}
        for name, weight in weights.items():
            self.tensors[name][self.depth].copy_(self.slots[name].pack(weight))
        self.depth += 1

    def rows(self, name: str, index: int) -> Tensor:
        """The weight of one layer as nn.Linear has it; gate, then up."""
        rows = self.slots[name].unpack(self.tensors[name][index])
        if name == "qkv":
            return rows.view(HEADS + 2, CLUSTER, 2, 16, WIDTH).transpose(1, 2).reshape(-1, WIDTH)
        return rows.view(MLP, 2, WIDTH).transpose(0, 1).reshape(-1, WIDTH) if name == "gate_up" else rows
