"""The cycle of the worker: wait for a complete set of inputs, begin, advance, hand the chunk over with its epoch."""

from __future__ import annotations

import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

from pi05_ros.errors import ObservationError
from pi05_ros.runtime.device_faults import named
from pi05_ros.runtime.joining import Joining, JoinSettings
from pi05_ros.runtime.mailbox import Mailbox, Stamped
from pi05_ros.runtime.pace import Pace
from pi05_ros.runtime.sequential import ChunkPipeline
from pi05_ros.runtime.streams import release_memory
from pi05_ros.runtime.trigger import LoopSettings, Trigger
from pi05_ros.schema import ActionChunk, Guidance, Observation


@dataclass(frozen=True)
class Delivery:
    """A chunk and its history, in ns: the activation it belongs to, the inputs' stamps by slot, when the set was
    complete, and when it was taken (in between it waited for the worker); how it joins the chunk before."""

    chunk: ActionChunk
    epoch: int
    input_stamps_ns: Mapping[str, int]
    complete_ns: int
    started_ns: int
    join: JoinSettings = JoinSettings()


@dataclass(eq=False)
class Flight:
    """A chunk in the making: `begun_ns` on the robot's clock, `begun_s` and `advanced_s` on the monotonic one."""

    pending: Any
    epoch: int
    observation: Observation
    settings: LoopSettings
    stamps_ns: Mapping[str, int]
    complete_ns: int
    started_ns: int
    begun_ns: int
    begun_s: float
    advanced_s: float = 0.0


class InferenceLoop:
    """What `Worker` repeats; all callables are called on the worker's thread.

    Args:
        pipeline: makes chunks, one at a time or two in overlap.
        control_period_s: of the robot.
        mailbox: where the inputs are.
        assemble: a set of inputs and a prompt to an Observation; decodes images; raises ObservationError.
        settings: the settings in force now; read once for each chunk.
        now_ns: the robot's clock.
        deliver: takes a finished chunk. It may belong to an epoch that has ended: the receiver must check.
        report: takes (epoch, error): bad inputs (ObservationError), or anything else, after which the gate is closed.
        joining: what a chunk continues; None: every chunk stands for itself.
        clock: monotonic, seconds.
    """

    def __init__(self, pipeline: ChunkPipeline, control_period_s: float, mailbox: Mailbox,
                 assemble: Callable[[Mapping[str, Stamped], str], Observation], settings: Callable[[], LoopSettings],
                 now_ns: Callable[[], int], deliver: Callable[[Delivery], None],
                 report: Callable[[tuple[int, Exception]], None], joining: Joining | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._mailbox, self._assemble, self._settings, self._now_ns = mailbox, assemble, settings, now_ns
        self._deliver, self._report, self._joining, self._clock = deliver, report, joining, clock
        self._gate = Lock()
        self._epoch, self._open, self._chunk_index = 0, False, 0
        self._pipeline: ChunkPipeline | None = pipeline
        self._trigger, self._pace = Trigger(control_period_s), Pace(pipeline.side_by_side)
        self._flights: deque[Flight] = deque()  # oldest first
        self._busy_since_s: float | None = None
        self.dropped: Counter[str] = Counter()  # observations begun and not finished, by cause

    def open(self, epoch: int) -> None:
        """Start the activation `epoch`, a number never used before; inputs and chunk numbers begin anew."""
        with self._gate:
            self._mailbox.clear()
            self._trigger.reset()
            if self._joining is not None:
                self._joining.reset()
            self._epoch, self._open, self._chunk_index = epoch, True, 0

    def close(self) -> None:
        """End the activation; a chunk that is being denoised still comes out, with its epoch."""
        with self._gate:
            self._open = False

    def forget_policy(self) -> None:
        """Close for good and let go of the policy; as the worker's job, so that its memory is freed on that thread."""
        self.close()
        self._drop_all("activation ended")
        pipeline, self._pipeline = self._pipeline, None
        try:
            if pipeline is not None:
                pipeline.close()
        finally:
            del pipeline
            release_memory()

    def due(self) -> float | None:
        """Seconds until `step` has something to do, None while there is nothing to wait for."""
        waits = (self._head_wait_s(), self._begin_wait_s())
        return min((wait for wait in waits if wait is not None), default=None)

    def step(self) -> None:
        """The oldest chunk first: hand it over, or let it be denoised; else begin the next. Never raises: a bad input
        is reported and the loop lives on, anything else closes the gate."""
        flight = self._flights[0] if self._flights else None
        self._busy_since_s = self._clock() if flight is None else flight.begun_s
        epoch = self._epoch if flight is None else flight.epoch
        try:
            if flight is not None and self._head_wait_s() == 0.0:
                if not flight.pending.advanced:
                    self._advance(flight)
                if flight in self._flights and finished(flight.pending):  # at once, where a chunk is made in one go
                    self._collect(flight)
            elif self._begin_wait_s() == 0.0:
                epoch = self._epoch
                self._begin(epoch)
        except ObservationError as error:
            self._report((epoch, error))
        except Exception as error:  # a broken policy must not go on: close the gate, tell the node, keep the thread
            error.add_note(traceback.format_exc())
            error = named(error)
            self._drop_all("failed with another")
            with self._gate:
                self._open = self._open and epoch != self._epoch
            self._report((epoch, error))
        finally:
            self._busy_since_s = self._flights[0].begun_s if self._flights else None

    def busy_s(self) -> float:
        """How long the oldest chunk in the making, or the step that makes it, has taken so far; for any thread."""
        since = self._busy_since_s
        return 0.0 if since is None else self._clock() - since

    # ------------------------------------------------------------------ when

    def _head_wait_s(self) -> float | None:
        if not self._flights:
            return None
        head = self._flights[0]
        if not head.pending.advanced or finished(head.pending):
            return 0.0
        done_at = self._pace.done_at(head.begun_s, head.advanced_s, head.settings.denoising_steps)
        return self._pace.ask_again_s(done_at - self._clock())

    def _begin_wait_s(self) -> float | None:
        pipeline = self._pipeline
        if pipeline is None or not self._open or len(self._flights) >= pipeline.depth or not self._mailbox.complete():
            return None
        wait = self._trigger.wait_s(self._settings(), self._now_ns())
        if self._flights:
            last = self._flights[-1]
            begin_at = self._pace.begin_at(last.begun_s, last.advanced_s, last.settings.denoising_steps)
            wait = max(wait, begin_at - self._clock())
        return max(0.0, wait)

    # ------------------------------------------------------------------ what

    def _begin(self, epoch: int) -> None:
        pipeline, settings = self._pipeline, self._settings()
        started_ns, started_s = self._now_ns(), self._clock()
        taken = self._mailbox.take(started_ns)
        if taken is None or pipeline is None:  # a newer frame came in between: its companions follow
            return
        observation = self._assemble(taken, settings.prompt)
        with self._gate:
            index = self._chunk_index
        pending = pipeline.begin(observation, settings.denoising_steps, chunk_index=index)
        with self._gate:
            if epoch == self._epoch:  # else a new activation began meanwhile, with a count and a grid of its own
                self._chunk_index += 1
                self._trigger.begun(settings, started_ns, observation.stamp_ns)
        begun_s = self._clock()
        self._pace.host_s = begun_s - started_s
        self._flights.append(Flight(
            pending, epoch, observation, settings, {slot: stamped.stamp_ns for slot, stamped in taken.items()},
            complete_at(taken), started_ns, self._now_ns(), begun_s))

    def _advance(self, flight: Flight) -> None:
        pipeline = self._pipeline
        assert pipeline is not None
        aged_s = (self._now_ns() - flight.begun_ns + flight.started_ns - min(flight.stamps_ns.values())) * 1e-9
        ended = not self._open or flight.epoch != self._epoch
        if ended or aged_s > self._mailbox.limits.max_age_s:
            self._flights.popleft()
            pipeline.drop(flight.pending)
            self.dropped["activation ended" if ended else "too old"] += 1
            if not ended:
                raise ObservationError("observation", expected="to be denoised before it is "
                                       f"{self._mailbox.limits.max_age_s} s old", received=f"{aged_s:.3f} s, waiting",
                                       way_out="Lower denoising_steps, or raise max_input_age_s.", cause="too old")
            return
        try:
            pipeline.advance(flight.pending, self._guidance(flight))
        except Exception:  # once: if it was the input, the next observation, not this one again
            self._flights.popleft()
            pipeline.drop(flight.pending)
            raise
        flight.advanced_s = self._clock()

    def _guidance(self, flight: Flight) -> Guidance | None:
        """As late as this, because in overlap the chunk before was not yet made when this one began."""
        if self._joining is None:
            return None
        return self._joining.guidance(flight.observation, flight.settings.join)

    def _collect(self, flight: Flight) -> None:
        pipeline = self._pipeline
        assert pipeline is not None
        self._flights.popleft()
        chunk = pipeline.collect(flight.pending)
        times = chunk.stage_times_ms
        self._pace.front_s = 1e-3 * sum(times.get(stage, 0.0) for stage in pipeline.front)
        self._pace.step_s = 1e-3 * sum(times.get(stage, 0.0) for stage in pipeline.back) / chunk.num_steps
        with self._gate:
            if self._joining is not None and flight.epoch == self._epoch:
                self._joining.made(chunk)
        self._deliver(Delivery(chunk, flight.epoch, flight.stamps_ns, flight.complete_ns, flight.started_ns,
                               flight.settings.join))

    def _drop_all(self, cause: str) -> None:
        while self._pipeline is not None and self._flights:
            self._pipeline.drop(self._flights.popleft().pending)
            self.dropped[cause] += 1


def finished(pending: Any) -> bool:
    """A chunk whose work failed is finished too: `collect` says what happened."""
    try:
        return pending.finished()
    except Exception:  # not lost: `collect` comes next, raises it again, and `step` reports it with its traceback
        return True


def complete_at(taken: Mapping[str, Stamped]) -> int:
    """When the last camera of a set arrived (or, without cameras, the joints), ns."""
    cameras = [stamped.received_ns for slot, stamped in taken.items() if slot != Mailbox.STATE]
    return max(cameras, default=taken[Mailbox.STATE].received_ns)
