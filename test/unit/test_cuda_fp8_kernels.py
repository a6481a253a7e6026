"""The FP8 forward compiled for every GPU that has FP8, and run without one, by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, which PyTorch's CPU build does not bring")
import torch  # noqa: E402
import triton_compile  # noqa: E402

from pi05_ros.backends.cuda import tilings  # noqa: E402
from pi05_ros.config import Pi05Config  # noqa: E402

HERE = Path(__file__).parent
WITH_FP8 = [gpu for gpu in triton_compile.GPUS if gpu.capability >= (8, 9)]


@pytest.mark.parametrize("gpu", WITH_FP8, ids=lambda gpu: gpu.name)
def test_every_kernel_of_the_fp8_forward_compiles_for(gpu):
    taken = triton_compile.compile_fp8_forward(gpu, tilings.first_that_fit(Pi05Config(), gpu))
    assert {"_norm_to_fp8", "_glu_to_fp8", "_activation_to_fp8"} <= {kernel[0] for kernel in taken}
    assert all(shared <= gpu.shared_bytes for shared in taken.values()), taken


@pytest.mark.parametrize("recipe", ["fp8_mlp", "fp8"])
def test_the_fp8_forward_is_as_near_to_the_model_as_the_simulation(recipe):
    """In another process: the interpreter replaces Triton for all of one."""
    ran = subprocess.run([sys.executable, HERE / "interpreted_fp8.py", recipe], capture_output=True, text=True,
                         env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                              "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_hopper_kernels_ring_is_deep_enough_at_every_length():
    from pi05_ros.backends.cuda.kernels.fp8_gated_product import MOST_SHARED, defines
    from pi05_ros.backends.cuda.shapes import all_buckets, row_tile

    for rows in all_buckets(Pi05Config()):
        d = defines(16384, 2048, row_tile(rows))
        assert d["STAGES"] >= 4 and d["SHARED_BYTES"] <= MOST_SHARED and d["ROWS"] * 32 % 256 == 0


def test_products_of_merged_layers_have_their_scales():
    """On the CPU, whose `_scaled_mm` is PyTorch's own."""
    from pi05_ros.backends.cuda.kernels.fp8_product import fp8_product
    from pi05_ros.backends.cuda.packing_fp8 import Fp8Linear
    from pi05_ros.model.low_precision import FP8

    x, w = (torch.randn(rows, 64).to(FP8) for rows in (24, 48))
    scale, bias = torch.rand(1, 48) + 0.5, torch.randn(48).bfloat16()
    for given in (scale, scale[:, :1]):
        out = fp8_product(x, Fp8Linear(w, torch.ones(1), given, bias))
        torch.testing.assert_close(out.float(), x.float() @ w.float().T * given + bias.float(), atol=0.05, rtol=1e-2)
