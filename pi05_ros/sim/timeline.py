"""What happens when in simulated time. No ROS here, no world: time passes by the callable that is handed in."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

Action = Callable[[], object]


class Timeline:
    """Actions at their moments, in order; those of one moment in the order in which they were put in.

    Args:
        pass_to: lets the world's time pass to a moment, ns.
        grain_ns: moments are multiples of it: an action waits for the next one.
        now_ns: where it begins.
    """

    def __init__(self, pass_to: Callable[[int], object], grain_ns: int, now_ns: int) -> None:
        self._pass_to, self._grain_ns, self.now_ns = pass_to, grain_ns, now_ns
        self._order = itertools.count()
        self._due: list[tuple[int, int, Action]] = []

    def at(self, time_ns: int, action: Action) -> None:
        """Do it then, or as soon as time goes on if that is past."""
        time_ns = -(-max(time_ns, self.now_ns) // self._grain_ns) * self._grain_ns
        heapq.heappush(self._due, (time_ns, next(self._order), action))

    def clear(self) -> None:
        """Nothing of what was to come happens."""
        self._due.clear()

    def next_ns(self) -> int | None:
        """When the next action is due."""
        return self._due[0][0] if self._due else None

    def run_to(self, time_ns: int, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Do all that is due before `time_ns`, not at it, and let time pass to there, in whole grains; False where it
        was stopped on the way, which is asked before everything that is done."""
        time_ns = time_ns // self._grain_ns * self._grain_ns
        while not stopped():
            if not self._due or self._due[0][0] >= time_ns:
                self._go(time_ns)
                return True
            due_ns, _, action = heapq.heappop(self._due)
            self._go(due_ns)
            action()
        return False

    def _go(self, time_ns: int) -> None:
        if time_ns > self.now_ns:
            self._pass_to(time_ns)
            self.now_ns = time_ns
