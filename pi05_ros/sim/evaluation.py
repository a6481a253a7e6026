"""Many held-out episodes under several settings, shared out among processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi05_ros.runtime.policy import Policy
from pi05_ros.sim.closed_loop import Loop, Run, Trial, evaluate, evaluate_expert, may_lack
from pi05_ros.sim.tasks import Task
from pi05_ros.sim.world import TabletopWorld
from pi05_ros.transforms.robot_loader import load_robot

EAGER_BATCH = 16
FILMED = 8  # episodes whose pictures are kept
Row = tuple[str, list[np.ndarray]]  # caption, frames


@dataclass(frozen=True)
class Evaluation:
    """What is run; every setting in `loops` on the same episodes. Without a checkpoint the scripted expert drives."""

    checkpoint: str | None
    loops: tuple[Loop, ...]
    backend: str = "eager"
    device: str = "auto"
    dtype: str = "float32"
    horizon: int | None = None
    batch: int | None = None
    wrong_colour: bool = False
    masked: str | None = None
    film: bool = False


class Driver:
    """One process's policy and worlds."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation, self._policy, batch = evaluation, None, 1
        if evaluation.checkpoint is not None:
            robot = load_robot("tabletop")
            self._policy = Policy.load(
                evaluation.checkpoint, may_lack(robot, evaluation.masked) if evaluation.masked else robot,
                evaluation.backend, evaluation.device, evaluation.dtype, action_horizon=evaluation.horizon)
            batch = evaluation.batch or (EAGER_BATCH if {*self._policy.stages.names.values()} == {"eager"} else 1)
        self._worlds = [TabletopWorld() for _ in range(batch)]

    def play(self, tasks: dict[int, Task]) -> tuple[list[list[Trial]], list[Row]]:
        """The trials of each setting, in the order of `tasks`, and pictures of the last one."""
        done, rows = [], list[Row]()

        def film(run: Run) -> None:
            outcome = "time is up" if run.outcome == "running" else run.outcome
            rows.append((f"{run.prompt}: {outcome} after {run.steps} steps", run.frames))

        kept = film if self._evaluation.film else None
        for loop in self._evaluation.loops:
            rows.clear()
            if self._policy is None:
                done.append(evaluate_expert(self._worlds[0], tasks, film=kept))
            else:
                done.append(evaluate(self._policy, self._worlds, tasks, loop, self._evaluation.wrong_colour,
                                     self._evaluation.masked, kept))
        return done, rows[:FILMED]

    def close(self) -> None:
        for world in self._worlds:
            world.close()


def run_all(evaluation: Evaluation, tasks: dict[int, Task], workers: int = 1,
            on_progress: Callable[[int, int], None] | None = None) -> tuple[list[list[Trial]], list[Row]]:
    """As `Driver.play`, whatever the number of processes."""
    seeds, size = list(tasks), evaluation.batch or EAGER_BATCH
    shares = [{seed: tasks[seed] for seed in seeds[first:first + size]} for first in range(0, len(seeds), size)]
    trials: list[list[Trial]] = [[] for _ in evaluation.loops]
    rows: list[Row] = []

    def take(played: tuple[list[list[Trial]], list[Row]]) -> None:
        for of_loop, more in zip(trials, played[0], strict=True):
            of_loop.extend(more)
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


def _play(tasks: dict[int, Task]) -> tuple[list[list[Trial]], list[Row]]:
    return _driver.play(tasks)
