"""What may go wrong on a robot, as data: a seeded plan of faults, the same for every run with its seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["drop", "duplicate", "reorder", "delay", "clock_jump", "encoding", "size", "not_a_number",
               "missing_joint", "second_publisher", "parameters", "prompt", "lifecycle", "reset", "worker_exception",
               "bad_actions", "slow_inference", "silence", "publisher_restart", "foreign_publisher", "terminate",
               "kill"]
OF_POLICY: tuple[Kind, ...] = ("worker_exception", "bad_actions", "slow_inference")
OF_PUBLISHERS: tuple[Kind, ...] = ("publisher_restart", "foreign_publisher")
OF_PROCESSES: tuple[Kind, ...] = ("terminate", "kill")
ALL: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]
KINDS = tuple(kind for kind in ALL if kind not in (*OF_PUBLISHERS, *OF_PROCESSES))  # where there is one process
ON_THE_WIRE = tuple(kind for kind in ALL if kind not in (*OF_POLICY, *OF_PROCESSES))
OF_IMAGES = ("encoding", "size")
OF_JOINTS = ("not_a_number", "missing_joint")
RARER = 0.9  # share of the jumps of the clock that become another fault: after one, speed is not judged for a while


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        target: the slot of the mailbox whose message it concerns; "" where it concerns none.
        amount: from 0 to 1; how much of whatever the kind can be more or less of.
    """

    kind: Kind
    target: str
    amount: float


@dataclass(frozen=True)
class FaultPlan:
    """Faults of each cycle, from a seed.

    Args:
        share: of the cycles that have a fault; a tenth of those have two.
        slots: names of the mailbox's cameras and state.
    """

    seed: int
    slots: tuple[str, ...]
    share: float = 0.1
    kinds: tuple[Kind, ...] = KINDS

    def cycles(self) -> Iterator[tuple[Fault, ...]]:
        """The faults of cycle 0, 1, ..., without end."""
        rng = np.random.default_rng(self.seed)
        cameras = [slot for slot in self.slots if slot != "state"]
        while True:
            draw = rng.random(256)
            for chance in draw:
                count = 0 if chance >= self.share else 2 if chance < self.share / 10 else 1
                yield tuple(self._one(rng, cameras) for _ in range(count))

    def _one(self, rng: np.random.Generator, cameras: list[str]) -> Fault:
        kind = self.kinds[rng.integers(len(self.kinds))]
        if kind == "clock_jump" and rng.random() < RARER:
            kind = self.kinds[rng.integers(len(self.kinds))]
        targets = cameras if kind in OF_IMAGES else ["state"] if kind in OF_JOINTS else self.slots
        return Fault(kind, targets[rng.integers(len(targets))], float(rng.random()))
