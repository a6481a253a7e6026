"""Tensor maps: how Hopper's tensor memory copy (TMA) finds the tiles of a matrix. An argument of a CUDA C++ kernel."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from pi05_ros.errors import BackendError

TILE_COLUMNS = 64  # of bfloat16: 128 bytes, what one swizzled row holds
_BFLOAT16, _SWIZZLE_128, _L2_256 = 9, 3, 3  # the driver's enumerations
_BYTES, _ALIGNMENT = 128, 64


class TensorMap:
    """Boxes of `rows` x 64 of a row-major bfloat16 matrix, 128-byte swizzled in shared memory; zeros beyond the matrix.

    Holds the matrix's address: the tensor must stay where it is.
    """

    def __init__(self, matrix: Tensor, rows: int) -> None:
        if matrix.dim() != 2 or matrix.dtype != torch.bfloat16 or matrix.stride(1) != 1:
            raise BackendError("tensor map", expected="a row-major bfloat16 matrix",
                               received=f"{tuple(matrix.shape)} {matrix.dtype}, strides {matrix.stride()}",
                               way_out="Report this, or use backend 'eager'.")
        self._memory = ctypes.create_string_buffer(_BYTES + _ALIGNMENT)
        self._address = -(-ctypes.addressof(self._memory) // _ALIGNMENT) * _ALIGNMENT
        height, width = matrix.shape
        status = _encode()(
            ctypes.c_void_p(self._address), _BFLOAT16, 2, ctypes.c_void_p(matrix.data_ptr()),
            (ctypes.c_uint64 * 2)(width, height), (ctypes.c_uint64 * 1)(matrix.stride(0) * matrix.element_size()),
            (ctypes.c_uint32 * 2)(TILE_COLUMNS, rows), (ctypes.c_uint32 * 2)(1, 1), 0, _SWIZZLE_128, _L2_256, 0)
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
