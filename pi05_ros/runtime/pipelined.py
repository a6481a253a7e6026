"""Chunks in overlap: the next one is made while the last one is denoised.

Two streams and two feature slots. The front stream makes features and leaves a copy in a slot; the back stream, which
is served first, waits for the front's mark and denoises. The host issues work and goes on; it waits where a result is
handed over. `Sequential` (sequential.py) is its twin without overlap: for the same noise both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from pi05_ros.backends import base
from pi05_ros.errors import BackendError
from pi05_ros.runtime.feature_slots import FeatureSlot, FeatureSlots
from pi05_ros.runtime.forward import Forward, Prepared
from pi05_ros.runtime.streams import Mark, Stream, new_stream
from pi05_ros.runtime.timing import StageTimer
from pi05_ros.schema import ActionChunk, Guidance

Boundary = Literal["vision", "prefix"]  # what crosses: image tokens, or the prefix KV cache
SPLIT: dict[Boundary, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vision": (("vision",), ("prefix", "expert")), "prefix": (("vision", "prefix"), ("expert",))}
DEPTH = 2  # chunks in the making: one in front, one behind


class Requested(Prepared, Protocol):
    """What `request` gives; `runtime.policy.Request` is one."""

    @property
    def chunk_index(self) -> int: ...


class Prepares(Protocol):
    """What a pipeline needs of a policy: its stages, the part before them and the part after them."""

    @property
    def stages(self) -> base.StageSet: ...

    def request(self, timer: StageTimer, observation: Any, num_steps: int, seed: int | None = None,
                chunk_index: int | None = None, noise: np.ndarray | None = None) -> Any:
        """Gives a `Requested`."""

    def chunk(self, timer: StageTimer, request: Any, normalised: np.ndarray,
              guidance: Guidance | None = None) -> ActionChunk: ...


@dataclass(eq=False)
class PendingChunk:
    """What keeps alive all that a chunk's work reads until it is done."""

    request: Requested
    timer: StageTimer
    forward: Forward
    slot: FeatureSlot
    features: Any
    front_done: Mark
    back: tuple[str, ...]  # stages that run on the back stream
    guidance: Guidance | None = None
    actions: Tensor | None = None  # [1, H, 32] in host memory, valid from `done` on
    done: Mark | None = None

    @property
    def advanced(self) -> bool:
        return self.done is not None

    def finished(self) -> bool:
        return self.done is not None and self.done.reached()


class Pipeline:
    """Two chunks in the making.

    Args:
        policy: whose stages run.
        boundary: `prefix` overlaps vision and prefix with the action expert, `vision` only vision with the rest.
        make_stream: (device, priority) to a stream.
        observe: sees every chunk whose work is done, with the marks of its stages.
        side_by_side: whether chunks are begun so early that front and back run at the same time (`Pace`). On an H200 it
            does not pay: either side takes the GPU whole. Without it the host's work and the uploads are hidden.

    Raises:
        BackendError: a backend on both sides of the boundary that cannot run on two streams at once.
    """

    depth = DEPTH

    def __init__(self, policy: Prepares, boundary: Boundary = "prefix",
                 make_stream: Callable[[torch.device, int], Stream] = new_stream,
                 observe: Callable[[PendingChunk], None] = lambda pending: None, side_by_side: bool = False) -> None:
        check_overlap(policy, boundary)
        self.policy, self.boundary, self.side_by_side, self._observe = policy, boundary, side_by_side, observe
        self.front, self.back = SPLIT[boundary]
        self._front, self._back = make_stream(policy.stages.device, 0), make_stream(policy.stages.device, -1)
        self._slots = FeatureSlots(DEPTH)

    def begin(self, observation: Any, num_steps: int, *, chunk_index: int | None = None,
              seed: int | None = None, noise: np.ndarray | None = None) -> PendingChunk:
        """Issue the stages before the boundary; arguments and errors as `Policy.infer`."""
        timer = StageTimer(self.policy.stages.device)
        request = self.policy.request(timer, observation, num_steps, seed, chunk_index, noise)
        slot = self._slots.take()
        try:
            with self._front:
                forward = Forward(self.policy.stages, request, num_steps, timer)
                made: Any = forward.vision()
                features = slot.keep(forward.prefix(made) if self.boundary == "prefix" else made)
                return PendingChunk(request, timer, forward, slot, features, self._front.mark(), self.back)
        except BaseException:  # a slot that is not given back would be missed for good; raised again
            self._slots.give_back(slot)
            raise

    def advance(self, pending: PendingChunk, guidance: Guidance | None = None) -> None:
        """Issue the stages behind the boundary, which wait on the device for those before it."""
        pending.guidance = guidance
        with self._back:
            self._back.wait(pending.front_done)
            pending.timer.spans["waiting"] = pending.front_done, self._back.mark()
            forward, features = pending.forward, pending.features
            x_0 = forward.expert(features if self.boundary == "prefix" else forward.prefix(features), guidance)
            pending.actions = download(x_0)
            pending.done = self._back.mark()

    def collect(self, pending: PendingChunk) -> ActionChunk:
        """Wait for the actions and decode them; the chunk's slot is free again."""
        assert pending.done is not None and pending.actions is not None, "collected before it was advanced"
        try:
            pending.done.wait()
            chunk = self.policy.chunk(pending.timer, pending.request, pending.actions[0].numpy().copy(),
                                      pending.guidance)
            self._observe(pending)
            return chunk
        finally:
            self._slots.give_back(pending.slot)

    def drop(self, pending: PendingChunk) -> None:
        """Its slot is free at once: work that is still running then reads what nobody will look at."""
        self._slots.give_back(pending.slot)

    def close(self) -> None:
        for stream in (self._front, self._back):
            stream.mark().wait()


def download(x_0: Tensor) -> Tensor:
    """A copy in host memory, complete when the current stream comes to it."""
    if x_0.device.type != "cuda":
        return x_0
    return torch.empty(x_0.shape, dtype=x_0.dtype, pin_memory=True).copy_(x_0, non_blocking=True)


def check_overlap(policy: Prepares, boundary: Boundary) -> None:
    """The same backend on both sides must keep what it reads apart from what it writes (backends/base.py)."""
    stages = policy.stages
    front, back = [stages.images, stages.vision], [stages.expert]
    (front if boundary == "prefix" else back).append(stages.prefix)
    for one in front:
        if any(one is other for other in back) and not one.overlaps:
            names = ", ".join(sorted({stages.names[s] for s in ("vision", "prefix", "expert")}))
            raise BackendError(f"backend '{names}'", expected="stages that may run at the same time",
                               received="stages that share their buffers", way_out="Set overlap to false.")
