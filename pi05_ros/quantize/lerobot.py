"""Observations of a LeRobot data set: a directory with meta/info.json, parquet tables, and frames as videos or images.

Formats v2.0, v2.1 (a file an episode) and v3.0 (files of many episodes). States and actions are the numbers that the
trainer saw, and frames lie as it saw them (`recorded.py` takes them back to the robot's own). Read by pyarrow and PyAV:
pip install 'pi05_ros[lerobot]'.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pi05_ros.errors import ConfigError
from pi05_ros.transforms.robot_file import Robot

VERSIONS = ("v2.0", "v2.1", "v3.0")
STATES, ACTIONS = ("observation.state", "state"), ("action", "actions")  # the first is lerobot's, the second openpi's
FRAMES = ("image", "video")  # dtypes of features that are cameras


@dataclass(frozen=True)
class RecordedEpisode:
    """Where one episode lies: its table, and for each video feature the file and the second in which it begins."""

    index: int
    length: int
    table: Path
    videos: Mapping[str, tuple[Path, float]] = field(default_factory=dict)


class LeRobotDataset:
    """The directory's description; frames are read one by one.

    Raises:
        ConfigError: pyarrow or PyAV is not installed; the directory is not a LeRobot data set, or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with _told(directory / "meta" / "info.json"):
            info = json.loads((directory / "meta" / "info.json").read_text())
            self.version, self.features = str(info["codebase_version"]), dict[str, Any](info["features"])
            self._data_path, self._video_path = str(info["data_path"]), info.get("video_path")
            self._chunk, self._fps = int(info.get("chunks_size", 1000)), float(info["fps"])
        self._videos = [name for name, spec in self.features.items() if spec["dtype"] == "video"]
        if self.version not in VERSIONS:
            raise _damaged(directory, f"one of {', '.join(VERSIONS)}", self.version)
        with _told(directory / "meta"):
            self.tasks = self._tasks()
            self.episodes = list(self._episodes())

    def feature(self, names: tuple[str, ...], width: int, robot: Robot) -> str:
        """Which of `names` it has, with `width` numbers a row."""
        found = next((name for name in names if name in self.features), None)
        if found is None or list(self.features[found]["shape"]) != [width]:
            raise ConfigError(f"features of {self.directory}", way_out="Choose the robot file it was recorded with.",
                              expected=f"'{names[0]}' with {width} numbers, as robot '{robot.name}' has",
                              received=f"'{found}' with {self.features[found]['shape']}" if found else "none")
        return found

    def cameras(self, robot: Robot) -> dict[str, str]:
        """Camera slot to feature, by the `key` of the robot file: whole, or its last part."""
        there = {name.rsplit(".", 1)[-1]: name for name, spec in self.features.items() if spec["dtype"] in FRAMES}
        found = {slot: there[last] for slot, spec in robot.cameras.items()
                 if (last := spec.key.rsplit(".", 1)[-1]) in there}
        lacking = [slot for slot, spec in robot.cameras.items() if spec.required and slot not in found]
        if lacking:
            raise ConfigError(f"cameras of {self.directory}", received=", ".join(there) or "no cameras",
                              expected=f"one with the key of '{lacking[0]}', '{robot.cameras[lacking[0]].key}'",
                              way_out=f"Write its name as `key` into a copy of the file of robot '{robot.name}'.")
        return found

    def rows(self, episode: RecordedEpisode, features: Sequence[str]) -> dict[str, list[Any]]:
        """Task, time and `features` of one episode, but for videos."""
        columns = ["task_index", "timestamp", *(name for name in features if name not in episode.videos)]
        with _told(episode.table):
            from pyarrow import parquet

            table = parquet.read_table(episode.table, columns=[*columns, "episode_index"],
                                       filters=[("episode_index", "==", episode.index)])
        if len(table) != episode.length:
            raise _damaged(episode.table, f"{episode.length} rows of episode {episode.index}", str(len(table)))
        return {name: table[name].to_pylist() for name in columns}

    def frame(self, episode: RecordedEpisode, camera: str, rows: Mapping[str, list[Any]], row: int) -> np.ndarray:
        """uint8 [h, w, 3] of feature `camera`: in the table's row, or in the video at the row's time."""
        if camera not in episode.videos:
            with _told(episode.table):
                return np.asarray(Image.open(io.BytesIO(rows[camera][row]["bytes"])).convert("RGB"))
        path, begins_s = episode.videos[camera]
        with _told(path):
            return decoded(path, begins_s + rows["timestamp"][row], 0.5 / self._fps)

    def prompt(self, task: int) -> str:
        if task not in self.tasks:
            raise _damaged(self.directory / "meta", f"the text of task {task}", f"those of {sorted(self.tasks)}")
        return self.tasks[task]

    def _tasks(self) -> dict[int, str]:
        meta = self.directory / "meta"
        if self.version != "v3.0":
            return {row["task_index"]: row["task"] for row in _lines(meta / "tasks.jsonl")}
        # The text is pandas' index, under whatever name it has.
        return {row.pop("task_index"): str(next(iter(row.values()))) for row in _table(meta / "tasks.parquet")}

    def _episodes(self) -> Iterator[RecordedEpisode]:
        if self.version != "v3.0":
            for row in _lines(self.directory / "meta" / "episodes.jsonl"):
                index = row["episode_index"]
                place = {"episode_index": index, "episode_chunk": index // self._chunk}
                yield self._episode(row, place, {name: (place, 0.0) for name in self._videos})
            return
        for path in sorted((self.directory / "meta" / "episodes").glob("*/*.parquet")):
            for row in _table(path):
                part = lambda what, row=row: {k: row[f"{what}/{k}"] for k in ("chunk_index", "file_index")}  # noqa: E731
                yield self._episode(row, part("data"), {
                    name: (part(f"videos/{name}"), row[f"videos/{name}/from_timestamp"]) for name in self._videos})

    def _episode(self, row: Mapping[str, Any], place: dict[str, int],
                 videos: Mapping[str, tuple[dict[str, int], float]]) -> RecordedEpisode:
        at = {name: (self.directory / str(self._video_path).format(video_key=name, **there), begins_s)
              for name, (there, begins_s) in videos.items()}
        table = self.directory / self._data_path.format(**place)
        return RecordedEpisode(row["episode_index"], row["length"], table, at)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _table(path: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def decoded(path: Path, time_s: float, tolerance_s: float) -> np.ndarray:
    """uint8 [h, w, 3]: the frame of a video that is shown at `time_s`."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        container.seek(int(max(0.0, time_s) / stream.time_base), stream=stream)  # to the key frame before it
        for frame in container.decode(stream):
            if frame.time is not None and frame.time >= time_s - tolerance_s:
                return frame.to_ndarray(format="rgb24")
    raise _damaged(path, f"a frame at {time_s:.3f} s", "the end before it")


@contextmanager
def _told(where: Path) -> Iterator[None]:
    """What libraries say of `where`, in our words."""
    try:
        yield
    except ImportError as error:
        raise ConfigError("a LeRobot data set", expected="the extra `lerobot` (pyarrow, PyAV)", received=str(error),
                          way_out="pip install 'pi05_ros[lerobot]'") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(where, "a readable LeRobot data set", f"{type(error).__name__}: {error}") from error


def _damaged(where: Path, expected: str, received: str) -> ConfigError:
    return ConfigError(str(where), expected=expected, received=received,
                       way_out="Give the directory that holds meta/info.json, or download the data set again.")
