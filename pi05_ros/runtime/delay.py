"""How long it takes from an observation to the command that answers it, estimated from the chunks before."""

from __future__ import annotations

import math
from collections import deque

WARM_UP = 2  # chunks of an activation that are slower than the others will be
WINDOW = 20  # last ages that count
OUTLIERS = 2  # largest ages of a full window that do not: a third one is no accident


class DelayEstimate:
    """The 90th percentile of the last ages, the first ones left out. Written by one thread, `seconds` read by any."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nothing is known: a new activation."""
        self._seen, self._ages = 0, deque[float](maxlen=WINDOW)
        self.seconds: float | None = None

    def add(self, age_s: float) -> None:
        """A command was published for an observation of that age. Ages below zero (a clock set back) do not count."""
        self._seen += 1
        if self._seen <= WARM_UP or age_s < 0:
            return
        self._ages.append(age_s)
        rank = math.ceil(len(self._ages) * (1 - OUTLIERS / WINDOW))
        self.seconds = sorted(self._ages)[rank - 1]
