"""The prefix's gate|up product in FP8 and its gated linear unit, rounded to FP8 for `down`: [rows, K] to [rows, F].

On Hopper one kernel (csrc/gate_up_fp8.cu), so [rows, 2F] never reaches memory; elsewhere the library's product and
`glu_to_fp8`. Floor at 968 rows: 130 GFLOP, 89 us at the ceiling measured in FP8. Checked against QuantisedLinear's
simulation. Has not run on a GPU yet.
"""

from __future__ import annotations

from torch import Tensor

from pi05_ros.backends.cuda.kernels.fp8_activation import glu_to_fp8
from pi05_ros.backends.cuda.kernels.fp8_product import raw_product
from pi05_ros.backends.cuda.packing_fp8 import Fp8GateUp


def gated_product_fp8(x: Tensor, layer: Fp8GateUp, gate_up: Tensor, out: Tensor) -> None:
    """x e4m3 [rows, K], out e4m3 [rows, F]; `gate_up` bfloat16 [rows, 2F] is scratch."""
    glu_to_fp8(raw_product(x, layer.weight, gate_up), layer.factors, out)
