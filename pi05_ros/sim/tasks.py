"""What the simulated arm can be told, in words, and when it has done so. No physics here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pi05_ros.errors import ConfigError

COLOURS = ("red", "green", "blue", "yellow")
DIRECTIONS = {"left": (0.0, 1.0), "right": (0.0, -1.0), "forward": (1.0, 0.0)}  # x forward, y left, seen by the robot
Outcome = Literal["running", "success", "failure"]

PUSH_DISTANCE_M = 0.05  # how far a pushed block must have moved
PUSH_DRIFT_M = 0.04  # and at most across, or the wrong way
DISTURBED_M = 0.02  # a block that moved further, and should not have, is a failure

# "sideways" is the task with two equally good ways: the mean of both comes down on top of the block.
WORDINGS = {
    "touch": ("touch the {} block", "tap the {} block", "put your finger on the {} block"),
    "left": ("push the {} block to the left", "slide the {} block left", "move the {} block to the left"),
    "right": ("push the {} block to the right", "slide the {} block right", "move the {} block to the right"),
    "forward": ("push the {} block forward", "slide the {} block away", "move the {} block forward"),
    "sideways": ("push the {} block sideways", "slide the {} block to either side", "move the {} block sideways"),
}
KINDS = tuple(WORDINGS)

TRAIN_SEEDS = range(0, 1_000_000)
HELD_OUT_SEEDS = range(1_000_000, 2_000_000)


@dataclass(frozen=True)
class Task:
    """One instruction.

    Args:
        kind: `touch`, or where to push: `left`, `right`, `forward`, `sideways` (either side).
        colour: of the block that is meant.
        wording: index into the ways of saying it.
    """

    kind: str
    colour: str
    wording: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, KINDS), ("colour", self.colour, COLOURS)):
            if value not in known:
                raise ConfigError(f"task {name}", expected="one of " + ", ".join(known), received=repr(value),
                                  way_out="Correct the task.")
        if not 0 <= self.wording < len(WORDINGS[self.kind]):
            raise ConfigError("task wording", expected=f"0 to {len(WORDINGS[self.kind]) - 1}",
                              received=str(self.wording), way_out="Correct the task.")

    @property
    def prompt(self) -> str:
        return self.prompts[self.wording]

    @property
    def prompts(self) -> tuple[str, ...]:
        """All ways of saying it."""
        return tuple(words.format(self.colour) for words in WORDINGS[self.kind])

    @property
    def ways(self) -> tuple[tuple[float, float], ...]:
        """Unit vectors (x, y) along which the block may be pushed; none for `touch`."""
        if self.kind == "touch":
            return ()
        return tuple(DIRECTIONS[way] for way in (("left", "right") if self.kind == "sideways" else (self.kind,)))


@dataclass(frozen=True)
class BlockRecord:
    """What has happened to the blocks so far, each array in the order of COLOURS.

    Args:
        start, position: float64 [4, 2], x and y at reset and now, m.
        touched: bool [4], a finger has touched it since reset.
        pressed: bool [4], a finger has been on top of it since reset.
    """

    start: np.ndarray
    position: np.ndarray
    touched: np.ndarray
    pressed: np.ndarray = field(default_factory=lambda: np.zeros(len(COLOURS), bool))


def draw_task(random: np.random.Generator, kinds: tuple[str, ...] = KINDS) -> Task:
    """A task with any colour and wording."""
    kind = kinds[random.integers(len(kinds))]
    return Task(kind, COLOURS[random.integers(len(COLOURS))], int(random.integers(len(WORDINGS[kind]))))


def parse_kinds(text: str | None) -> tuple[str, ...]:
    """`touch,left` to kinds, in the order of KINDS; None is all. Raises ConfigError for what is none."""
    kinds = KINDS if text is None else tuple(word.strip() for word in text.split(","))
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError("tasks", expected="some of " + ", ".join(KINDS), received=repr(kind),
                              way_out="Separate them by commas.")
    return tuple(kind for kind in KINDS if kind in kinds)


def all_prompts() -> list[str]:
    """Every sentence a task may say: what a tokenizer has to know."""
    return [words.format(colour) for wordings in WORDINGS.values() for words in wordings for colour in COLOURS]


def understood(prompt: str) -> Task | None:
    """The task that a prompt says; None for a sentence that is no task's."""
    for kind, wordings in WORDINGS.items():
        for colour in COLOURS:
            for wording, words in enumerate(wordings):
                if prompt.strip().lower() == words.format(colour):
                    return Task(kind, colour, wording)
    return None


def judge(task: Task, blocks: BlockRecord) -> Outcome:
    """Success: the block is touched, or pushed far enough and straight enough. Failure: another block was touched or
    moved, or a push went elsewhere or came from above."""
    target = COLOURS.index(task.colour)
    others = np.arange(len(COLOURS)) != target
    moved = blocks.position - blocks.start
    if (blocks.touched & others).any() or (np.linalg.norm(moved[others], axis=1) > DISTURBED_M).any():
        return "failure"
    if task.kind == "touch":
        return "success" if blocks.touched[target] else "running"
    if blocks.pressed[target]:
        return "failure"
    along = max(float(moved[target] @ way) for way in task.ways)
    across = np.sqrt(max(0.0, float(moved[target] @ moved[target]) - along**2))
    if across > PUSH_DRIFT_M or along < -PUSH_DRIFT_M:
        return "failure"
    return "success" if along >= PUSH_DISTANCE_M else "running"
