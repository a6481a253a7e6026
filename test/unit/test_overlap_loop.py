"""The loop with two chunks in the making, on a pipeline whose stages finish when the test says so."""

import numpy as np
import pytest

from pi05_ros.errors import ObservationError
from pi05_ros.runtime.inference_loop import InferenceLoop
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
        self.log, self.pending, self.error, self.closed = [], [], {}, False

    def begin(self, observation, num_steps, *, chunk_index):
        self._do("begin", observation.stamp_ns)
        self.pending.append(ScriptedPending(observation.stamp_ns, num_steps, chunk_index))
        return self.pending[-1]

    def advance(self, pending, guidance=None):
        self._do("advance", pending.stamp)
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
        self.loop = InferenceLoop(
            self.pipeline, 0.1, self.mailbox, lambda taken, prompt: Observation({}, np.zeros(2), prompt,
                                                                               taken["cam"].stamp_ns),
            lambda: self.settings, lambda: int(self.now_ms * MS), self.out.append, self.out.append,
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


@pytest.fixture
def bench():
    return Bench()


def test_the_next_observation_is_begun_while_the_last_is_denoised_and_results_come_in_order(bench):
    first = bench.send()
    assert bench.run() == [("begin", first), ("advance", first)]
    bench.now_ms += 5
    second = bench.send()
    assert bench.run() == [("begin", second)]  # it is denoised when the first is done
    bench.finish(first)
    bench.now_ms += 10
    third = bench.send()
    assert bench.run() == [("collect", first), ("advance", second), ("begin", third)]
    bench.finish(second)
    assert bench.run() == [("collect", second), ("advance", third)]
    bench.finish(third)
    bench.run()
    assert [d.chunk.stamp_ns for d in bench.out] == [first, second, third]
    assert [d.input_stamps_ns["cam"] for d in bench.out] == [first, second, third]
    assert [d.chunk.chunk_index for d in bench.out] == [0, 1, 2]


def test_a_chunk_begins_just_in_time_for_the_front_stream_with_the_newest_observation(bench):
    bench.one_chunk()
    bench.send()
    bench.run()
    bench.now_ms += 1
    early = bench.send()
    assert bench.run() == [] and bench.loop.due() == pytest.approx(0.007)  # 8 ms in front, 1 passed
    bench.now_ms += 7
    newest = bench.send()
    assert bench.run() == [("begin", newest)]
    assert bench.mailbox.dropped["cam"] == 1 and early != newest


def test_a_result_is_asked_for_when_it_is_expected(bench):
    bench.one_chunk()
    bench.send()
    bench.run()
    assert bench.loop.due() == pytest.approx(0.9 * 0.015)  # 8 ms in front, 10 x 0.7 ms behind
    bench.now_ms += 14.9
    assert bench.loop.due() == pytest.approx(0.0002)


def test_an_observation_that_grew_too_old_in_its_slot_is_dropped_for_the_newest_and_counted(bench):
    first = bench.send()
    bench.run()
    bench.now_ms += 1
    old = bench.send()
    bench.run()
    bench.now_ms += 101  # the first one takes far longer than expected
    newest = bench.send()
    bench.finish(first)
    assert bench.run() == [("collect", first), ("drop", old), ("begin", newest), ("advance", newest)]
    assert bench.loop.dropped == {"too old": 1} and bench.out[1][1].cause == "too old"
    bench.finish(newest)
    bench.run()
    assert [d.chunk.stamp_ns for d in (bench.out[0], bench.out[2])] == [first, newest]


def test_time_spent_computing_does_not_make_an_observation_too_old(bench):
    bench.pipeline.begin, begin = lambda *args, **kwargs: (slow(), begin(*args, **kwargs))[1], bench.pipeline.begin

    def slow():
        bench.now_ms += 500

    stamp = bench.send()
    assert bench.run() == [("begin", stamp), ("advance", stamp)]


def test_settings_are_read_when_a_chunk_begins(bench):
    first = bench.send()
    bench.run()
    bench.settings = LoopSettings(denoising_steps=3)
    bench.now_ms += 1
    second = bench.send()
    bench.run()
    bench.settings = LoopSettings(denoising_steps=7)  # the second has begun: it keeps its three
    bench.finish(first)
    bench.run()
    bench.finish(second)
    bench.run()
    assert [d.chunk.num_steps for d in bench.out] == [10, 3]


def test_deactivation_drops_what_waits_and_lets_out_what_is_denoised_with_its_old_epoch(bench):
    first = bench.send()
    bench.run()
    bench.now_ms += 1
    second = bench.send()
    bench.run()
    bench.loop.close()
    bench.loop.open(2)
    bench.finish(first)
    assert bench.run() == [("collect", first), ("drop", second)]
    assert [d.epoch for d in bench.out] == [1] and bench.loop.dropped == {"activation ended": 1}
    third = bench.send()
    bench.run()
    bench.finish(third)
    bench.run()
    assert (bench.out[1].epoch, bench.out[1].chunk.chunk_index) == (2, 0)


@pytest.mark.parametrize("where", ["begin", "advance", "collect"])
def test_a_failure_anywhere_drops_all_closes_the_gate_and_a_new_activation_works(bench, where):
    first = bench.send()
    bench.run()
    bench.now_ms += 1
    bench.pipeline.error[where] = RuntimeError("CUDA error: out of memory")
    bench.send()
    bench.run()
    if where != "begin":  # all were dropped
        bench.finish(first)
    bench.run()
    epoch, error = next(item for item in bench.out if isinstance(item, tuple))
    assert epoch == 1 and "out of memory" in str(error) and "Traceback" in error.__notes__[0]
    assert bench.pipeline.pending == [] and isinstance(bench.out[-1], tuple)  # nothing follows from a broken device
    bench.send()
    assert bench.loop.due() is None
    bench.loop.open(2)
    stamp = bench.send()
    bench.run()
    bench.finish(stamp)
    bench.run()
    assert bench.out[-1].chunk.stamp_ns == stamp


def test_work_that_fails_on_the_device_is_reported_and_does_not_end_the_thread(bench):
    bench.send()
    bench.run()
    bench.pipeline.pending[0].error = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert bench.loop.due() == 0.0
    bench.run()
    ((epoch, error),) = bench.out
    assert epoch == 1 and error.cause == "CUDA error" and bench.loop.due() is None


def test_how_long_the_worker_is_busy_is_known(bench):
    assert bench.loop.busy_s() == 0.0
    first = bench.send()
    bench.run()
    bench.now_ms += 40
    assert bench.loop.busy_s() == pytest.approx(0.04)
    bench.finish(first)
    bench.run()
    assert bench.loop.busy_s() == 0.0


def test_the_policy_is_let_go_after_the_device_is_idle(bench):
    bench.send()
    bench.run()
    bench.loop.forget_policy()
    assert bench.pipeline.closed and bench.pipeline.pending == [] and bench.loop.due() is None
    bench.loop.step()  # and nothing happens


def test_how_long_a_set_waited_for_the_worker_is_known(bench):
    bench.one_chunk()
    bench.settings = LoopSettings(max_rate_hz=10.0)
    bench.one_chunk()
    stamp = bench.send()
    bench.run()
    bench.now_ms += 100
    bench.run()
    bench.finish(stamp)
    bench.run()
    assert bench.out[-1].started_ns - bench.out[-1].complete_ns == 100 * MS


def test_an_observation_that_is_refused_is_not_tried_again(bench):
    first = bench.send()
    bench.pipeline.error["advance"] = ObservationError("actions", expected="numbers", received="NaN", way_out="None.")
    assert bench.run() == [("begin", first), ("advance", first), ("drop", first)]
    ((epoch, error),) = bench.out
    bench.now_ms += 5
    second = bench.send()
    assert epoch == 1 and error.subject == "actions" and bench.run() == [("begin", second), ("advance", second)]


def test_a_chunk_begun_while_a_new_activation_began_does_not_delay_its_first_one(bench):
    bench.settings = LoopSettings(execution_horizon=100)
    begin = bench.pipeline.begin

    def begin_late(*args, **kwargs):
        bench.pipeline.begin = begin
        bench.loop.open(2)
        return begin(*args, **kwargs)

    bench.pipeline.begin = begin_late
    assert ("drop", bench.send()) in bench.run()
    bench.now_ms += 5
    assert ("begin", bench.send()) in bench.run()
