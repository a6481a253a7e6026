"""How a chunk continues the one before it: the modes, and the guidance that real-time chunking gives it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from pi05_ros.backends.base import parse_choice
from pi05_ros.errors import ConfigError
from pi05_ros.runtime.delay import DelayEstimate
from pi05_ros.runtime.ensembling import TemporalEnsemble, leftover
from pi05_ros.schema import ActionChunk, Guidance, Jacobian, Observation, Schedule

ChunkMode = Literal["plain", "delay_aware", "guided", "trained", "ensembled"]
CHUNK_MODES: tuple[ChunkMode, ...] = get_args(ChunkMode)
# (actions [K, robot_action_dim], state) to float32 [K, 32], as RobotTransforms.encode_actions
EncodeActions = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class JoinSettings:
    """How chunks join.

    Args:
        mode: `plain` plays a chunk from its first action; `delay_aware` drops the actions whose time has passed;
            `guided` does so too, and lets the chunk before guide the next one (real-time chunking); `trained` gives
            the next one the actions that will be executed meanwhile, as its checkpoint was trained; `ensembled`
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
        max_delay: rows that `trained` may give, at most as many as the checkpoint saw in training.
    """

    def __init__(self, encode_actions: EncodeActions, max_delay: int = 0) -> None:
        self._encode, self._max_delay = encode_actions, max_delay
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

    def published(self, chunk: ActionChunk, published_ns: int, late_s: float = 0.0) -> None:
        """A trajectory went out for a chunk, whose actions act `late_s` later than its stamp says: what comes next
        continues them there."""
        self.delay.add((published_ns - chunk.stamp_ns) * 1e-9)
        if late_s:
            later = replace(chunk, stamp_ns=chunk.stamp_ns + round(late_s * 1e9))
            self._ensemble.replace(chunk, later)
            if self._previous is chunk:
                self._previous = later

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
        if settings.mode not in ("guided", "trained") or previous is None or delay_s is None:
            return None
        tail, left = tail_of(previous, observation, self._encode)
        if not left:
            return None
        delay = inference_delay(delay_s + settings.lead_s, previous.control_period_s)
        end = min(left, max(settings.horizon, delay)) if settings.horizon else left
        guidance = Guidance(tail, delay, end, settings.schedule, settings.beta, settings.jacobian, previous.chunk_index,
                            previous.stamp_ns)
        if settings.mode == "trained":
            return replace(guidance, delay=min(delay, left, self._max_delay), trained=True)
        return guidance


def tail_of(previous: ActionChunk, observation: Observation, encode: EncodeActions) -> tuple[np.ndarray, int]:
    """What is left of a chunk at the times of the one that answers `observation`, and encoded at its state: float32
    [1, H, 32], zero padded, and how many rows that is."""
    left = leftover(previous, observation.stamp_ns)
    tail = np.zeros((1, *previous.normalised.shape), np.float32)
    if len(left):
        tail[0, :len(left)] = encode(left, observation.state)
    return tail, len(left)


def inference_delay(delay_s: float, control_period_s: float) -> int:
    """Control steps that begin within a delay."""
    return math.ceil(delay_s / control_period_s - 1e-6)


def check_chunk_mode(mode: str, jacobian: str, backend: str, max_delay: int | None = None) -> None:
    """Raises ConfigError for what the action expert's backend or the checkpoint cannot do. max_delay: of the
    checkpoint, once it is known."""
    if mode == "trained" and max_delay == 0:
        raise ConfigError("chunk_mode", expected="a checkpoint trained for real-time chunking (rtc_training_max_delay)",
                          received="trained with one that was not", way_out="Use guided.")
    if mode == "trained" and (expert := parse_choice(backend)["expert"]) != "eager":
        raise ConfigError("chunk_mode", expected=f"not trained with the expert on backend '{expert}', whose flow time "
                          "is one for all rows", received="trained", way_out="Use guided, or expert=eager.")
    if (mode, jacobian) == ("guided", "vjp") and (expert := parse_choice(backend)["expert"]) != "eager":
        raise ConfigError("guidance_jacobian", expected=f"identity with the expert on backend '{expert}', which has no "
                          "backward pass", received="vjp", way_out="Use identity, or expert=eager.")
