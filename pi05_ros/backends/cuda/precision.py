"""TensorFloat-32 for one float32 product, whatever PyTorch's own setting is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Within: float32 products of cuBLAS take 10 bits of mantissa from their factors; sums stay float32."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before
