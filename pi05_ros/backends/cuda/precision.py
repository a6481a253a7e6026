"""TensorFloat-32 for one float32 product, whatever PyTorch's own setting is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Within: float32 products of cuBLAS take 10 bits of mantissa from their factors; sums stay float32."""
    settings = torch.backends.cuda.matmul
    renamed = hasattr(settings, "fp32_precision")  # PyTorch 2.9 and later
    name, wanted = ("fp32_precision", "tf32") if renamed else ("allow_tf32", True)
    before = getattr(settings, name)
    setattr(settings, name, wanted)
    try:
        yield
    finally:
        setattr(settings, name, before)
