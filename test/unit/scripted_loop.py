"""The worker's loop on a pipeline whose stages finish when the test says so, and on a clock that the test sets."""

import numpy as np

from pi05_ros.runtime.inference_loop import InferenceLoop
from pi05_ros.runtime.joining import Joining
from pi05_ros.runtime.mailbox import InputLimits, Mailbox
from pi05_ros.runtime.trigger import LoopSettings
from pi05_ros.schema import ActionChunk, Observation

MS = 1_000_000


class ScriptedPending:
    def __init__(self, stamp, steps, index):
        self.stamp, self.steps, self.index, self.advanced, self.done = stamp, steps, index, False, False
        self.error = None

    def finished(self):
        if self.error is not None:
            raise self.error
        return self.advanced and self.done


class ScriptedPipeline:
    """Takes 8 ms in front and 7 ms behind, it says, but `finish` decides."""

    depth, front, back, side_by_side = 2, ("prefix",), ("expert",), True

    def __init__(self):
        self.log, self.pending, self.error, self.closed, self.guidance = [], [], {}, False, {}

    def begin(self, observation, num_steps, *, chunk_index):
        self._do("begin", observation.stamp_ns)
        self.pending.append(ScriptedPending(observation.stamp_ns, num_steps, chunk_index))
        return self.pending[-1]

    def advance(self, pending, guidance=None):
        self._do("advance", pending.stamp)
        self.guidance[pending.stamp] = guidance
        pending.advanced = True

    def collect(self, pending):
        pending.finished()
        assert pending.done, "collected what the test has not finished"
        self.pending.remove(pending)
        self._do("collect", pending.stamp)
        times = {"prefix": 8.0, "expert": 0.7 * pending.steps}
        return ActionChunk(np.zeros((4, 2), np.float32), np.zeros((4, 32), np.float32), pending.stamp, 0.1, "",
                           pending.steps, 0, pending.index, stage_times_ms=times)

    def drop(self, pending):
        self.log.append(("drop", pending.stamp))
        self.pending.remove(pending)

    def close(self):
        self.closed = True

    def _do(self, what, stamp):
        self.log.append((what, stamp))
        if what in self.error:
            raise self.error.pop(what)


class Bench:
    """The loop without its thread: `run` does what the worker would do now."""

    def __init__(self):
        self.now_ms, self.settings, self.out = 1000.0, LoopSettings(), []
        self.pipeline = ScriptedPipeline()
        self.mailbox = Mailbox(("cam",), limits=InputLimits(max_age_s=0.1))
        self.joining = Joining(lambda actions, state: np.zeros((len(actions), 32), np.float32))
        self.loop = InferenceLoop(
            self.pipeline, 0.1, self.mailbox, lambda taken, prompt: Observation({}, np.zeros(2), prompt,
                                                                               taken["cam"].stamp_ns),
            lambda: self.settings, lambda: int(self.now_ms * MS), self.out.append, self.out.append, self.joining,
            clock=lambda: self.now_ms * 1e-3)
        self.loop.open(1)

    def send(self):
        """A set stamped now; returns its stamp."""
        now = int(self.now_ms * MS)
        self.mailbox.put("state", 0, now, now)
        self.mailbox.put("cam", 0, now, now)
        return now

    def run(self):
        """Steps until there is nothing to do now; returns what was done."""
        before = len(self.pipeline.log)
        for _ in range(20):
            if self.loop.due() != 0.0:
                return self.pipeline.log[before:]
            self.loop.step()
        raise AssertionError(f"the loop does not come to rest: {self.pipeline.log}")

    def finish(self, stamp):
        next(p for p in self.pipeline.pending if p.stamp == stamp).done = True

    def one_chunk(self):
        """So that the loop knows how long the stages take."""
        stamp = self.send()
        self.run()
        self.finish(stamp)
        self.run()
        self.now_ms += 1  # so that the next set has a stamp of its own
