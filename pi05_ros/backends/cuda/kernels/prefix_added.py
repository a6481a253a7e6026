"""The prefix's products that end in the residual: x [rows, F] += y [rows, K] weight^T, of attention and of the MLP.

On Hopper csrc/prefix_added.cu, one wave of blocks; elsewhere, and where its tiles gain less, PyTorch's. Floor at 968
rows (measured ceiling; tensor cores' own): the MLP's, 65 GFLOP, 83 and 61 us; attention's 10 and 8 us. Checked against
torch in float32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pi05_ros.backends.cuda.cpp import Kernel, Program
from pi05_ros.backends.cuda.tma import TensorMap

MOST_SHARED, FEATURES, LEAST_ROWS = 227 * 1024, 128, 128


def row_tile(rows: int, features: int, processors: int) -> int:
    """Rows a pair of blocks takes: as few as fill the processors once, at most 256, a multiple of 8."""
    tiles = max(-(-rows // 256), processors // (2 * (features // FEATURES)), 1)
    return -(-rows // (8 * tiles)) * 8


def gains(rows: int, features: int, inner: int, device: torch.device) -> bool:
    """Against PyTorch's, with its tiles of 128 rows: whether the sums are long, or it computes many rows too many."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    if features % FEATURES or inner % 128 or inner < 1024:
        return False
    tile = row_tile(rows, features, _processors(device))
    ours, theirs = -(-rows // tile) * tile, -(-rows // 128) * 128
    return tile >= LEAST_ROWS and (inner >= 4096 or 16 * ours <= 15 * theirs)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _kernel(features: int, inner: int, tile: int, device: torch.device) -> Kernel:
    stage, sums = 128 * (FEATURES + tile), tile // 2
    stages = min((MOST_SHARED - 24) // (stage + 16), inner // 128, 8)
    shared = stages * (stage + 16) + 24
    defines = {"F": features, "K": inner, "ROWS": tile, "STAGES": stages, "SHARED_BYTES": shared,
               "LAST": tile // 8 - 1, "LEFT": sums, "RIGHT": sums + 1, "KEEP": sums + 2}
    return Program("prefix_added", defines, device).kernel("added", shared)


def add_product(x: Tensor, y: Tensor, weight: Tensor, portable: bool = False) -> None:
    """x += y weight^T. `portable`: not the Hopper kernel."""
    (rows, features), inner = x.shape, y.shape[1]
    if portable or not gains(rows, features, inner, x.device):
        x.addmm_(y, weight.T)
        return
    tile = row_tile(rows, features, _processors(x.device))
    more = -(-tile // 16) * 8  # rows that the first block of a pair keeps
    maps = (TensorMap(y, (tile, 64)), TensorMap(weight, (FEATURES, 64)), TensorMap(x, (more, 64)),
            TensorMap(x, (tile - more, 64)))
    _kernel(features, inner, tile, x.device).launch((-(-rows // tile) * (features // FEATURES) * 2,), 384, maps,
                                                    cluster=2, dependent=True)
