"""When to begin a chunk while another is denoised: as late as possible without letting the device run idle.

Begun sooner it would only grow old: waiting for the device behind its predecessor, or in its slot.
"""

from __future__ import annotations

from dataclasses import dataclass

POLL_S = 0.0002  # how often a result that is overdue is asked for
MARGIN_S = 0.001  # by which work comes before the device is idle, where front and back take turns
NEARER = 0.9  # share of the remaining time after which it is asked for earlier


@dataclass
class Pace:
    """What the last chunk took, in seconds: on the host to begin, on the front stream, on the back stream a step.

    side_by_side: front and back of two chunks at the same time, for a device that runs them faster so than in turn.
    Else only the host's part is done ahead, with the copies that it issues.
    """

    side_by_side: bool = False
    host_s: float = 0.0
    front_s: float = 0.0
    step_s: float = 0.0

    def begin_at(self, begun_s: float, advanced_s: float, num_steps: int) -> float:
        """When the next chunk should begin, given when the running one was begun and advanced."""
        done = self.done_at(begun_s, advanced_s, num_steps)
        if not self.side_by_side:
            return done - MARGIN_S - self.host_s
        return max(begun_s + self.front_s, done - self.front_s) - self.host_s

    def done_at(self, begun_s: float, advanced_s: float, num_steps: int) -> float:
        """When the running chunk is expected to be done. In turn, its front runs when its predecessor is done, which is
        when it is advanced."""
        front_done = begun_s + self.front_s if self.side_by_side else max(begun_s, advanced_s) + self.front_s
        return max(front_done, advanced_s) + self.step_s * num_steps

    @staticmethod
    def ask_again_s(remaining_s: float) -> float:
        """How long to wait before asking for a result that is expected in `remaining_s`: few questions, small delay."""
        return max(POLL_S, NEARER * remaining_s)
