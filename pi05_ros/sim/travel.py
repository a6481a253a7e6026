"""The judge of commands that travel: one that was longer on its way than `command_lead_s`, or than half of its own time
if it is a hold, was late, and may meet another motion than it was planned for. It is counted, and the way to its curve,
up to one point, is not judged.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from trajectory_msgs.msg import JointTrajectory

from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.sim.judge import Judge

NEVER_NS = 2**62
MOST_OPEN = 50


@dataclass
class Command:
    """On the way to its curve until `until_ns`; `before`: the one that was not on its own yet when this one came;
    allowed_ns: how long it may travel; travel_ns: None until its provenance has come; excused: None until settled."""

    stamp_ns: int
    arrived_ns: int
    until_ns: int
    end_ns: int
    before: Command | None
    allowed_ns: int
    travel_ns: int | None = None
    excused: bool | None = None
    excess: list[tuple[str, str]] = field(default_factory=list)


class TravelJudge(Judge):
    """Args: lead_s: how long a command may travel; committed_s: how far ahead of its publication it may end."""

    def __init__(self, *args: Any, lead_s: float, committed_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lead_ns, self._committed_ns = int(lead_s * 1e9), int(committed_s * 1e9)
        self._newest: Command | None = None
        self._open: deque[Command] = deque()  # not settled, oldest first
        self.late = self.refused = self.excused = 0
        self.longest_s = 0.0  # on the way

    def begun(self, plan: JointTrajectoryPlan, taken: bool, now_ns: int) -> None:
        before = self._newest if self._newest is not None and now_ns < self._newest.until_ns else None
        command = Command(plan.stamp_ns, now_ns, plan.next_point_ns(now_ns + 1), plan.end_ns, before, self._lead_ns)
        if not taken:  # all past: the robot never comes to its curve
            self.refused += 1
            command.until_ns, command.travel_ns = NEVER_NS, self._lead_ns + 1
        elif len(plan.times_s) == 1:  # a hold is stamped when it is published, and begins to brake then
            command.travel_ns = now_ns - plan.stamp_ns
            command.allowed_ns = min(self._lead_ns, int(plan.offsets_ns[-1]) // 2)
        self._newest = command
        self._open.append(command)

    def execute(self, message: JointTrajectory, now_ns: int, offset_ns: int = 0) -> JointTrajectoryPlan:
        plan = super().execute(message, now_ns, offset_ns)
        self._settle()
        return plan

    def published(self, stamp_ns: int, published_ns: int) -> None:
        """From provenance: when the command for the observation of `stamp_ns` was published."""
        for command in self._open:
            if command.stamp_ns == stamp_ns and command.travel_ns is None:
                command.travel_ns = command.arrived_ns - published_ns
                if (ahead_ns := command.end_ns - published_ns) > self._committed_ns + 1:  # on the node's own clock
                    self.violation("commits too far ahead", f"{ahead_ns * 1e-9:.3f} s")
        self._settle()

    def lost_track(self) -> None:
        """The node was killed: what it published last is without provenance."""
        for command in self._open:
            command.travel_ns = command.travel_ns or 0
        self._settle()

    def check_end(self, plan: JointTrajectoryPlan, now_ns: int) -> None:
        if self.settled(now_ns):  # else it may have been published before the clock jumped
            super().check_end(plan, now_ns)

    def exceeds(self, what: str, how: str, now_ns: int) -> None:
        command = self._newest
        if command is None or now_ns > command.until_ns or command.excused is False:
            self.violation(what, how)
        elif command.excused:
            self.excused += 1
        else:
            command.excess.append((what, how))

    def _settle(self) -> None:
        """What exceeded a limit on the way to the curve: excused if the command was late, or met one that was."""
        while self._open and (self._open[0].travel_ns is not None or len(self._open) > MOST_OPEN):
            command = self._open.popleft()
            late = (command.travel_ns or 0) > command.allowed_ns
            if self.settled(command.arrived_ns):
                self.late += late
                self.longest_s = max(self.longest_s, (command.travel_ns or 0) * 1e-9)
            command.excused = late or (command.before is not None and bool(command.before.excused))
            command.before = None
            if command.excused:
                self.excused += len(command.excess)
            else:
                for what, how in command.excess:
                    self.violation(what, how)
            command.excess = []
