"""Messages of a bag in the order of their files, also of one whose recorder was killed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mcap.exceptions import EndOfFile, McapError
from mcap.records import Channel, Message, Metadata, Schema
from mcap.stream_reader import StreamReader

from pi05_ros.errors import BagError


@dataclass(frozen=True)
class Recorded:
    """A serialised message (CDR), received at `time_ns`."""

    topic: str
    type: str
    time_ns: int
    data: bytes


def bag_files(bag: Path) -> list[Path]:
    """The mcap files of a bag directory, oldest first, or the one file. Raises BagError."""
    files = [bag] if bag.is_file() else sorted(bag.glob("*.mcap"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise BagError(f"bag {bag}", expected="an mcap file, or a directory with some", received="none",
                       way_out="Convert other storages first: ros2 bag convert, with storage_id mcap.")
    return files


def read_about(bag: Path) -> dict[str, str]:
    """What our recorder wrote at the beginning of the first file; empty for a bag of another one.

    Raises:
        BagError: not mcap.
    """
    path = bag_files(bag)[0]
    try:
        with path.open("rb") as stream:
            for record in StreamReader(stream).records:
                if isinstance(record, Metadata) and record.name == "pi05_ros":
                    return dict(record.metadata)
                if isinstance(record, Message):
                    return {}
    except (EndOfFile, struct.error):
        return {}
    except (OSError, McapError, KeyError, ValueError) as error:
        raise _broken(path, error) from error
    return {}


def read_messages(bag: Path) -> Iterator[Recorded]:
    """All messages; a file that ends in the middle of a chunk ends before it.

    Raises:
        BagError: not mcap, or broken in the middle.
    """
    for path in bag_files(bag):
        schemas: dict[int, Schema] = {}
        channels: dict[int, Channel] = {}
        try:
            with path.open("rb") as stream:
                for record in StreamReader(stream).records:
                    if isinstance(record, Schema):
                        schemas[record.id] = record
                    elif isinstance(record, Channel):
                        channels[record.id] = record
                    elif isinstance(record, Message):
                        channel = channels[record.channel_id]
                        kind = schemas[channel.schema_id].name if channel.schema_id else ""
                        yield Recorded(channel.topic, kind, record.log_time, record.data)
        except (EndOfFile, struct.error):  # both are what mcap says
            continue  # its recorder was killed
        except (OSError, McapError, KeyError, ValueError) as error:
            raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> BagError:
    return BagError(f"bag file {path}", expected="an mcap file", received=f"{type(error).__name__}: {error}",
                    way_out="Recover what can be read: mcap recover.")
