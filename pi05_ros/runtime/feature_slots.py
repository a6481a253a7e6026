"""Double-buffered features: what one stream leaves for the other, out of reach of the next observation."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pi05_ros.errors import WorkerError


class FeatureSlot:
    """Memory for the features of one chunk; kept from chunk to chunk, larger only when a longer prompt needs it."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def keep(self, features: Any) -> Any:
        """A copy of image tokens (a Tensor) or of a prefix KV cache (a dataclass of Tensors) in this slot.

        On the current stream; small beside the stages, and backends need not know of slots.
        """
        if isinstance(features, Tensor):
            return self._copy("features", features)
        return dataclasses.replace(features, **{field.name: self._copy(field.name, getattr(features, field.name))
                                                for field in dataclasses.fields(features)})

    def _copy(self, name: str, source: Tensor) -> Tensor:
        memory = self._memory.get(name)
        if memory is None or memory.numel() < source.numel() or memory.dtype != source.dtype:
            memory = self._memory[name] = torch.empty(source.numel(), dtype=source.dtype, device=source.device)
        return memory[:source.numel()].view(source.shape).copy_(source)


class FeatureSlots:
    """`count` slots, each lent to one chunk at a time."""

    def __init__(self, count: int) -> None:
        self.count, self._free = count, [FeatureSlot() for _ in range(count)]

    def take(self) -> FeatureSlot:
        if not self._free:
            raise WorkerError("pipeline", expected=f"at most {self.count} chunks in the making", received="one more",
                              way_out="Collect or drop a chunk before the next one begins.")
        return self._free.pop()

    def give_back(self, slot: FeatureSlot) -> None:
        self._free.append(slot)
