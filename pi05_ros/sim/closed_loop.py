"""A policy drives the simulated arm: the number that judges every choice. Batched over worlds in lockstep.

A chunk becomes a trajectory by the node's own code (joining, `plan_chunk`), and the world executes it as a controller
would, so that what is counted here is what the node does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from pi05_ros.runtime.chunking import JointLimits
from pi05_ros.runtime.joining import Joining
from pi05_ros.runtime.policy import Policy
from pi05_ros.runtime.timing import StageTimer
from pi05_ros.schema import ActionChunk, Guidance
from pi05_ros.sim.demonstrations import EXPERT_STREAM
from pi05_ros.sim.episode import Ablation, Loop, Run, Trial, begin
from pi05_ros.sim.expert import ScriptedExpert
from pi05_ros.sim.tasks import Task
from pi05_ros.sim.world import TabletopWorld
from pi05_ros.transforms.collate import collate
from pi05_ros.transforms.robot_file import Robot

Film = Callable[[Run], None]
NOTHING_KEPT = Ablation()


def evaluate(policy: Policy, worlds: Sequence[TabletopWorld], tasks: dict[int, Task], loop: Loop,
             ablation: Ablation = NOTHING_KEPT, film: Film | None = None) -> list[Trial]:
    """One trial for each {seed: task}, in that order; noise is a function of the seed and the chunk alone, so that
    settings can be compared episode by episode.

    Args:
        worlds: as many episodes are run at once.
        film: called with each run when it has ended; `frames` has the base camera at every observation and at the end.

    Raises:
        ConfigError: a loop that does not fit the horizon.
        ObservationError: the policy answered with NaN.
    """
    loop.check(policy.config.action_horizon, policy.robot)
    trials: list[Trial] = []
    seeds = list(tasks)
    for first in range(0, len(seeds), len(worlds)):
        runs = [begin(world, seed, tasks[seed], ablation.told(tasks[seed]))
                for world, seed in zip(worlds, seeds[first:first + len(worlds)], strict=False)]
        for run in runs:
            run.joining = Joining(policy.transforms.encode_actions, policy.rtc_training_max_delay)
        _play(policy, runs, loop, ablation)
        for run in runs:
            trials.append(run.trial())
            if film:
                run.look()
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
        run = begin(world, seed, task)
        for target in expert.plan(np.random.default_rng([seed, EXPERT_STREAM])):
            if film and run.steps % Loop.execute == 0:
                run.look()
            run.stepped(world.step(target))
            if run.outcome != "running":
                break
        trials.append(run.trial())
        if film:
            run.look()
            film(run)
    return trials


def _play(policy: Policy, runs: list[Run], loop: Loop, ablation: Ablation) -> None:
    limits, period_s = JointLimits(policy.robot), policy.robot.control_period_s
    for step in range(loop.limit):
        running = [run for run in runs if run.outcome == "running"]
        if not running:
            return
        for run in running:
            run.arrive(step, limits, loop.join)
        if step % loop.execute == 0:
            for run, chunk in zip(running, _infer(policy, running, loop, step // loop.execute, ablation), strict=True):
                run.waiting = step + loop.delay, chunk
                run.arrive(step, limits, loop.join)
        for run in running:
            run.stepped(run.world.advance(period_s))


def _infer(policy: Policy, runs: list[Run], loop: Loop, index: int, ablation: Ablation) -> list[ActionChunk]:
    """A chunk for each run, from one batch."""
    timer, requests, guides = StageTimer(policy.stages.device), [], []
    for run in runs:
        seen = replace(ablation.seen(run.look()), prompt=run.prompt)
        assert run.joining is not None
        guides.append(run.joining.guidance(seen, loop.join))
        requests.append(policy.request(timer, seen, loop.num_steps, seed=run.seed, chunk_index=index))
    inputs = collate([request.inputs for request in requests])
    noise = np.concatenate([request.noise for request in requests])
    answers = policy.sample(inputs, noise, loop.num_steps, together(guides))
    chunks = [policy.chunk(timer, request, answer, guide)
              for request, answer, guide in zip(requests, answers, guides, strict=True)]
    for run, chunk in zip(runs, chunks, strict=True):
        assert run.joining is not None
        run.joining.made(chunk)
    return chunks


def together(guides: Sequence[Guidance | None]) -> Guidance | None:
    """Of a batch in lockstep, whose chunks differ in nothing but what they continue."""
    given = [guide for guide in guides if guide is not None]
    if not given:
        return None
    return replace(given[0], previous=np.concatenate([guide.previous for guide in given]))
