"""What TensorRT says while it builds: its messages, and its progress as one fraction."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

GRAVE = ("internal_error", "error")
Progress = Callable[[float, str], None]  # (0..1, what is being done)


@dataclass
class BuildLog:
    """The receiver of `Api.logger`. `lines` has what is at least a warning, in order, each once."""

    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __call__(self, severity: str, text: str) -> None:
        if severity in GRAVE:
            self.errors.append(text)
        if severity in (*GRAVE, "warning") and f"{severity}: {text}" not in self.lines:
            self.lines.append(f"{severity}: {text}")

    @property
    def reason(self) -> str:
        """The errors, first and last: the first is the cause, the last what it led to."""
        return " | ".join(dict.fromkeys((*self.errors[:2], *self.errors[-1:]))) or "no message"


class PhaseProgress:
    """Phases that contain each other, as one number that never falls: a step of a phase is shared out by its parts.

    Called from TensorRT's threads. `report` may return False to ask for the build to stop.
    """

    def __init__(self, report: Callable[[float, str], bool | None]) -> None:
        self._report, self._lock = report, threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # phase -> (parent, steps, done)
        self._most = 0.0
        self._go_on = True

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[phase] = (parent, max(1, steps), 0)
            self._tell(phase)

    def step(self, phase: str, done: int) -> bool:
        with self._lock:
            if phase in self._phases:
                parent, steps, _ = self._phases[phase]
                self._phases[phase] = (parent, steps, min(done + 1, steps))
                self._tell(phase)
            return self._go_on

    def finish(self, phase: str) -> None:
        with self._lock:
            parent, steps, _ = self._phases.pop(phase, (None, 1, 1))
            if parent is None or parent not in self._phases:
                self._most = max(self._most, 1.0)
            self._tell(phase)

    def _tell(self, phase: str) -> None:
        self._most = max(self._most, min(1.0, self._fraction()))
        if self._report(self._most, phase) is False:
            self._go_on = False

    def _fraction(self) -> float:
        """Of the outermost phase: steps done, and what the phase inside it has done of the next one."""
        root = next((name for name, (parent, _, _) in self._phases.items() if parent not in self._phases), None)
        fraction, share = 0.0, 1.0
        while root is not None:
            _, steps, done = self._phases[root]
            share /= steps
            fraction += share * done
            root = next((name for name, (parent, _, _) in self._phases.items() if parent == root), None)
        return fraction
