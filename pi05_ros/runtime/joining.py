"""How a chunk continues the one before it: the modes, and the guidance that real-time chunking gives it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from pi05_ros.backends.base import parse_choice
from pi05_ros.errors import ConfigError
from pi05_ros.runtime.delay import DelayEstimate
from pi05_ros.runtime.ensembling import TemporalEnsemble, leftover
from pi05_ros.schema import ActionChunk, Guidance, Jacobian, Observation, Schedule

ChunkMode = Literal["plain", "delay_aware", "guided", "ensembled"]
CHUNK_MODES: tuple[ChunkMode, ...] = get_args(ChunkMode)


@dataclass(frozen=True)
class JoinSettings:
    """How chunks join.

    Args:
        mode: `plain` plays a chunk from its first action; `delay_aware` drops the actions whose time has passed;
            `guided` does so too, and lets the chunk before guide the next one (real-time chunking); `ensembled`
            averages the chunks that speak of the same moment.
        lead_s: after publication, what is commanded for so long does not change.
        schedule, beta, jacobian: of the guidance, as in `schema.Guidance`.
        horizon: rows of the next chunk that are guided at most; 0: as many as the chunk before has left.
        ensemble_coefficient: of the weights of `ensembled`, see `TemporalEnsemble`.
    """

    mode: ChunkMode = "delay_aware"
    lead_s: float = 0.02
    schedule: Schedule = "linear"
    beta: float = 10.0
    jacobian: Jacobian = "identity"
    horizon: int = 0
    ensemble_coefficient: float = 0.01


class Joining:
    """The chunk to continue and the delay to expect.

    `made` and `guidance` are called on the worker's thread, the others on the executor's.

    Args:
        encode_actions: (actions [K, robot_action_dim], state) to float32 [K, 32], as `RobotTransforms` has it.
    """

    def __init__(self, encode_actions: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        self._encode = encode_actions
        self._previous: ActionChunk | None = None
        self._ensemble = TemporalEnsemble()
        self.delay = DelayEstimate()

    def reset(self) -> None:
        """A new activation."""
        self.interrupted()
        self.delay.reset()

    def made(self, chunk: ActionChunk) -> None:
        """It is about to be executed. In overlap it is known before the next one is denoised."""
        self._previous = chunk

    def interrupted(self) -> None:
        """The last chunk is not executed, or no longer: there is nothing to continue."""
        self._previous = None
        self._ensemble.reset()

    def published(self, chunk: ActionChunk, published_ns: int) -> None:
        """A trajectory went out for a chunk."""
        self.delay.add((published_ns - chunk.stamp_ns) * 1e-9)

    def combined(self, chunk: ActionChunk, settings: JoinSettings) -> ActionChunk:
        """What is to be executed of a chunk: itself or, `ensembled`, its mean with those before."""
        if settings.mode == "ensembled":
            return self._ensemble.add(chunk, settings.ensemble_coefficient)
        self._ensemble.reset()
        return chunk

    def guidance(self, observation: Observation, settings: JoinSettings) -> Guidance | None:
        """For the chunk that answers `observation`; None in other modes, without a chunk to continue, and until the
        delay is known.

        The chunk before is taken at the times of the new one's rows and encoded at the new state, because differences
        from the state change their meaning with it. Rows that will have passed before the new chunk acts are frozen.
        """
        previous, delay_s = self._previous, self.delay.seconds
        if settings.mode != "guided" or previous is None or delay_s is None:
            return None
        left = leftover(previous, observation.stamp_ns)
        if not len(left):
            return None
        delay = inference_delay(delay_s + settings.lead_s, previous.control_period_s)
        end = min(len(left), max(settings.horizon, delay)) if settings.horizon else len(left)
        tail = np.zeros((1, *previous.normalised.shape), np.float32)
        tail[0, :len(left)] = self._encode(left, observation.state)
        return Guidance(tail, delay, end, settings.schedule, settings.beta, settings.jacobian, previous.chunk_index)


def inference_delay(delay_s: float, control_period_s: float) -> int:
    """Control steps that begin within a delay."""
    return math.ceil(delay_s / control_period_s - 1e-6)


def check_chunk_mode(mode: str, jacobian: str, backend: str) -> None:
    """Raises ConfigError for a guidance that the action expert's backend cannot do."""
    if (mode, jacobian) == ("guided", "vjp") and (expert := parse_choice(backend)["expert"]) != "eager":
        raise ConfigError("guidance_jacobian", expected=f"identity with the expert on backend '{expert}', which has no "
                          "backward pass", received="vjp", way_out="Use identity, or expert=eager.")
