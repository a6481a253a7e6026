"""Chunks one after the other: the interface that pipelines share, and the one without overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pi05_ros.schema import ActionChunk, Guidance, Observation


class Pending(Protocol):
    """A chunk in the making."""

    @property
    def advanced(self) -> bool:
        """Denoising was issued."""

    def finished(self) -> bool:
        """`collect` would not wait. Never blocks."""


class ChunkPipeline(Protocol):
    """For each chunk, in order: `begin`, `advance`, `collect`; one may `begin` while another is denoised."""

    depth: int  # chunks that may be in the making
    side_by_side: bool  # `begin` a whole front early, so that it runs beside the last chunk's denoising
    front: tuple[str, ...]  # stages that run before `advance`, in `stage_times_ms`
    back: tuple[str, ...]  # stages that run after it

    def begin(self, observation: Observation, num_steps: int, *, chunk_index: int) -> Any: ...

    def advance(self, pending: Any, guidance: Guidance | None = None) -> None:
        """Let it be denoised. Guidance comes here, because at `begin` the chunk before may still be in the making."""

    def collect(self, pending: Any) -> ActionChunk: ...

    def drop(self, pending: Any) -> None:
        """Nobody wants this chunk any more."""

    def close(self) -> None:
        """Wait until the device is idle; nothing may be in the making afterwards."""


class Infers(Protocol):
    """What `Sequential` needs of a policy."""

    def infer(self, observation: Observation, num_steps: int, *, chunk_index: int,
              guidance: Guidance | None = None) -> ActionChunk:
        """As `Policy.infer`."""


@dataclass(eq=False)
class PendingInference:
    """Of `Sequential`."""

    observation: Observation
    num_steps: int
    chunk_index: int
    chunk: ActionChunk | None = None

    @property
    def advanced(self) -> bool:
        return self.chunk is not None

    def finished(self) -> bool:
        return self.chunk is not None


class Sequential:
    """One chunk at a time; `advance` returns when it is made."""

    depth, side_by_side = 1, False
    front: tuple[str, ...] = ()
    back: tuple[str, ...] = ("total",)

    def __init__(self, policy: Infers) -> None:
        self.policy = policy

    def begin(self, observation: Observation, num_steps: int, *, chunk_index: int) -> PendingInference:
        return PendingInference(observation, num_steps, chunk_index)

    def advance(self, pending: PendingInference, guidance: Guidance | None = None) -> None:
        pending.chunk = self.policy.infer(pending.observation, pending.num_steps, chunk_index=pending.chunk_index,
                                          guidance=guidance)

    def collect(self, pending: PendingInference) -> ActionChunk:
        assert pending.chunk is not None, "collected before it was advanced"
        return pending.chunk

    def drop(self, pending: PendingInference) -> None:
        pass

    def close(self) -> None:
        pass
