"""Many held-out episodes under several settings, shared out among processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi05_ros.runtime.joining import check_chunk_mode
from pi05_ros.runtime.policy import Policy
from pi05_ros.sim.closed_loop import NOTHING_KEPT, evaluate, evaluate_expert, may_lack
from pi05_ros.sim.episode import Ablation, Loop, Run, Trial
from pi05_ros.sim.tasks import Task
from pi05_ros.sim.world import TabletopWorld
from pi05_ros.transforms.robot_file import Robot
from pi05_ros.transforms.robot_loader import load_robot

EAGER_BATCH = 16
FILMED = 8  # episodes whose pictures are kept
Row = tuple[str, list[np.ndarray]]  # caption, frames
Played = tuple[list[list[Trial]], list[Row]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What is run: the scripted expert and, with a checkpoint, every setting in `loops`, on the same episodes."""

    checkpoint: str | None
    loops: tuple[Loop, ...]
    backend: str = "eager"
    device: str = "auto"
    dtype: str = "float32"
    horizon: int | None = None
    batch: int | None = None
    ablation: Ablation = NOTHING_KEPT
    film: bool = False

    @property
    def robot(self) -> Robot:
        robot, masked = load_robot("tabletop"), self.ablation.masked
        return may_lack(robot, masked) if masked else robot


class Driver:
    """One process's policy and worlds."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation, self._policy, batch = evaluation, None, 1
        if evaluation.checkpoint is not None:
            self._policy = Policy.load(evaluation.checkpoint, evaluation.robot, evaluation.backend, evaluation.device,
                                       evaluation.dtype, action_horizon=evaluation.horizon)
            for loop in evaluation.loops:
                check_chunk_mode(loop.join.mode, loop.join.jacobian, evaluation.backend,
                                 self._policy.rtc_training_max_delay)
            batch = evaluation.batch or (EAGER_BATCH if {*self._policy.stages.names.values()} == {"eager"} else 1)
        self._worlds = [TabletopWorld() for _ in range(batch)]

    def play(self, tasks: dict[int, Task]) -> Played:
        """The trials of the expert and of each setting, in the order of `tasks`, and pictures of the last of these."""
        evaluation, rows = self._evaluation, list[Row]()

        def film(run: Run) -> None:
            rows.append((caption(run), run.frames))

        kept = film if evaluation.film else None
        done = [evaluate_expert(self._worlds[0], tasks, None if self._policy else kept)]
        if self._policy is not None:
            for loop in evaluation.loops:
                rows.clear()
                done.append(evaluate(self._policy, self._worlds, tasks, loop, evaluation.ablation, kept))
        return done, rows[:FILMED]

    def close(self) -> None:
        for world in self._worlds:
            world.close()


def caption(run: Run) -> str:
    outcome = "time is up" if run.outcome == "running" else run.outcome
    return f"{run.prompt}: {outcome} after {run.steps} steps"


def run_all(evaluation: Evaluation, tasks: dict[int, Task], workers: int = 1,
            on_progress: Progress | None = None) -> Played:
    """As `Driver.play`, whatever the number of processes."""
    seeds, size = list(tasks), evaluation.batch or EAGER_BATCH
    shares = [{seed: tasks[seed] for seed in seeds[first:first + size]} for first in range(0, len(seeds), size)]
    trials: list[list[Trial]] = [[] for _ in range(1 + (len(evaluation.loops) if evaluation.checkpoint else 0))]
    rows: list[Row] = []

    def take(played: Played) -> None:
        for of_setting, more in zip(trials, played[0], strict=True):
            of_setting.extend(more)
        rows.extend(played[1][:FILMED - len(rows)])
        if on_progress:
            on_progress(len(trials[0]), len(seeds))

    if workers == 1:
        driver = Driver(evaluation)
        try:
            for share in shares:
                take(driver.play(share))
        finally:
            driver.close()
    else:
        # Spawned: neither OpenGL nor CUDA survives a fork.
        with multiprocessing.get_context("spawn").Pool(workers, _open, (evaluation, workers)) as pool:
            for played in pool.imap(_play, shares):
                take(played)
    return trials, rows


_driver: Any = None  # of a worker process


def _open(evaluation: Evaluation, workers: int) -> None:
    import torch

    global _driver
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    _driver = Driver(evaluation)


def _play(tasks: dict[int, Task]) -> Played:
    return _driver.play(tasks)
