"""One thread that does all the computing of its life: load, infer, free.

Everything that touches the GPU runs here, so that no callback ever waits for it and every CUDA resource is made
and freed by one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from threading import Condition, Thread
from typing import Any, TypeVar

from pi05_ros.errors import WorkerError

Result = TypeVar("Result")


LONGEST_WAIT_S = 1.0  # then `due` is asked again: clocks jump, and a wait has a largest value


class Worker:
    """Runs jobs in order and, between them, a repeating step while that is due."""

    def __init__(self) -> None:
        self._due: Callable[[], float | None] = lambda: None
        self._step: Callable[[], None] = lambda: None
        self._changed = Condition()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._woken = self._stopping = False
        self.failure: BaseException | None = None  # what ended the thread, if it was not `stop`
        self._thread = Thread(target=self._run, name="pi05_worker", daemon=True)
        self._thread.start()

    def repeat(self, due: Callable[[], float | None], step: Callable[[], None]) -> None:
        """Set the repeating step.

        Args:
            due: seconds until the step should run: 0 now, None not before the next `wake`.
            step: one cycle. Neither may raise; both are called on the worker's thread.
        """
        with self._changed:
            self._due, self._step = due, step
        self.wake()

    def call(self, job: Callable[[], Result]) -> Future[Result]:
        """Run `job` on the worker's thread; its result or exception is in the future."""
        future: Future[Result] = Future()
        with self._changed:
            if self._stopping:
                raise WorkerError("worker", expected="to be running", received="a job after it was stopped",
                                  way_out="Configure the node again.")
            self._jobs.append((job, future))
            self._changed.notify()
        return future

    def wake(self) -> None:
        """Ask `due` again: something it depends on has changed."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Finish the jobs already queued and end the thread; False if it did not end in time."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """From the moment a failure is known; the thread itself may take seconds to print it and end."""
        return self.failure is None and self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # kept for whoever asks why the thread is gone
            self.failure = error
            raise

    def _work(self) -> None:
        while True:
            wait = None if self._stopping else self._due()
            with self._changed:
                if not self._jobs and not self._stopping and not self._woken and wait != 0:
                    self._changed.wait(None if wait is None else min(wait, LONGEST_WAIT_S))
                job, self._woken = self._jobs.popleft() if self._jobs else None, False
                if job is None and self._stopping:
                    return
            if job is not None:
                _fulfil(*job)
            elif self._due() == 0:
                self._step()


def _fulfil(job: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(job())
    except BaseException as error:  # whoever waits for the future gets it, whatever it is
        future.set_exception(error)
