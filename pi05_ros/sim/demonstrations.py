"""Episodes of the scripted expert, as training data: one function of the seed each, made by any number of processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pi05_ros.errors import ConfigError
from pi05_ros.schema import CAMERAS
from pi05_ros.sim.expert import ScriptedExpert
from pi05_ros.sim.tasks import KINDS, Task, draw_task
from pi05_ros.sim.world import TabletopWorld
from pi05_ros.train.dataset import Episode
from pi05_ros.transforms.images import resize_with_pad

EXPERT_STREAM, STRAY_STREAM, PUSHED_STREAM, LOOKS_STREAM = 4, 5, 6, 7  # of the seed; the world draws from 0 to 3
PUSHED_RAD = np.array([0.02, 0.02, 0.02, 0.01, 0.02, 0.01])  # of the joints' disturbance: tips move about 1 cm
PUSHED_KEPT = 0.9  # share of it that is left a control step later
ROUND = 8  # seeds in flight for each process: bounds the memory that waits


@dataclass(frozen=True)
class Recording:
    """What of an episode is kept.

    Args:
        kinds: of tasks, drawn by the seed.
        image_size: of the stored frames, pixels; they are rendered at 224 and resized as for inference.
        frame_every: control steps from one set of frames to the next.
        astray: share of episodes whose recording begins anywhere on the table, not where the arm begins. Without them
            the joints alone tell where a motion leads, and nothing tells the way back from a wrong place.
        pushed: strength of a slowly changing disturbance of what the arm is told, 1 as in PUSHED_RAD; the recorded
            actions are without it. They lead back from where a policy's own errors take the arm (DART, Laskey 2017).
        looks: draw colours, light and cameras anew for every frame. Else they tell the episodes apart, and a model
            learns by heart where each one leads instead of looking at the blocks.
    """

    kinds: tuple[str, ...] = KINDS
    image_size: int = 224
    frame_every: int = 2
    astray: float = 0.5
    pushed: float = 1.0
    looks: bool = True


def seeded_task(seed: int, kinds: tuple[str, ...]) -> Task:
    """The task of an episode; with all kinds what `TabletopWorld.reset(seed)` draws."""
    return draw_task(np.random.default_rng([seed, 0]), kinds)


def disturbances(random: np.random.Generator, steps: int) -> np.ndarray:
    """float64 [steps, 7], rad: noise that forgets itself in half a second, from zero; the gripper has none."""
    out = np.zeros((steps, 7))
    for step in range(1, steps):
        fresh = (1 - PUSHED_KEPT**2) ** 0.5 * PUSHED_RAD * random.standard_normal(6)
        out[step, :6] = PUSHED_KEPT * out[step - 1, :6] + fresh
    return out


class Demonstrator:
    """One world and its expert."""

    def __init__(self, recording: Recording) -> None:
        self._recording, self._world = recording, TabletopWorld()
        self._expert = ScriptedExpert(self._world)

    def episode(self, seed: int) -> Episode | None:
        """The whole motion, to its rest; None where it did not succeed."""
        recording, world = self._recording, self._world
        task = world.reset(seed, seeded_task(seed, recording.kinds))
        stray = np.random.default_rng([seed, STRAY_STREAM])
        try:
            if stray.random() < recording.astray:
                world.place(self._expert.stray(stray))
            plan = self._expert.plan(np.random.default_rng([seed, EXPERT_STREAM])).astype(np.float32)
        except ConfigError:  # it found no way: one seed in thousands must not end a collection
            return None
        states, commands, frames, scenes, outcome, told = [], [], [], [], world.outcome, world.command
        disturbance = recording.pushed * disturbances(np.random.default_rng([seed, PUSHED_STREAM]), len(plan))
        steps = np.arange(0, len(plan), recording.frame_every, dtype=np.int32)
        for step, target in enumerate(plan):
            states.append(world.state)
            commands.append(told)  # row k is where the arm is told to be at step k: action 0 is now
            if step % recording.frame_every == 0:
                if recording.looks and step:
                    world.change_looks(np.random.default_rng([seed, LOOKS_STREAM, step]))
                scenes.append(world.blocks.position.flatten())
                images = world.observe().images
                frames.append(np.stack([resize_with_pad(images[camera], recording.image_size) for camera in CAMERAS]))
            judged, told = world.step(target + disturbance[step]), target
            outcome = judged if outcome == "running" else outcome
        if outcome != "success":
            return None
        return Episode(np.stack(frames), np.stack(states), np.stack(commands).astype(np.float32), task.prompts,
                       task.kind, seed, steps, np.array(scenes, np.float32), name=f"episode of seed {seed}")

    def close(self) -> None:
        self._world.close()


def demonstrations(recording: Recording, seeds: range, workers: int = 1) -> Iterator[tuple[int, Episode | None]]:
    """(seed, its episode or None) in the order of `seeds`, whatever the number of processes."""
    if workers == 1:
        demonstrator = Demonstrator(recording)
        try:
            for seed in seeds:
                yield seed, demonstrator.episode(seed)
        finally:
            demonstrator.close()
        return
    # Spawned: an OpenGL context does not survive a fork.
    with multiprocessing.get_context("spawn").Pool(workers, _open, (recording,)) as pool:
        for first in range(0, len(seeds), ROUND * workers):
            part = seeds[first:first + ROUND * workers]
            yield from zip(part, pool.imap(_episode, part), strict=True)


_demonstrator: Demonstrator | None = None  # of a worker process


def _open(recording: Recording) -> None:
    global _demonstrator
    _demonstrator = Demonstrator(recording)


def _episode(seed: int) -> Episode | None:
    assert _demonstrator is not None
    return _demonstrator.episode(seed)
