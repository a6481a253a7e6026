"""The prefix's gate|up product and its gated linear unit: x [rows, K], weight [2F, K] to [rows, F].

x is read before its norm; `factors` [rows] is the norm, 1 / rms(x), and multiplies the product's rows.
On Hopper one kernel (csrc/gate_up.cu), the norm under its products, so [rows, 2F] never reaches memory; elsewhere
`inverse_rms`, cuBLAS and `glu`. Floor at 968
rows: 130 GFLOP, 165 us at the measured ceiling, 122 us at the tensor cores' own. Checked against torch in float32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pi05_ros.backends.cuda.cpp import Kernel, Program
from pi05_ros.backends.cuda.kernels.glu import glu
from pi05_ros.backends.cuda.kernels.norm import inverse_rms
from pi05_ros.backends.cuda.shapes import fewer_rows, row_tile
from pi05_ros.backends.cuda.tma import TensorMap

MOST_SHARED = 227 * 1024


def fits_hopper(features: int, inner: int, device: torch.device) -> bool:
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return hopper and features % 128 == 0 and inner % 64 == 0 and inner >= 128


def row_defines(tile: int) -> dict[str, int]:
    """Tiles of `tile` rows and of fewer, as csrc/gate_up_tiles.cuh wants them."""
    fewer, sums = fewer_rows(tile), tile // 2
    return {"ROWS": tile, "FEWER": fewer, "LAST": tile // 8 - 1, "FEWER_LAST": fewer // 8 - 1, "LEFT": sums,
            "RIGHT": sums + 1, "KEEP": sums + 2}


def output_maps(out: Tensor, tile: int) -> tuple[TensorMap, TensorMap]:
    """Where tiles of both heights go."""
    return TensorMap(out, (tile, 32)), TensorMap(out, (fewer_rows(tile), 32))


@functools.cache
def _kernel(features: int, inner: int, tile: int, device: torch.device) -> tuple[Kernel, int]:
    half = (tile + 15) // 16 * 8
    stage, out = 128 * 128 + 2 * half * 128, 2 * tile * 64
    stages = (MOST_SHARED - out - 16) // (stage + 16)
    shared = stages * (stage + 16) + out + 16
    defines = {"F": features, "K": inner, "STAGES": stages, "SHARED_BYTES": shared, **row_defines(tile)}
    kernel = Program("gate_up", defines, device).kernel("gate_up", shared)
    return kernel, torch.cuda.get_device_properties(device).multi_processor_count


def gated_product(x: Tensor, factors: Tensor, weight: Tensor, gate_up: Tensor, out: Tensor,
                  counters: Tensor | None = None, portable: bool = False) -> None:
    """out = gelu_tanh(f x gate^T) * (f x up^T), f [>= rows up to a whole tile] a row's factor, finite also beyond
    `rows`; `gate_up` [rows, 2F] is scratch. With `counters`, int32 [3] of zeros and left so, `factors` becomes
    1 / rms(x) first. `portable`: not the Hopper kernel."""
    rows, inner = x.shape
    features = out.shape[1]
    if portable or not fits_hopper(features, inner, x.device):
        if counters is not None:
            inverse_rms(x, out=factors)
        glu(torch.mm(x, weight.T, out=gate_up), factors, out=out)
        return
    tile = row_tile(rows)
    kernel, processors = _kernel(features, inner, tile, x.device)
    blocks = min(processors // 2 * 2, -(-rows // tile) * (features // 64))
    # 8 features of gate, the same 8 of up, and so on: [F / 8, 2, 8, K]
    in_turn = weight.view(2, features // 8, 8, inner).transpose(0, 1)
    maps = (TensorMap(x, (-(-tile // 16) * 8, 64)), TensorMap(in_turn, (8, 2, 8, 64)), *output_maps(out, tile))
    norm = counters is not None
    kernel.launch((blocks,), 384, (*maps, x, factors, counters if norm else factors, int(norm), rows), cluster=2,
                  dependent=True)
