"""Knowing when the device will be done, so that who comes next can get ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

LEAD_S = 0.0016  # somewhat longer than it takes to get ready, on a processor that was asleep
SLEEP_S = 0.001  # at most, before looking again: a run may be shorter than those before
KNOWN = 2  # runs of a kind, of which the shorter counts: one may have been held up


class Anticipation:
    """Sleeps while the device computes, and tells somebody shortly before it is done."""

    def __init__(self, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self._now, self._sleep = now, sleep
        self._kind: Hashable = None
        self._took_s: list[float] = []  # by the last runs, which were of one kind
        self._begun_s = 0.0

    def begin(self) -> None:
        self._begun_s = self._now()

    def wait(self, kind: Hashable, reached: Callable[[], bool], soon: Callable[[], None]) -> None:
        """Until `LEAD_S` before the end that runs of this kind had lately, then `soon` is called; or until the end is
        `reached`. Where no such run is known, not at all."""
        if kind != self._kind:
            self._kind, self._took_s = kind, []
        if len(self._took_s) < KNOWN:
            return
        until_s = self._begun_s + min(self._took_s) - LEAD_S
        while (left_s := until_s - self._now()) > 0:
            if reached():
                return
            self._sleep(min(left_s, SLEEP_S))
        soon()

    def done(self) -> None:
        self._took_s = [*self._took_s, self._now() - self._begun_s][-KNOWN:]
