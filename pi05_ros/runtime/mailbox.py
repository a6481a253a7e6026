"""Newest wins: one slot an input, between the threads that receive and the one that infers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

from pi05_ros.errors import ObservationError


@dataclass(frozen=True)
class Stamped:
    """An input, the time it was taken and the time it arrived, ns."""

    value: Any
    stamp_ns: int
    received_ns: int


@dataclass(frozen=True)
class InputLimits:
    """How old an input may be, and how far apart the stamps of one set may lie, both in seconds."""

    max_age_s: float = 0.5
    max_skew_s: float = 0.1


class Mailbox:
    """Slots for cameras and the robot state.

    A set is complete when every living camera is newer than in the last set and all stamps lie close together. Until
    then one waits: the frame that is missing, or lags behind, is on its way.

    Args:
        required: cameras without which there is no inference.
        optional: cameras that are waited for while they live, and masked once they have been silent for longer than
            an input may be old.
        on_complete: called, from the putting thread, when a set becomes complete.
        limits: age and skew; may be replaced at any time.
    """

    STATE = "state"

    def __init__(self, required: tuple[str, ...], optional: tuple[str, ...] = (),
                 on_complete: Callable[[], None] = lambda: None, limits: InputLimits = InputLimits()) -> None:
        self.required, self.optional, self._on_complete, self.limits = required, optional, on_complete, limits
        self._lock = Lock()
        self._slots: dict[str, Stamped] = {}
        self._unread: set[str] = set()
        self._last_take_ns = 0
        # Every frame ends in one of these, by slot: dropped (overwritten, forgotten, late, the same again) or taken.
        self.dropped: Counter[str] = Counter()
        self.taken: Counter[str] = Counter()

    def put(self, slot: str, value: Any, stamp_ns: int, now_ns: int) -> None:
        """Replace the slot's content; an older stamp, or a camera's same one again, is counted and ignored. Joints of
        the same stamp, from two publishers say, are counted; the later message holds.

        Raises:
            ObservationError: a stamp in the future, which would keep all later inputs out.
        """
        if (ahead := (stamp_ns - now_ns) * 1e-9) > self.limits.max_skew_s:
            raise ObservationError(f"input '{slot}'", expected="a stamp not later than now",
                                   received=f"{ahead:.3f} s in the future", cause="future stamp",
                                   way_out="Synchronise the clocks of the machines (chrony), or check use_sim_time.")
        with self._lock:
            held = self._slots.get(slot)
            if held is not None and stamp_ns < held.stamp_ns:
                self.dropped[f"{slot} out of order"] += 1
                return
            if held is not None and stamp_ns == held.stamp_ns:
                self.dropped[f"{slot} repeated"] += 1
                if slot != self.STATE:  # one picture, one chunk
                    return
            if slot in self._unread and slot != self.STATE:  # the state is meant to be overwritten
                self.dropped[slot] += 1
            self._slots[slot] = Stamped(value, stamp_ns, now_ns)
            self._unread.add(slot)
            complete = self._complete()
        if complete:
            self._on_complete()

    def complete(self) -> bool:
        with self._lock:
            return self._complete()

    def latest(self, slot: str) -> Stamped | None:
        with self._lock:
            return self._slots.get(slot)

    def ages_s(self, now_ns: int) -> dict[str, float]:
        """How old the newest input of each slot is."""
        with self._lock:
            return {slot: age_s(stamped, now_ns) for slot, stamped in self._slots.items()}

    def clear(self) -> None:
        """Forget everything: inputs of an earlier activation, or from before the clock was set back, must not drive
        what comes later."""
        with self._lock:
            self._last_take_ns = 0
            self._slots.clear()
            self._forget_unread("forgotten")

    def missing(self, now_ns: int, max_age_s: float) -> dict[str, str]:
        """{slot: why} of every input that is absent, too old, or keeps sets from completing."""
        with self._lock:
            slots, members, complete = dict(self._slots), self._members(), self._complete()
            idle_ns = now_ns - self._last_take_ns
        causes = {}
        for slot in (*self.required, self.STATE):
            if slot not in slots:
                causes[slot] = "never arrived"
            elif (age := age_s(slots[slot], now_ns)) > max_age_s:
                causes[slot] = f"last is {age:.2f} s old"
        if not causes and not complete and idle_ns > max_age_s * 1e9:
            lag, oldest, newest = _skew(members)
            causes[oldest] = f"stamps {lag:.3f} s behind {newest}, max_skew_s is {self.limits.max_skew_s}"
        return causes

    def take(self, now_ns: int) -> Mapping[str, Stamped] | None:
        """The newest set, marked as read; None if it is not complete. Silent optional cameras are left out.

        Raises:
            ObservationError: an input of the set is stale.
        """
        with self._lock:
            if not self._complete():
                return None
            self._last_take_ns = now_ns
            taken = self._members()
            self.taken.update(taken.keys())
            self._unread -= taken.keys()
            self._forget_unread("fallen silent")
        for slot, stamped in taken.items():
            _check_age(slot, stamped, now_ns, self.limits)
        return taken

    def _forget_unread(self, why: str) -> None:
        self.dropped.update(f"{slot} {why}" for slot in self._unread if slot != self.STATE)
        self._unread.clear()

    def _members(self) -> dict[str, Stamped]:
        """The inputs that make a set: required ones, and optional cameras that have not fallen silent."""
        newest = max((stamped.stamp_ns for stamped in self._slots.values()), default=0)
        living = [c for c in self.optional
                  if c in self._slots and age_s(self._slots[c], newest) <= self.limits.max_age_s]
        return {slot: self._slots[slot] for slot in (*self.required, *living, self.STATE) if slot in self._slots}

    def _complete(self) -> bool:
        members = self._members()
        cameras = members.keys() - {self.STATE}
        if self.STATE not in members or not self._unread.issuperset(cameras or {self.STATE}):
            return False
        return cameras.issuperset(self.required) and _skew(members)[0] <= self.limits.max_skew_s


def _skew(slots: Mapping[str, Stamped]) -> tuple[float, str, str]:
    """Seconds between the oldest and the newest stamp, and whose they are."""
    oldest = min(slots, key=lambda slot: slots[slot].stamp_ns)
    newest = max(slots, key=lambda slot: slots[slot].stamp_ns)
    return age_s(slots[oldest], slots[newest].stamp_ns), oldest, newest


def age_s(stamped: Stamped, now_ns: int) -> float:
    return (now_ns - stamped.stamp_ns) * 1e-9


def _check_age(slot: str, stamped: Stamped, now_ns: int, limits: InputLimits) -> None:
    age = age_s(stamped, now_ns)
    if age > limits.max_age_s:
        raise ObservationError(f"input '{slot}'", expected=f"at most {limits.max_age_s} s old",
                               received=f"{age:.3f} s", cause="stale input",
                               way_out="Check its publisher, its clock and use_sim_time, or raise max_input_age_s.")
