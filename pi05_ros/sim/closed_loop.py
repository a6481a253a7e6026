"""A policy drives the simulated arm: the number that judges every choice. Batched over worlds in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pi05_ros.errors import ConfigError
from pi05_ros.runtime.policy import Policy
from pi05_ros.runtime.timing import StageTimer
from pi05_ros.sim.demonstrations import EXPERT_STREAM
from pi05_ros.sim.expert import ScriptedExpert
from pi05_ros.sim.tasks import COLOURS, Outcome, Task
from pi05_ros.sim.world import TabletopWorld
from pi05_ros.transforms.collate import collate
from pi05_ros.transforms.robot_file import Robot


@dataclass(frozen=True)
class Loop:
    """How the policy is run.

    Args:
        num_steps: denoising steps.
        execute: control steps between two observations; at most the horizon less the delay.
        delay: control steps from an observation to the first command of its chunk. The chunk's first action belongs
            to the observation, so this many are dropped (the plain chunk mode); until then the chunk before goes on.
        limit: control steps after which an episode has failed.
    """

    num_steps: int = 10
    execute: int = 10
    delay: int = 0
    limit: int = 160


@dataclass(frozen=True)
class Trial:
    """What came of an episode; `steps` control steps."""

    seed: int
    kind: str
    prompt: str
    outcome: Outcome
    steps: int

    @property
    def success(self) -> bool:
        return self.outcome == "success"


@dataclass
class Run:
    """One episode in progress: chunks float [H, 7] in the robot's units, each with the control step it begins at."""

    world: TabletopWorld
    seed: int
    task: Task
    prompt: str
    outcome: Outcome = "running"
    steps: int = 0
    frames: list[np.ndarray] = field(default_factory=list)
    active: tuple[int, np.ndarray] | None = None
    waiting: tuple[int, np.ndarray] | None = None

    def command(self, step: int, delay: int) -> np.ndarray:
        if self.waiting is not None and step >= self.waiting[0] + delay:
            self.active, self.waiting = self.waiting, None
        if self.active is None:
            return self.world.command
        begin, chunk = self.active
        return chunk[min(step - begin, len(chunk) - 1)]


Film = Callable[[Run], None]


def evaluate(policy: Policy, worlds: Sequence[TabletopWorld], tasks: dict[int, Task], loop: Loop,
             wrong_colour: bool = False, masked: str | None = None,
             film: Film | None = None) -> list[Trial]:
    """One trial for each {seed: task}, in that order; noise is a function of the seed and the chunk alone, so that
    settings can be compared episode by episode.

    Args:
        worlds: as many episodes are run at once.
        wrong_colour: tell the policy another colour than the episode is judged by.
        masked: a camera that the policy does not get; its robot `may_lack` it.
        film: called with each run when it has ended; `frames` has the base camera at every observation and at the end.

    Raises:
        ConfigError: a horizon too short for the loop.
    """
    horizon = policy.config.action_horizon
    if not 1 <= loop.execute <= horizon - loop.delay:
        raise ConfigError("--execute", expected=f"1 to {horizon - loop.delay}: the horizon less the delay",
                          received=str(loop.execute), way_out="Look more often, or delay less.")
    trials: list[Trial] = []
    seeds = list(tasks)
    for first in range(0, len(seeds), len(worlds)):
        runs = []
        for world, seed in zip(worlds, seeds[first:first + len(worlds)], strict=False):
            task = world.reset(seed, tasks[seed])
            told = _other_colour(task) if wrong_colour else task
            runs.append(Run(world, seed, task, told.prompt))
        _play(policy, runs, loop, masked)
        for run in runs:
            trials.append(Trial(run.seed, run.task.kind, run.prompt, run.outcome, run.steps))
            if film:
                _look(run)
                film(run)
    return trials


def may_lack(robot: Robot, camera: str) -> Robot:
    """The same robot, whose `camera` the model is told is missing where there is no frame."""
    return replace(robot, cameras={**robot.cameras, camera: replace(robot.cameras[camera], required=False)})


def evaluate_expert(world: TabletopWorld, tasks: dict[int, Task],
                    film: Film | None = None) -> list[Trial]:
    """The same with the scripted expert, which sees where the blocks are: the most that can be reached."""
    expert, trials = ScriptedExpert(world), []
    for seed, task in tasks.items():
        run = Run(world, seed, world.reset(seed, task), task.prompt)
        for target in expert.plan(np.random.default_rng([seed, EXPERT_STREAM])):
            if film and run.steps % Loop.execute == 0:
                _look(run)
            run.outcome = world.step(target)
            run.steps += 1
            if run.outcome != "running":
                break
        trials.append(Trial(seed, task.kind, run.prompt, run.outcome, run.steps))
        if film:
            _look(run)
            film(run)
    return trials


def _play(policy: Policy, runs: list[Run], loop: Loop, masked: str | None) -> None:
    for step in range(loop.limit):
        running = [run for run in runs if run.outcome == "running"]
        if not running:
            return
        if step % loop.execute == 0:
            for run, chunk in zip(running, _infer(policy, running, loop, step // loop.execute, masked), strict=True):
                run.waiting = step, chunk
        for run in running:
            run.outcome = run.world.step(run.command(step, loop.delay))
            run.steps = step + 1


def _infer(policy: Policy, runs: list[Run], loop: Loop, index: int, masked: str | None) -> list[np.ndarray]:
    """A chunk for each run, from one batch."""
    timer, requests = StageTimer(policy.stages.device), []
    for run in runs:
        seen = run.world.observe()
        run.frames.append(seen.images["base_0_rgb"])
        seen = replace(seen, prompt=run.prompt,
                       images={camera: frame for camera, frame in seen.images.items() if camera != masked})
        requests.append(policy.request(timer, seen, loop.num_steps, seed=run.seed, chunk_index=index))
    inputs = collate([request.inputs for request in requests])
    noise = np.concatenate([request.noise for request in requests])
    answers = policy.sample(inputs, noise, loop.num_steps)
    return [policy.chunk(timer, request, answer).actions for request, answer in zip(requests, answers, strict=True)]


def _look(run: Run) -> None:
    run.frames.append(run.world.observe().images["base_0_rgb"])


def _other_colour(task: Task) -> Task:
    return Task(task.kind, COLOURS[(COLOURS.index(task.colour) + 1) % len(COLOURS)], task.wording)
