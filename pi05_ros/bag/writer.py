"""A rosbag2 directory (mcap storage, metadata.yaml version 9) of serialised messages. No ROS needed.

mcap keeps messages in chunks; a finished chunk is on disk. Whoever is killed loses the open one alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from rosbags.typesys import Stores, get_typestore

from pi05_ros.errors import BagError, ConfigError

COMPRESSION = {"none": CompressionType.NONE, "zstd": CompressionType.ZSTD}
CHUNK_BYTES = 1 << 20
FOREVER = {"sec": 9223372036, "nsec": 854775807}  # as rosbag2 writes an infinite duration


@dataclass(frozen=True)
class Topic:
    """`type` as in sensor_msgs/msg/Image; `latched`, `reliable`: how `ros2 bag play` shall offer it."""

    name: str
    type: str
    latched: bool = False
    reliable: bool = True


@dataclass(frozen=True)
class Splits:
    """A file ends when it is this large or this long; 0: never."""

    bytes: int = 0
    seconds: float = 0.0


@dataclass
class BagFile:
    path: Path
    start_ns: int = 0
    end_ns: int = 0
    count: int = 0


class BagWriter:
    """Args: directory: must not exist; compression: of COMPRESSION; about: words that every file begins with.

    Raises:
        ConfigError: the directory is there already, or cannot be made.
        BagError: from any method: the disk is full or broken; what was finished before can be read.
    """

    def __init__(self, directory: Path, splits: Splits = Splits(), compression: str = "none",
                 about: Mapping[str, str] | None = None) -> None:
        self.directory, self._splits, self._compression = directory, splits, COMPRESSION[compression]
        self._about = dict(about or {})
        try:
            directory.mkdir(parents=True)
        except OSError as error:
            raise ConfigError("bag", expected="a directory that can be made anew", received=f"{directory}: {error}",
                              way_out="Choose another name.") from error
        self.files: list[BagFile] = []
        self.counts: Counter[Topic] = Counter()
        self._stream: BinaryIO | None = None
        self._mcap: McapWriter | None = None
        self._channels: dict[Topic, int] = {}

    def write(self, topic: Topic, time_ns: int, data: bytes) -> None:
        """One message (CDR), received at `time_ns`."""
        try:
            mcap = self._file_for(time_ns)
            if topic not in self._channels:
                self._channels[topic] = self._register(mcap, topic)
            mcap.add_message(self._channels[topic], time_ns, data, time_ns)
        except OSError as error:
            raise self._failed(error) from error
        file = self.files[-1]
        file.start_ns = time_ns if not file.count else min(file.start_ns, time_ns)
        file.end_ns, file.count = max(file.end_ns, time_ns), file.count + 1
        self.counts[topic] += 1

    def finish_chunk(self) -> None:
        """What was written so far survives a kill."""
        try:
            if self._mcap is not None:
                self._mcap.flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Index and metadata.yaml."""
        try:
            self._end_file()
            temporary = self.directory / "metadata.yaml.part"
            temporary.write_text(yaml.safe_dump({"rosbag2_bagfile_information": self._metadata()}, sort_keys=False))
            temporary.rename(self.directory / "metadata.yaml")
        except OSError as error:
            raise self._failed(error) from error

    def _file_for(self, time_ns: int) -> McapWriter:
        if self._mcap is not None and self._stream is not None:
            file, limit = self.files[-1], self._splits
            full = limit.bytes and self._stream.tell() >= limit.bytes
            if not full and not (limit.seconds and file.count and time_ns - file.start_ns >= limit.seconds * 1e9):
                return self._mcap
            self._end_file()
        path = self.directory / f"{self.directory.name}_{len(self.files)}.mcap"
        self._stream = path.open("wb")
        self._mcap = McapWriter(self._stream, CHUNK_BYTES, self._compression)
        self._mcap.start("ros2", "pi05_ros")
        if self._about:
            self._mcap.add_metadata("pi05_ros", self._about)
        self._channels = {}
        self.files.append(BagFile(path))
        return self._mcap

    def _register(self, mcap: McapWriter, topic: Topic) -> int:
        schema = mcap.register_schema(topic.type, "ros2msg", definition(topic.type).encode())
        profiles = yaml.safe_dump([quality_of_service(topic)], sort_keys=False)
        return mcap.register_channel(topic.name, "cdr", schema, {"offered_qos_profiles": profiles})

    def _end_file(self) -> None:
        if self._mcap is not None and self._stream is not None:
            try:
                self._mcap.finish()
            finally:
                self._stream.close()
                self._mcap = self._stream = None

    def _failed(self, error: OSError) -> BagError:
        if self._stream is not None:
            with suppress(OSError):  # it tries once more to write what it holds
                self._stream.close()
        self._mcap = self._stream = None
        return BagError(f"bag {self.directory}", expected="to be written", received=str(error), cause="disk",
                        way_out="Free the disk, or record elsewhere; what was written before can be read.")

    def _metadata(self) -> dict[str, Any]:
        def span(start_ns: int, end_ns: int) -> dict[str, Any]:
            return {"starting_time": {"nanoseconds_since_epoch": start_ns},
                    "duration": {"nanoseconds": end_ns - start_ns}}

        files = [file for file in self.files if file.count]
        start_ns = min((file.start_ns for file in files), default=0)
        return {
            "version": 9,
            "storage_identifier": "mcap",
            **span(start_ns, max((file.end_ns for file in files), default=0)),
            "message_count": sum(self.counts.values()),
            "topics_with_message_count": [
                {"topic_metadata": {"name": topic.name, "type": topic.type, "serialization_format": "cdr",
                                    "offered_qos_profiles": [quality_of_service(topic)],
                                    "type_description_hash": type_hash(topic.type)},
                 "message_count": count} for topic, count in self.counts.items()],
            "compression_format": "",  # of whole files or messages; mcap's chunks are its own affair
            "compression_mode": "",
            "relative_file_paths": [file.path.name for file in files],
            "files": [{"path": file.path.name, **span(file.start_ns, file.end_ns), "message_count": file.count}
                      for file in files],
            "custom_data": None,
            "ros_distro": "jazzy",
        }


def quality_of_service(topic: Topic) -> dict[str, Any]:
    return {"history": "keep_last", "depth": 1 if topic.latched else 10,
            "reliability": "reliable" if topic.reliable else "best_effort",
            "durability": "transient_local" if topic.latched else "volatile", "deadline": dict(FOREVER),
            "lifespan": dict(FOREVER), "liveliness": "automatic", "liveliness_lease_duration": dict(FOREVER),
            "avoid_ros_namespace_conventions": False}


@cache
def definition(type_name: str) -> str:
    """The message's definition with those it is made of, as ROS 2 Jazzy has it (mcap's ros2msg)."""
    text, _ = get_typestore(Stores.ROS2_JAZZY).generate_msgdef(type_name, ros_version=2)
    return text


@cache
def type_hash(type_name: str) -> str:
    return get_typestore(Stores.ROS2_JAZZY).hash_rihs01(type_name)
