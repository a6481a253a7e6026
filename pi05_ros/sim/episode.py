"""An episode in progress: how it is run, what is kept from the policy, what it executes, what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from pi05_ros.errors import ConfigError
from pi05_ros.runtime.chunking import CommandLimits, JointLimits, JointMeasurement, plan_chunk
from pi05_ros.runtime.joining import Joining, JoinSettings
from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.schema import ActionChunk, Observation
from pi05_ros.sim.smoothness import jerk
from pi05_ros.sim.tasks import COLOURS, Outcome, Task
from pi05_ros.sim.world import TabletopWorld
from pi05_ros.transforms.robot_file import Robot

COMMAND = CommandLimits()  # the node's defaults


@dataclass(frozen=True)
class Loop:
    """How the policy is run.

    Args:
        num_steps: denoising steps.
        execute: control steps between two observations.
        delay: control steps from an observation to the trajectory that answers it; until then the one before goes on.
        limit: control steps after which an episode has failed.
        join: how a chunk continues the one before.
    """

    num_steps: int = 10
    execute: int = 10
    delay: int = 0
    limit: int = 160
    join: JoinSettings = JoinSettings()

    def check(self, horizon: int, robot: Robot) -> None:
        """Raises ConfigError where a chunk of that horizon ends before the next one comes, or chunks overtake."""
        braking = int((COMMAND.max_committed_s - COMMAND.stop_time_s) / robot.control_period_s + 1e-6)
        most = min(horizon - self.delay, braking)
        if not max(1, self.delay) <= self.execute <= most:
            raise ConfigError("--execute", expected=f"{max(1, self.delay)} to {most} control steps: at least the "
                              "delay, at most the horizon less the delay, and before the trajectory brakes",
                              received=str(self.execute), way_out="Look more or less often, or delay less.")


@dataclass(frozen=True)
class Ablation:
    """What is kept from the policy, to see whether it looks, reads and feels.

    Args:
        masked: a camera that it does not get; its robot `may_lack` it.
        wrong_colour: it is told another colour than the episode is judged by.
        shuffled_state: each joint of the arm is told to be where the one before it is.
    """

    masked: str | None = None
    wrong_colour: bool = False
    shuffled_state: bool = False

    def told(self, task: Task) -> str:
        """The prompt."""
        if not self.wrong_colour:
            return task.prompt
        return Task(task.kind, COLOURS[(COLOURS.index(task.colour) + 1) % len(COLOURS)], task.wording).prompt

    def seen(self, observation: Observation) -> Observation:
        images = {camera: frame for camera, frame in observation.images.items() if camera != self.masked}
        state = observation.state
        if self.shuffled_state:
            state = np.append(np.roll(state[:-1], 1), state[-1:])
        return replace(observation, images=images, state=state)


@dataclass(frozen=True)
class Trial:
    """What came of an episode; `steps` control steps; jerk of the arm's commands, RMS and peak, rad/s^3."""

    seed: int
    kind: str
    prompt: str
    outcome: Outcome
    steps: int
    jerk_rms: float = 0.0
    jerk_peak: float = 0.0

    @property
    def success(self) -> bool:
        return self.outcome == "success"


@dataclass
class Run:
    """One episode.

    Args:
        prompt: what the policy is told.
        joining: of its chunks; None: an expert drives, or the node.
        commands: float64 [7] at the start and after every control step.
        frames: of the base camera.
        seen: the last observation.
        waiting: a chunk and the control step at which it arrives.
        plan: the trajectory that runs.
    """

    world: TabletopWorld
    seed: int
    task: Task
    prompt: str
    joining: Joining | None = None
    outcome: Outcome = "running"
    commands: list[np.ndarray] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    seen: Observation | None = None
    waiting: tuple[int, ActionChunk] | None = None
    plan: JointTrajectoryPlan | None = None

    @property
    def steps(self) -> int:
        return len(self.commands) - 1

    def look(self) -> Observation:
        self.seen = self.world.observe()
        self.frames.append(self.seen.images["base_0_rgb"])
        return self.seen

    def arrive(self, step: int, limits: JointLimits, settings: JoinSettings) -> None:
        """Do what the node does when a chunk is made, if it is time."""
        if self.waiting is None or self.waiting[0] > step:
            return
        (_, chunk), self.waiting = self.waiting, None
        assert self.joining is not None and self.seen is not None
        now, measured = self.world.time_ns, JointMeasurement(self.seen.stamp_ns, self.seen.state.astype(np.float64))
        consuming = settings.mode != "plain" and self.plan is not None
        self.plan = plan_chunk(self.joining.combined(chunk, settings), limits, measured, now, COMMAND, self.plan,
                               consuming)
        self.world.execute(self.plan)
        self.joining.published(chunk, now, self.plan.late_s)

    def stepped(self, outcome: Outcome) -> None:
        """A control step has passed."""
        self.outcome = outcome
        self.commands.append(self.world.command)

    def trial(self) -> Trial:
        arm = [j.unit == "rad" for j in self.world.robot.joints]
        rms, peak = jerk(np.array(self.commands)[:, arm], self.world.robot.control_period_s)
        return Trial(self.seed, self.task.kind, self.prompt, self.outcome, self.steps, rms, peak)


def begin(world: TabletopWorld, seed: int, task: Task, prompt: str | None = None) -> Run:
    """An episode from its start; told is the task's prompt unless another is given."""
    world.reset(seed, task)
    return Run(world, seed, task, prompt or task.prompt, commands=[world.command])
