"""A disk that fills up at any byte: a clear error, and what was finished before can be read. No ROS, no root."""

import errno
import io
from pathlib import Path

import pytest

pytest.importorskip("mcap", reason="needs the extra `bag`")
pytest.importorskip("rosbags", reason="needs the extra `bag`")

from pi05_ros.bag.reader import read_messages  # noqa: E402
from pi05_ros.bag.writer import BagWriter, Splits, Topic  # noqa: E402
from pi05_ros.bag.writing import WriterThread  # noqa: E402
from pi05_ros.errors import BagError, ConfigError  # noqa: E402

TOPIC = Topic("/words", "std_msgs/msg/String")


class SmallDisk:
    """`room` bytes for all files together; the write that comes to its end is cut short, as the kernel does it."""

    def __init__(self, room, monkeypatch):
        self.room = room
        real = Path.open

        def small_open(path, mode="r", *args, **kwargs):
            if "w" not in mode:
                return real(path, mode, *args, **kwargs)
            raw = io.BufferedWriter(SmallFile(path, self), 512)
            return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")

        monkeypatch.setattr(Path, "open", small_open)
        monkeypatch.setattr(Path, "write_text", lambda path, text, *a, **k: self._write_text(path, text))

    @staticmethod
    def _write_text(path, text):
        with path.open("w") as stream:
            stream.write(text)


class SmallFile(io.FileIO):
    def __init__(self, path, disk):
        super().__init__(path, "wb")
        self._disk = disk

    def write(self, data):
        if not self._disk.room and len(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        cut = bytes(data)[:self._disk.room]
        self._disk.room -= len(cut)
        return super().write(cut)


def word(n):
    return b"\0\1\0\0\5\0\0\0w%03d\0" % n


def write(directory, splits=None):
    """Five messages, a chunk each; how many were in finished chunks when it failed, and the error."""
    finished = 0
    try:
        writer = BagWriter(directory, splits or Splits())
        for n in range(5):
            writer.write(TOPIC, n * 10**9, word(n))
            writer.finish_chunk()
            writer._stream.flush()
            finished = n + 1
        writer.close()
    except (BagError, ConfigError) as error:
        return finished, error
    return finished, None


@pytest.mark.parametrize("splits", [None, Splits(seconds=2.0)])
def test_a_disk_that_is_full_at_any_byte(tmp_path, monkeypatch, splits):
    with monkeypatch.context() as patch:
        disk = SmallDisk(10**6, patch)
        assert write(tmp_path / "whole", splits) == (5, None)
        used = 10**6 - disk.room
    seen = set()
    for room in range(0, used, 101):
        with monkeypatch.context() as patch:
            SmallDisk(room, patch)
            finished, error = write(tmp_path / f"bag{room}", splits)
        assert isinstance(error, BagError) and error.cause == "disk"
        assert "No space left on device" in str(error) and "Free the disk" in str(error)
        found = [message.data for message in read_messages(tmp_path / f"bag{room}")]
        assert found == [word(n) for n in range(len(found))] and len(found) >= finished
        seen.add(len(found))
    assert {0, 1, 4, 5} <= seen


def test_the_thread_stops_says_why_and_counts_what_comes_after(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        SmallDisk(6000, patch)
        out = WriterThread(BagWriter(tmp_path / "bag"))
        for n in range(200):
            out.put(TOPIC, n * 10**9, word(n))
        with pytest.raises(BagError, match="No space left on device"):
            out.close()
    before = out.dropped[TOPIC.name]
    out.put(TOPIC, 300 * 10**9, word(300))
    assert out.dropped[TOPIC.name] == before + 1
    found = [message.data for message in read_messages(tmp_path / "bag")]
    assert found == [word(n) for n in range(len(found))] and 2 <= len(found) < 200
