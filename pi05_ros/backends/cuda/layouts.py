"""How the persistent expert's weights lie in memory: as the kernel's threads read them (csrc/expert_products.cuh).

16 bytes a thread, all threads of a block in a row. q, k, v: 32 rows a block, and the product's tile is 16 rows (r and
r + 8 a lane). The others: `columns` rows a block or cluster, in tiles of 8: four for each half of the warps, then what
is over. k is split over the cluster's blocks, a quarter of the warps, blocks of 32, and a lane's 8 neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, MLP, HEADS, HEAD_DIM, CLUSTER = 1024, 4096, 8, 256, 8
# head, half a head, block, (8, 8) rows; warp, block of 32, (4, 8) of k -> head, block, block of 32, half, ...
QKV_AXES, QKV_ORDER = (HEADS + 2, 2, CLUSTER, 2, 8, 8, 4, 4, 8), (0, 2, 6, 1, 3, 5, 4, 7, 8)


Split = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Tiles:
    """A weight [rows, k] as `owners` groups of `columns` rows, its k over `blocks` blocks."""

    rows: int
    k: int
    owners: int
    columns: int
    blocks: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.owners, self.blocks, self.columns * self.k // self.blocks

    def _split(self) -> list[Split]:
        """Rows of the main and the extra tiles, each with its axes and their order in memory."""
        k = (self.blocks, 4, self._k_blocks, 4, 8)
        parts: list[Split] = [(64, (self.owners, 2, 4, 8, *k), (0, 4, 6, 2, 1, 5, 3, 7, 8))]
        if extra := self.columns // 8 - 8:
            parts.append((8 * extra, (self.owners, extra, 8, *k), (0, 3, 5, 1, 4, 2, 6, 7)))
        return parts

    @property
    def _k_blocks(self) -> int:
        return self.k // self.blocks // 128

    def pack(self, weight: Tensor) -> Tensor:
        """[rows, k] to `shape`; rows that are over are zeros."""
        padded = F.pad(weight, (0, 0, 0, self.owners * self.columns - self.rows)).unflatten(0, (self.owners, -1))
        parts, first = [], 0
        for rows, axes, order in self._split():
            part = padded[:, first:first + rows].reshape(axes).permute(order)
            parts.append(part.reshape(self.owners, self.blocks, self._k_blocks, -1))
            first += rows
        return torch.cat(parts, dim=-1).flatten(2)

    def unpack(self, packed: Tensor) -> Tensor:
        """Back to [rows, k]."""
        parts, first, blocks = [], 0, packed.unflatten(2, (self._k_blocks, -1))
        for rows, axes, order in self._split():
            inverse = [order.index(axis) for axis in range(len(order))]
            part = blocks[..., first:first + rows * 128].reshape([axes[axis] for axis in order]).permute(inverse)
            parts.append(part.reshape(self.owners, rows, self.k))
            first += rows * 128
        return torch.cat(parts, dim=1).flatten(0, 1)[:self.rows]


class PackedLayers:
    """All layers of the expert, one tensor a product; reads back as rows for the modulation tables."""

    def __init__(self, depth: int, clusters: int, device: torch.device) -> None:
        self.depth, columns = 0, math.ceil(WIDTH / 8 / clusters) * 8  # depth: layers so far
        self.tiles = {"out": Tiles(WIDTH, HEADS * HEAD_DIM, clusters, columns, CLUSTER),
                      "gate_up": Tiles(2 * MLP, WIDTH, math.ceil(2 * MLP / columns), columns, 1),
                      "down": Tiles(WIDTH, MLP, clusters, columns, CLUSTER)}
        shapes = {"qkv": ((HEADS + 2) * HEAD_DIM, WIDTH), **{name: tiles.shape for name, tiles in self.tiles.items()}}
        self.tensors = {name: torch.empty(depth, *shape, dtype=torch.bfloat16, device=device)
                        for name, shape in shapes.items()}

    def append(self, layer: Any) -> None:
        """A GemmaLayerWeights; the rows of gate and up take turns."""
        index, self.depth = self.depth, self.depth + 1
        weights = {"out": layer.out, "down": layer.down,
                   "gate_up": layer.gate_up.unflatten(0, (2, MLP)).transpose(0, 1).flatten(0, 1)}
        for name, weight in weights.items():
            self.tensors[name][index] = self.tiles[name].pack(weight)
        packed = layer.qkv.view(QKV_AXES).permute(QKV_ORDER)
        self.tensors["qkv"][index].view(packed.shape).copy_(packed)

    def rows(self, name: str, index: int) -> Tensor:
        """The weight of one layer as nn.Linear has it; gate, then up."""
        packed = self.tensors[name][index]
        if name == "qkv":
            inverse = [QKV_ORDER.index(axis) for axis in range(len(QKV_ORDER))]
            return packed.view([QKV_AXES[axis] for axis in QKV_ORDER]).permute(inverse).reshape(packed.shape)
        rows = self.tiles[name].unpack(packed)
        return rows.unflatten(0, (MLP, 2)).transpose(0, 1).flatten(0, 1) if name == "gate_up" else rows
