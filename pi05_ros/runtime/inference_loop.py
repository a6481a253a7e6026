"""The cycle of the worker: wait for a complete set of inputs, infer, hand the chunk over with its epoch."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

from pi05_ros.errors import ObservationError
from pi05_ros.runtime.mailbox import Mailbox, Stamped
from pi05_ros.schema import ActionChunk, Observation
from pi05_ros.transforms.robot_file import Robot


@dataclass(frozen=True)
class LoopSettings:
    """What may change between two chunks, never inside one.

    Args:
        denoising_steps: flow-matching steps.
        prompt: the instruction.
        execution_horizon: at least so many control periods between the observations of two chunks; 0: no pause.
        max_rate_hz: at most so many chunks a second; 0: as fast as possible.
    """

    denoising_steps: int = 10
    prompt: str = ""
    execution_horizon: int = 0
    max_rate_hz: float = 0.0

    def pause_s(self, control_period_s: float) -> float:
        """Least time between two starts."""
        return max(self.execution_horizon * control_period_s, 1.0 / self.max_rate_hz if self.max_rate_hz > 0 else 0.0)


@dataclass(frozen=True)
class Delivery:
    """A chunk, the activation it belongs to, the inputs' stamps (ns, by slot) and when inference began (ns)."""

    chunk: ActionChunk
    epoch: int
    input_stamps_ns: Mapping[str, int]
    started_ns: int


class Infers(Protocol):
    @property
    def robot(self) -> Robot:
        """Whose control period counts."""

    def infer(self, observation: Observation, num_steps: int, *, chunk_index: int) -> ActionChunk:
        """As `Policy.infer`."""


class InferenceLoop:
    """What `Worker` repeats; all callables are called on the worker's thread.

    Args:
        policy: infers.
        assemble: a set of inputs and a prompt to an Observation; decodes images; raises ObservationError.
        settings: the settings in force now.
        now_ns: the robot's clock.
        deliver: takes a finished chunk. It may belong to an epoch that has ended: the receiver must check.
        report: takes (epoch, error): bad inputs (ObservationError), or anything else, after which the gate is closed.
    """

    def __init__(self, policy: Infers, mailbox: Mailbox, assemble: Callable[[Mapping[str, Stamped], str], Observation],
                 settings: Callable[[], LoopSettings], now_ns: Callable[[], int], deliver: Callable[[Delivery], None],
                 report: Callable[[tuple[int, Exception]], None]) -> None:
        self._mailbox, self._assemble, self._settings, self._now_ns = mailbox, assemble, settings, now_ns
        self._deliver, self._report = deliver, report
        self._gate = Lock()
        self._epoch, self._open = 0, False
        self._policy: Infers | None = policy
        self._control_period_s = policy.robot.control_period_s
        self._last_start_ns = -math.inf
        self._chunk_index = 0

    def open(self, epoch: int) -> None:
        """Start the activation `epoch`, a number never used before; inputs and chunk numbers begin anew."""
        with self._gate:
            self._mailbox.clear()
            self._epoch, self._open = epoch, True
            self._last_start_ns, self._chunk_index = -math.inf, 0

    def close(self) -> None:
        """End the activation; a chunk in the making still comes out, with its epoch."""
        with self._gate:
            self._open = False

    def forget_policy(self) -> None:
        """Close for good and let go of the policy; as the worker's job, so that its memory is freed on that thread."""
        self.close()
        self._policy = None

    def due(self) -> float | None:
        """Seconds until the next cycle should start, None while there is nothing to wait for."""
        if not self._open or not self._mailbox.complete():
            return None
        elapsed = (self._now_ns() - self._last_start_ns) * 1e-9
        pause = self._settings().pause_s(self._control_period_s)
        return 0.0 if elapsed < 0 else max(0.0, pause - elapsed)  # elapsed < 0: the clock was set back

    def step(self) -> None:
        """One cycle. Never raises: a bad input is reported and the loop lives on, anything else closes the gate."""
        with self._gate:
            epoch, chunk_index, policy = self._epoch, self._chunk_index, self._policy
        if policy is None:
            return
        try:
            settings, started_ns = self._settings(), self._now_ns()
            taken = self._mailbox.take(started_ns)
            if taken is None:  # a newer frame came in between: its companions follow
                return
            observation = self._assemble(taken, settings.prompt)
            self._last_start_ns = started_ns
            chunk = policy.infer(observation, settings.denoising_steps, chunk_index=chunk_index)
        except ObservationError as error:
            self._report((epoch, error))
            return
        except Exception as error:  # a broken policy must not go on: close the gate, tell the node, keep the thread
            error.add_note(traceback.format_exc())
            with self._gate:
                self._open = self._open and epoch != self._epoch
            self._report((epoch, error))
            return
        with self._gate:
            self._chunk_index += epoch == self._epoch
        stamps = {slot: stamped.stamp_ns for slot, stamped in taken.items()}
        self._deliver(Delivery(chunk, epoch, stamps, started_ns))
