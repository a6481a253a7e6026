"""How the persistent expert's weights lie in memory: block after block, as wgmma reads them (csrc/expert_products.cuh).

A slot of the kernel's ring is `columns` rows of a weight and 128 k of it (q, k, v: 32 rows and 256 k), as
[k / 8][row][8]. `out` and `down` split k over the 8 blocks of a cluster, which has the rows; of `qkv` and `gate_up` a
block has some rows and all of k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, MLP, HEADS, HEAD_DIM, CLUSTER = 1024, 4096, 8, 256, 8


@dataclass(frozen=True)
class Slots:
    """A weight [rows, k] as `owners` groups of `columns` rows, its k over `blocks` blocks; rows beyond are zeros."""

    rows: int
    k: int
    owners: int
    columns: int
    blocks: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.owners, self.blocks, self.k // self.blocks // 8, self.columns, 8

    def pack(self, weight: Tensor) -> Tensor:
        """[rows, k] to `shape`."""
        padded = F.pad(weight, (0, 0, 0, self.owners * self.columns - self.rows))
        return padded.view(self.owners, self.columns, self.blocks, -1, 8).permute(0, 2, 3, 1, 4)

    def unpack(self, packed: Tensor) -> Tensor:
        """Back to [rows, k]."""
        return packed.view(self.shape).permute(0, 3, 1, 2, 4).reshape(-1, self.k)[:self.rows]


class PackedLayers:
    """All layers of the expert, one tensor a product; reads back as rows for the modulation tables."""

    def __init__(self, depth: int, clusters: int, device: torch.device) -> None:
        self.depth, columns = 0, math.ceil(WIDTH / 8 / clusters) * 8  # depth: layers so far
        self.slots = {"qkv": Slots((HEADS + 2) * HEAD_DIM, WIDTH, (HEADS + 2) * CLUSTER, 32, 1),
                      "out": Slots(WIDTH, HEADS * HEAD_DIM, clusters, columns, CLUSTER),
                      "gate_up": Slots(2 * MLP, WIDTH, math.ceil(2 * MLP / columns), columns, 1),
                      "down": Slots(WIDTH, MLP, clusters, columns, CLUSTER)}
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
