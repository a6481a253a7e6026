"""What the robot is told: chunks as trajectories, and holds. Runs on the executor's thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pi05_ros.errors import ObservationError
from pi05_ros.ros import parameters
from pi05_ros.ros.commands import Commands
from pi05_ros.runtime.chunking import JointLimits, JointMeasurement, plan_chunk, plan_hold
from pi05_ros.runtime.inference_loop import Delivery
from pi05_ros.runtime.joining import Joining
from pi05_ros.runtime.mailbox import Mailbox, age_s
from pi05_ros.runtime.trajectory import Commanded, JointTrajectoryPlan
from pi05_ros.schema import ActionChunk

CLOCK_CORRECTION_S = 1.0  # a larger step back is a simulation that began anew
MOST_PLANS = 3  # of a chunk, on a machine that halts while it plans


class Motion:
    """Args: joining: hears what became of each chunk; now_ns: the robot's clock; values: the node's parameters in
    force; log: takes a line."""

    def __init__(self, limits: JointLimits, mailbox: Mailbox, commands: Commands, joining: Joining,
                 now_ns: Callable[[], int], values: Callable[[], Mapping[str, Any]],
                 log: Callable[[str], object]) -> None:
        self._limits, self._mailbox, self._commands, self._joining = limits, mailbox, commands, joining
        self._now_ns, self._values, self._log = now_ns, values, log
        self.held = False
        self._at_rest = True  # what was commanded last is a hold, or nothing
        self._commanded = Commanded()
        self._executed: ActionChunk | None = None  # what was published last
        self.deadline_misses = 0  # trajectories that came after the robot had begun to brake for want of them

    @property
    def joints(self) -> list[str]:
        return self._limits.names

    def resume(self, joints: list[str], last: JointTrajectoryPlan | None) -> None:
        """Goes on from the last trajectory of an earlier configuration: the robot may still be braking."""
        if last is not None and joints == self.joints:
            self._commands.last = last
            self._commanded.add(self._now_ns(), last)

    def begin(self) -> None:
        """A new activation, or a reset: a trajectory that has ended no longer says where the robot is."""
        self.held = False
        if self._commands.last is not None and self._commands.last.end_ns <= self._now_ns():
            self._forget()

    def publish(self, delivery: Delivery) -> int:
        """A chunk as the trajectory to execute from now on; gives when it was published, ns.

        Raises:
            ObservationError: inputs that fell silent meanwhile, or a chunk that cannot be executed.
        """
        try:
            published_ns, plan = self._execute(delivery)
        except Exception:  # whatever it was, the chunk is not executed; raised again
            self._joining.interrupted()
            raise
        self._joining.published(delivery.chunk, published_ns, plan.late_s)
        return published_ns

    def _execute(self, delivery: Delivery) -> tuple[int, JointTrajectoryPlan]:
        command, running = parameters.command_limits(dict(self._values())), self._commands.last
        chunk: ActionChunk | None = None
        consuming = delivery.join.mode != "plain" and not self._at_rest  # a robot that is held consumes no actions
        for _ in range(MOST_PLANS):
            now_ns = self._now_ns()
            measured = self._alive(now_ns, running)
            chunk = chunk or self._joining.combined(delivery.chunk, delivery.join)
            plan = plan_chunk(chunk, self._limits, measured, now_ns, command, running, consuming)
            gone_s = (self._now_ns() - now_ns) * 1e-9  # of the lead, which is for the way to the controller
            if gone_s <= 0.5 * command.lead_s or not command.lead_s:
                break
        if gone_s > command.lead_s > 0:
            raise ObservationError("chunk", expected=f"to be planned in less than command_lead_s = {command.lead_s} s",
                                   received=f"{gone_s:.3f} s, at the last of {MOST_PLANS} tries", cause="late plan",
                                   way_out="Give the node's process more of the machine, or raise command_lead_s.")
        self._publish(plan, now_ns)
        published_ns = self._now_ns()
        self._commands.publish_provenance(delivery, now_ns, published_ns, measured.stamp_ns, plan)
        plan.prepare()
        self._executed = chunk
        if running is not None and not self._at_rest and now_ns > running.end_ns - command.stop_time_s * 1e9:
            self.deadline_misses += 1
        self.held = self._at_rest = False
        return published_ns, plan

    def rehearse(self) -> None:
        """Plans the last chunk once more, for nobody, just before the next one is there: code that has not run for 30
        ms is in no cache, and takes twice as long."""
        chunk, running = self._executed, self._commands.last
        if chunk is None or running is None or self._at_rest:
            return
        now_ns = self._now_ns()
        try:
            measured = self._alive(now_ns, running)
            self._commands.rehearse(plan_chunk(chunk, self._limits, measured, now_ns,
                                               parameters.command_limits(dict(self._values())), running))
        except ObservationError:
            return  # who has a chunk to publish finds the same, and says it

    def _alive(self, now_ns: int, running: JointTrajectoryPlan | None) -> JointMeasurement:
        """The joints as measured last; ObservationError where an input has fallen silent."""
        causes = self._mailbox.missing(now_ns, self._values()["input_timeout_s"])
        measured = self.measured(now_ns, running)
        if measured is None or causes:
            raise ObservationError("chunk", expected="inputs that still arrive when it is published",
                                   received=", ".join(f"{slot}: {why}" for slot, why in causes.items()) or "old joints",
                                   way_out="Check the inputs named.", cause="silent at publication")
        return measured

    def hold(self, why: str) -> None:
        """Bring the robot to rest where it is. Nothing is published if nothing that we commanded is still running."""
        now_ns, running = self._now_ns(), self._commands.last
        self._joining.interrupted()
        if running is not None and running.end_ns > now_ns:
            now_on = self._commanded.running(now_ns) or running  # a new one has the robot from its first point on
            self._publish(plan_hold(now_on, self.measured(now_ns), now_ns, self._limits,
                                    self._values()["stop_time_s"]), now_ns)
            self._log(f"hold: {why}")
        self.held = self._at_rest = True  # after: a hold that could not be published is tried again

    def clock_set_back(self, before_ns: int, now_ns: int) -> None:
        """The running trajectory's times mean nothing any more: nothing may join it. After a correction of the clock
        the robot is held where it was in the old time; a simulation that began anew has put it elsewhere."""
        running = self._commands.last
        self._joining.interrupted()
        if running is not None and before_ns - now_ns < CLOCK_CORRECTION_S * 1e9:
            self._commands.last = replace(running, stamp_ns=running.stamp_ns + now_ns - before_ns)
            self._commanded.shift(now_ns - before_ns)
            self.hold("the clock was set back")
        self._forget()
        self._at_rest = True

    def on_fault(self, why: str) -> None:
        """What the parameter `on_fault` says: hold, or say nothing more and let the running trajectory end at rest."""
        if self._values()["on_fault"] == "hold":
            self.hold(why)
        elif not self.held:
            self.held = True
            self._log(f"nothing more is published: {why}")

    def measured(self, now_ns: int, running: JointTrajectoryPlan | None = None) -> JointMeasurement | None:
        """The joints as measured last, unless that was too long ago. What was commanded then is left out where the
        `running` trajectory says it."""
        latest = self._mailbox.latest(Mailbox.STATE)
        fresh = latest is not None and age_s(latest, now_ns) <= self._values()["max_input_age_s"]
        if latest is None or not fresh:
            return None
        if running is not None and latest.stamp_ns >= running.known_from_ns:
            return latest.value
        return replace(latest.value, told=self._commanded.at(latest.stamp_ns))

    def _publish(self, plan: JointTrajectoryPlan, now_ns: int) -> None:
        try:
            self._commands.publish(plan)
        finally:
            if self._commands.last is plan:  # one controller that cannot be reached does not keep the others from it
                self._commanded.add(now_ns, plan)

    def _forget(self) -> None:
        self._commands.last = None
        self._commanded.clear()
