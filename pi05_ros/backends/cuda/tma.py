"""Tensor maps: how Hopper's tensor memory copy (TMA) finds the tiles of a matrix. An argument of a CUDA C++ kernel."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pi05_ros.errors import BackendError

_KINDS = {torch.bfloat16: 9, torch.float8_e4m3fn: 0}  # the driver's enumerations; FP8 as bytes
_L2_256 = 3
_SWIZZLE = {32: 1, 64: 2, 128: 3}  # by bytes of a box's row
_BYTES, _ALIGNMENT = 128, 64


class TensorMap:
    """Boxes of a bfloat16 or e4m3 tensor, last dimension fastest; swizzled in shared memory, zeros beyond the tensor.

    A box's rows are 32, 64 or 128 bytes. Holds the tensor's address: the tensor must stay where it is.
    """

    def __init__(self, tensor: Tensor, box: Sequence[int]) -> None:
        rank, width = tensor.dim(), box[-1] * tensor.element_size()
        if tensor.dtype not in _KINDS or tensor.stride(-1) != 1 or len(box) != rank or width not in _SWIZZLE:
            raise BackendError("tensor map", expected="bfloat16 or e4m3, last dimension contiguous, a box's rows "
                               "32, 64 or 128 bytes",
                               received=f"{tuple(tensor.shape)} {tensor.dtype}, strides {tensor.stride()}, box {box}",
                               way_out="Report this, or use backend 'eager'.")
        self._memory = ctypes.create_string_buffer(_BYTES + _ALIGNMENT)
        self._address = -(-ctypes.addressof(self._memory) // _ALIGNMENT) * _ALIGNMENT
        strides = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
        status = _encode()(
            ctypes.c_void_p(self._address), _KINDS[tensor.dtype], rank, ctypes.c_void_p(tensor.data_ptr()),
            (ctypes.c_uint64 * rank)(*reversed(tensor.shape)), (ctypes.c_uint64 * (rank - 1))(*reversed(strides)),
            (ctypes.c_uint32 * rank)(*reversed(box)), (ctypes.c_uint32 * rank)(*[1] * rank), 0, _SWIZZLE[width],
            _L2_256, 0)
        if status:
            raise BackendError("tensor map", expected="success from the driver", received=f"status {status}",
                               way_out="Report this with the model's sizes, or use backend 'eager'.")

    def getPtr(self) -> int:  # noqa: N802  (what the driver's Python bindings ask of a kernel argument)
        return self._address


@functools.cache
def _encode() -> ctypes._NamedFuncPointer:
    """The driver's own function: its Python binding does not promise the 64-byte alignment a map needs."""
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    function.restype = ctypes.c_int
    return function
