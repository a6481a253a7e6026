"""The prefix's gate|up product in FP8 and its gated linear unit, rounded to FP8 for `down`: [rows, K] to [rows, F].

On Hopper one kernel (csrc/gate_up_fp8.cu), so [rows, 2F] never reaches memory; elsewhere the library's product and
`glu_to_fp8`. Floor at 968 rows: 130 GFLOP, 89 us at the ceiling measured in FP8. Checked against QuantisedLinear's
simulation.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pi05_ros.backends.cuda.cpp import Kernel, Program
from pi05_ros.backends.cuda.kernels.fp8_activation import glu_to_fp8
from pi05_ros.backends.cuda.kernels.fp8_product import raw_product
from pi05_ros.backends.cuda.kernels.gated_product import MOST_SHARED, output_maps, row_defines
from pi05_ros.backends.cuda.packing_fp8 import Fp8GateUp
from pi05_ros.backends.cuda.shapes import row_tile
from pi05_ros.backends.cuda.tma import TensorMap

STEP = 128  # of K at a time


def fits_hopper(features: int, inner: int, device: torch.device) -> bool:
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return hopper and features % 128 == 0 and inner % STEP == 0 and inner >= 2 * STEP


def defines(features: int, inner: int, tile: int) -> dict[str, int]:
    """What csrc/gate_up_fp8.cu is compiled with: as many stages as shared memory holds."""
    half = (tile + 15) // 16 * 8
    stage, out = 128 * 128 + 2 * half * 128, 2 * tile * 32
    stages = (MOST_SHARED - out) // (stage + 16)
    return {"F": features, "K": inner, "STAGES": stages, "SHARED_BYTES": stages * (stage + 16) + out,
            **row_defines(tile)}


@functools.cache
def _kernel(features: int, inner: int, tile: int, device: torch.device) -> tuple[Kernel, int]:
    given = defines(features, inner, tile)
    kernel = Program("gate_up_fp8", given, device).kernel("gate_up_fp8", given["SHARED_BYTES"])
    return kernel, torch.cuda.get_device_properties(device).multi_processor_count


def gated_product_fp8(x: Tensor, layer: Fp8GateUp, gate_up: Tensor, out: Tensor, portable: bool = False) -> None:
    """x e4m3 [rows, K], out e4m3 [rows, F]; `gate_up` bfloat16 [rows, 2F] is scratch. `portable`: the library's."""
    (rows, inner), features = x.shape, out.shape[1]
    if portable or not fits_hopper(features, inner, x.device):
        return glu_to_fp8(raw_product(x, layer.weight, gate_up), layer.factors, out)
    tile = row_tile(rows)
    kernel, processors = _kernel(features, inner, tile, x.device)
    blocks = min(processors // 2 * 2, -(-rows // tile) * (features // 64))
    # 8 features of gate, the same 8 of up, and so on: [F / 8, 2, 8, K]
    in_turn = layer.weight.view(2, features // 8, 8, inner).transpose(0, 1)
    maps = (TensorMap(x, (-(-tile // 16) * 8, STEP)), TensorMap(in_turn, (8, 2, 8, STEP)),
            *output_maps(out, tile))
    kernel.launch((blocks,), 384, (*maps, layer.factors, rows), cluster=2)
