"""Episodes on disk: the seam between what makes demonstrations and what learns from them.

A data set is a directory of index.json and a few large .npz files. index.json holds

    {"format": 2, "robot": "arm6", "cameras": ["base_0_rgb", ...],
     "episodes": [{"file": "episodes_00000.npz", "frames": [0, 40], "steps": [0, 200],
                   "prompts": ["touch the red block", ...], "task": "touch", "seed": 7}, ...]}

and each .npz the arrays of its episodes, one after the other; an episode's rows are `frames` (of the first three)
and `steps` (of the others), each [first, end):

| array       | shape and type                    | meaning                                                        |
|-------------|-----------------------------------|----------------------------------------------------------------|
| images      | uint8 [frames, cameras, h, w, 3]  | RGB, cameras in the order of the index, one size in all files  |
| frame_steps | int32 [frames]                    | the episode's control step at which the frames were taken      |
| scene       | float32 [frames, K]               | what training alone may know: where things are (K may be 0)    |
| state       | float32 [steps, S]                | robot's own units (rad, m), order of its YAML                  |
| actions     | float32 [steps, A]                | likewise; row t is the command of control step t               |

A frame is a training sample: its chunk begins with the action of its own control step, and goes on at the robot's
control rate; beyond the end the last action repeats, so an episode should end at rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pi05_ros.errors import ConfigError
from pi05_ros.schema import CAMERAS

FORMAT = 2
INDEX = "index.json"
ARRAYS = ("images", "frame_steps", "scene", "state", "actions")
OF_FRAMES = ARRAYS[:3]
FRAMES_A_FILE = 4096
WAY_OUT = "Record the data set again; pi05_ros/train/dataset.py describes it."


@dataclass(frozen=True, eq=False)
class Episode:
    """One demonstration; arrays as in the table above, of this episode alone.

    Args:
        prompts: equally good wordings of the one instruction; each frame is trained with one of them.
        frame_steps: None where every control step has its frames.
        scene: None where nothing is known of it.

    Raises:
        ConfigError: arrays that do not fit together, numbers that are not finite, no prompt.
    """

    images: np.ndarray
    state: np.ndarray
    actions: np.ndarray
    prompts: tuple[str, ...]
    task: str = ""
    seed: int = 0
    frame_steps: np.ndarray | None = None
    scene: np.ndarray | None = None
    name: str = field(default="episode", compare=False)

    def __post_init__(self) -> None:
        if self.frame_steps is None:
            object.__setattr__(self, "frame_steps", np.arange(len(self.images), dtype=np.int32))
        if self.scene is None:
            object.__setattr__(self, "scene", np.zeros((len(self.images), 0), np.float32))
        images, steps, scene = self.images, np.asarray(self.frame_steps), np.asarray(self.scene)
        self._require("images", images.dtype == np.uint8 and images.ndim == 5 and images.shape[-1] == 3
                      and 0 not in images.shape, "uint8 [frames, cameras, h, w, 3], none empty",
                      f"{images.dtype} {list(images.shape)}")
        for what, array in (("state", self.state), ("actions", self.actions)):
            self._require(what, array.dtype == np.float32 and array.ndim == 2 and 0 not in array.shape,
                          "float32 [steps, width]", f"{array.dtype} {list(array.shape)}")
            self._require(what, bool(np.isfinite(array).all()), "finite numbers", "NaN or infinity")
        self._require("actions", len(self.actions) == len(self.state), f"{len(self.state)} steps, as the state has",
                      str(len(self.actions)))
        self._require("frame_steps", steps.shape == (len(images),) and steps.dtype.kind in "iu"
                      and 0 <= int(steps.min()) and int(steps.max()) < len(self.state),
                      f"{len(images)} whole numbers from 0 to {len(self.state) - 1}", f"{steps.dtype} {steps.tolist()}")
        self._require("scene", scene.dtype == np.float32 and scene.ndim == 2 and len(scene) == len(images)
                      and bool(np.isfinite(scene).all()), f"float32 [{len(images)}, K], finite",
                      f"{scene.dtype} {list(scene.shape)}")
        self._require("prompts", bool(self.prompts) and all(prompt.strip() for prompt in self.prompts),
                      "at least one instruction, none empty", str(list(self.prompts)))

    def _require(self, what: str, holds: bool, expected: str, received: str) -> None:
        if not holds:
            raise ConfigError(f"{what} of {self.name}", expected=expected, received=received, way_out=WAY_OUT)


class DatasetWriter:
    """Adds episodes to the data set in `directory`, which it makes if it is not there.

        with DatasetWriter("data", robot="arm6", cameras=CAMERAS) as writer:
            writer.add(Episode(images, state, actions, ("touch the red block",), "touch", seed))

    Memory holds the frames of one file. The index is replaced last, so that an interrupted recording leaves a data set
    without its last file; `recorded` tells where to go on.
    """

    def __init__(self, directory: str | Path, robot: str, cameras: tuple[str, ...],
                 frames_a_file: int = FRAMES_A_FILE) -> None:
        self.directory, self._limit = Path(directory), frames_a_file
        self._index: dict[str, Any] = {"format": FORMAT, "robot": robot, "cameras": list(cameras), "episodes": []}
        if (self.directory / INDEX).exists():
            there = read_index(self.directory)
            for key in ("robot", "cameras"):
                if there[key] != self._index[key]:
                    raise ConfigError(f"{key} of {self.directory}", expected=str(there[key]),
                                      received=str(self._index[key]), way_out="Record into another directory.")
            self._index = there
        self._open: list[Episode] = []

    @property
    def recorded(self) -> int:
        """Episodes added so far, those of earlier runs included."""
        return len(self._index["episodes"]) + len(self._open)

    def add(self, episode: Episode) -> None:
        """Raises ConfigError where the episode has another number of cameras than the data set."""
        cameras = len(self._index["cameras"])
        if episode.images.shape[1] != cameras:
            raise ConfigError(f"images of {episode.name}", expected=f"{cameras} cameras",
                              received=str(episode.images.shape[1]), way_out="Name every camera in the writer.")
        self._open.append(episode)
        if sum(len(one.images) for one in self._open) >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Write what memory holds as one file more."""
        if not self._open:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        file = f"episodes_{len({one['file'] for one in self._index['episodes']}):05d}.npz"
        arrays = {name: np.concatenate([getattr(one, name) for one in self._open]) for name in ARRAYS}
        np.savez(self.directory / file, **arrays)  # type: ignore[arg-type]  # its stub confuses them with allow_pickle
        frame = step = 0
        for one in self._open:
            frames, steps = [frame, frame + len(one.images)], [step, step + len(one.state)]
            frame, step = frames[1], steps[1]
            self._index["episodes"].append({"file": file, "frames": frames, "steps": steps, "task": one.task,
                                            "prompts": list(one.prompts), "seed": int(one.seed)})
        part = self.directory / (INDEX + ".part")
        part.write_text(json.dumps(self._index))
        os.replace(part, self.directory / INDEX)
        self._open = []

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()


def read_index(directory: str | Path) -> dict[str, Any]:
    """index.json, checked. Raises ConfigError: not there, not of this format, no episode, unknown camera."""
    file = Path(directory) / INDEX

    def refuse(expected: str, received: object) -> ConfigError:
        return ConfigError(f"data set {file}", expected=expected, received=str(received), way_out=WAY_OUT)

    try:
        index = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise refuse("a readable JSON file", error) from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise refuse(f"format {FORMAT}", index.get("format") if isinstance(index, dict) else type(index).__name__)
    if not isinstance(index.get("episodes"), list) or not index["episodes"]:
        raise refuse("at least one episode", "none")
    cameras: Any = index.get("cameras")
    if not _texts(cameras) or len(set(cameras)) < len(cameras) or not set(cameras) <= set(CAMERAS):
        raise refuse("cameras among " + ", ".join(CAMERAS) + ", each once", repr(cameras))
    if not isinstance(index.get("robot"), str):
        raise refuse("the name of its robot", index.get("robot"))
    for number, entry in enumerate(index["episodes"]):
        if not isinstance(entry, dict):
            raise refuse(f"an object for episode {number}", type(entry).__name__)
        missing = [key for key in ENTRY if key not in entry]
        if missing:
            raise refuse(f"'{missing[0]}' of episode {number}", "no such key")
        for key, (fits, expected) in ENTRY.items():
            if not fits(entry[key]):
                raise refuse(f"{expected} as '{key}' of episode {number}", repr(entry[key])[:100])
    return index


def read_episodes(directory: str | Path) -> Iterator[Episode]:
    """Every episode in the order of recording; memory holds one file at a time.

    Raises:
        ConfigError: a file or array is missing or damaged, or an episode is not as in the table above.
    """
    directory = Path(directory)
    held, arrays = "", dict[str, np.ndarray]()
    for number, entry in enumerate(read_index(directory)["episodes"]):
        if entry["file"] != held:
            held, arrays = entry["file"], _read_arrays(directory / entry["file"])
        rows = {name: slice(*entry["frames" if name in OF_FRAMES else "steps"]) for name in ARRAYS}
        parts = {name: arrays[name][rows[name]] for name in ARRAYS}
        for name, part in parts.items():
            if len(part) != rows[name].stop - rows[name].start:
                raise ConfigError(f"{name} of episode {number} of {directory}", way_out=WAY_OUT,
                                  expected=f"rows {rows[name].start} to {rows[name].stop - 1} of {held}",
                                  received=f"{len(arrays[name])} rows in the file")
        yield Episode(**parts, prompts=tuple(entry["prompts"]), task=entry["task"], seed=entry["seed"],
                      name=f"episode {number} of {directory}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rows(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_whole, value)) and 0 <= value[0] < value[1] < 2**62


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _file_name(value: object) -> bool:
    return isinstance(value, str) and value.endswith(".npz") and Path(value).name == value


ROWS = "[first, end) of its rows"
ENTRY: dict[str, tuple[Callable[[object], bool], str]] = {
    "file": (_file_name, "the name of a .npz file"), "frames": (_rows, ROWS), "steps": (_rows, ROWS),
    "prompts": (_texts, "a list of instructions"), "task": (_text, "text"), "seed": (_whole, "a whole number")}


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in ARRAYS}
        if scalars := [name for name, array in arrays.items() if array.ndim == 0]:
            raise ValueError(f"a single value as '{scalars[0]}'")
        return arrays
    except Exception as error:  # damaged files make zipfile and numpy raise anything: KeyError, zlib.error, MemoryError
        raise ConfigError(f"data set file {file}", expected="arrays " + ", ".join(ARRAYS), way_out=WAY_OUT,
                          received=str(error) or type(error).__name__) from error
