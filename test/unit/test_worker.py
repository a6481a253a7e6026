"""The worker thread and the loop it runs, with a policy that finishes when the test says so."""

import queue
import threading
from concurrent.futures import Future

import numpy as np
import pytest

from pi05_ros.errors import ObservationError, WorkerError
from pi05_ros.runtime.inference_loop import InferenceLoop
from pi05_ros.runtime.mailbox import Mailbox
from pi05_ros.runtime.sequential import Sequential
from pi05_ros.runtime.trigger import LoopSettings
from pi05_ros.runtime.worker import Worker
from pi05_ros.schema import ActionChunk, Observation

TIMEOUT = 60  # seconds until a test that hangs fails


class ScriptedPolicy:
    """Answers when released; remembers what it was asked."""

    def __init__(self):
        self.asked, self.entered, self.release = [], threading.Semaphore(0), threading.Semaphore(0)
        self.error = None

    def infer(self, observation, num_steps, *, chunk_index, guidance=None):
        self.asked.append((observation.prompt, num_steps, chunk_index, threading.current_thread().name))
        self.entered.release()
        assert self.release.acquire(timeout=TIMEOUT)
        if self.error is not None:
            raise self.error
        return ActionChunk(np.zeros((4, 2), np.float32), np.zeros((4, 32), np.float32), observation.stamp_ns, 0.1,
                           observation.prompt, num_steps, 0, chunk_index)


class Bench:
    """A loop on a worker with one camera; deliveries and reports come out as futures in order."""

    def __init__(self):
        self.now, self.settings, self.policy = 1_000, LoopSettings(prompt="first"), ScriptedPolicy()
        self._out: queue.Queue = queue.Queue()
        self.worker = Worker()
        self.mailbox = Mailbox(("cam",), on_complete=self.worker.wake)
        self.loop = InferenceLoop(Sequential(self.policy), 0.1, self.mailbox, self.assemble, lambda: self.settings,
                                  lambda: self.now, self._out.put, self._out.put)
        self.worker.repeat(self.loop.due, self.loop.step)

    def assemble(self, taken, prompt):
        if taken["cam"].value == "bad":
            raise ObservationError("cam", expected="a picture", received="bad", way_out="", cause="encoding")
        return Observation({}, np.zeros(2, np.float32), prompt, taken["cam"].stamp_ns)

    def send(self, stamp, value="good"):
        self.mailbox.put("state", 0, stamp, stamp)
        self.mailbox.put("cam", value, stamp, stamp)

    def next(self):
        return self._out.get(timeout=TIMEOUT)

    def entered(self):
        assert self.policy.entered.acquire(timeout=TIMEOUT), "inference did not start"


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.loop.close()
    bench.policy.release.release(1000)
    assert bench.worker.stop(TIMEOUT)


def test_jobs_and_inference_share_one_thread(bench):
    assert bench.worker.call(lambda: threading.current_thread().name).result(TIMEOUT) == "pi05_worker"
    bench.loop.open(1)
    bench.policy.release.release()
    bench.send(1_000)
    bench.next()
    assert bench.policy.asked[0][3] == "pi05_worker"


def test_an_exception_of_a_job_reaches_who_asked_and_the_thread_lives_on(bench):
    with pytest.raises(ZeroDivisionError):
        bench.worker.call(lambda: 1 / 0).result(TIMEOUT)
    assert bench.worker.call(lambda: 7).result(TIMEOUT) == 7


def test_a_stopped_worker_refuses_jobs():
    worker = Worker()
    assert worker.stop(TIMEOUT) and not worker.alive
    with pytest.raises(WorkerError):
        worker.call(lambda: 1)


def test_nothing_runs_before_the_gate_opens(bench):
    bench.send(1_000)
    assert bench.loop.due() is None
    bench.worker.call(lambda: None).result(TIMEOUT)
    assert bench.policy.asked == []


def test_a_busy_worker_takes_the_newest_set_next(bench):
    bench.loop.open(1)
    bench.send(1_000)
    bench.entered()
    for stamp in (1_001, 1_002, 1_003):
        bench.send(stamp)
    bench.now = 1_003
    bench.policy.release.release(2)
    assert bench.next().chunk.stamp_ns == 1_000
    assert bench.next().chunk.stamp_ns == 1_003
    assert bench.mailbox.dropped["cam"] == 2


def test_a_chunk_made_across_a_deactivation_carries_the_old_epoch(bench):
    bench.loop.open(7)
    bench.send(1_000)
    bench.entered()
    bench.loop.close()
    bench.loop.open(8)
    bench.policy.release.release()
    assert bench.next().epoch == 7


def test_settings_change_between_chunks_and_never_inside_one(bench):
    bench.loop.open(1)
    bench.send(1_000)
    bench.entered()
    bench.settings = LoopSettings(denoising_steps=3, prompt="second")
    bench.policy.release.release()
    chunk = bench.next().chunk
    assert (chunk.prompt, chunk.num_steps) == ("first", 10)
    bench.policy.release.release()
    bench.send(1_001)
    chunk = bench.next().chunk
    assert (chunk.prompt, chunk.num_steps, chunk.chunk_index) == ("second", 3, 1)


def test_chunk_numbers_begin_anew_with_each_activation(bench):
    bench.policy.release.release(3)
    for epoch in range(2):
        bench.loop.open(epoch)
        bench.send(1_000)
        assert bench.next().chunk.chunk_index == 0
        bench.loop.close()


def test_a_bad_input_is_reported_and_the_loop_lives_on(bench):
    bench.loop.open(3)
    bench.send(1_000, "bad")
    epoch, error = bench.next()
    assert (epoch, error.cause) == (3, "encoding")
    bench.policy.release.release()
    bench.send(1_001)
    assert bench.next().chunk.stamp_ns == 1_001


def test_a_broken_policy_closes_the_gate_and_says_why(bench):
    bench.loop.open(1)
    bench.policy.error = RuntimeError("CUDA error: out of memory")
    bench.policy.release.release()
    bench.send(1_000)
    _, error = bench.next()
    assert "out of memory" in str(error) and "Traceback" in error.__notes__[0]
    bench.send(1_001)
    assert bench.loop.due() is None and bench.worker.alive


def test_a_clock_set_back_does_not_stop_the_loop(bench):
    bench.settings = LoopSettings(execution_horizon=5)
    bench.now = 10**12
    bench.loop.open(1)
    bench.policy.release.release(2)
    bench.send(10**12)
    bench.next()
    bench.now = 10**11
    bench.mailbox.clear()  # as after a reset: the old stamps are gone
    bench.send(10**11)
    assert bench.next().chunk.stamp_ns == 10**11


def test_a_future_keeps_even_a_system_exit(bench):
    future: Future = bench.worker.call(lambda: (_ for _ in ()).throw(SystemExit(3)))
    assert isinstance(future.exception(TIMEOUT), SystemExit) and bench.worker.alive


def test_a_pause_of_centuries_does_not_end_the_thread(bench):
    bench.settings = LoopSettings(max_rate_hz=1e-10)
    bench.loop.open(1)
    bench.policy.release.release(2)
    bench.send(1_000)
    bench.next()
    bench.send(1_001)
    assert bench.worker.call(lambda: 7).result(TIMEOUT) == 7 and bench.worker.alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ended_says_what_ended_it():
    worker = Worker()
    worker.repeat(lambda: 1 / 0, lambda: None)
    worker._thread.join(TIMEOUT)
    assert not worker.alive and isinstance(worker.failure, ZeroDivisionError)


def test_a_thread_that_failed_counts_as_ended_while_it_still_prints_why(monkeypatch):
    printing, printed = threading.Event(), threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda args: (printing.set(), printed.wait(TIMEOUT)))
    worker = Worker()
    worker.repeat(lambda: 1 / 0, lambda: None)
    assert printing.wait(TIMEOUT) and worker._thread.is_alive() and not worker.alive
    printed.set()
    worker._thread.join(TIMEOUT)
