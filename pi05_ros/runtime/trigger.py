"""When the next chunk may begin: as fast as possible, at a fixed rate, or after some actions of the last chunk."""

from __future__ import annotations

from dataclasses import dataclass

from pi05_ros.runtime.joining import JoinSettings


@dataclass(frozen=True)
class LoopSettings:
    """What may change between two chunks, never inside one.

    Args:
        denoising_steps: flow-matching steps.
        prompt: the instruction.
        execution_horizon: actions of the last chunk whose time must have passed before the next observation; 0: none.
        max_rate_hz: chunks begin on a grid of this rate; 0: as fast as possible.
        join: how the chunk continues the one before.
    """

    denoising_steps: int = 10
    prompt: str = ""
    execution_horizon: int = 0
    max_rate_hz: float = 0.0
    join: JoinSettings = JoinSettings()


class Trigger:
    """Remembers the last beginning; all times on the robot's clock."""

    def __init__(self, control_period_s: float) -> None:
        self._period_ns = control_period_s * 1e9
        self.reset()

    def reset(self) -> None:
        """The next chunk may begin at once."""
        self._begun_ns: int | None = None
        self._grid_ns = self._stamp_ns = 0.0

    def wait_s(self, settings: LoopSettings, now_ns: int) -> float:
        """Seconds until the next chunk may begin."""
        if self._begun_ns is None or now_ns < self._begun_ns:  # the first one, or the clock was set back
            return 0.0
        due = [float(now_ns)]
        if settings.execution_horizon:
            due.append(self._stamp_ns + settings.execution_horizon * self._period_ns)
        if settings.max_rate_hz > 0:
            due.append(self._grid_ns + 1e9 / settings.max_rate_hz)
        return (max(due) - now_ns) * 1e-9

    def begun(self, settings: LoopSettings, now_ns: int, stamp_ns: int) -> None:
        """A chunk began for the observation of that stamp. One that is late does not move the grid, a gap does."""
        self._begun_ns, self._stamp_ns = now_ns, stamp_ns
        if settings.max_rate_hz > 0:
            late = now_ns - self._grid_ns - 1e9 / settings.max_rate_hz
            self._grid_ns = now_ns - late if 0 <= late < 1e9 / settings.max_rate_hz else now_ns
