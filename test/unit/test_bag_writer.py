"""Bags as other readers see them, the disk's failures, and what a kill leaves. No ROS."""

import errno
import json
import threading

import pytest
import yaml

pytest.importorskip("mcap", reason="needs the extra `bag`")
pytest.importorskip("mcap_ros2", reason="needs the extra `test`")
pytest.importorskip("rosbags", reason="needs the extra `bag`")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from mcap.reader import make_reader  # noqa: E402
from mcap_ros2.decoder import DecoderFactory  # noqa: E402
from rosbags.highlevel import AnyReader  # noqa: E402
from rosbags.typesys import Stores, get_typestore  # noqa: E402

from pi05_ros.bag.reader import read_about, read_messages  # noqa: E402
from pi05_ros.bag.topics import topic_map, topics_told  # noqa: E402
from pi05_ros.bag.writer import BagWriter, Splits, Topic  # noqa: E402
from pi05_ros.bag.writing import WriterThread  # noqa: E402
from pi05_ros.errors import BagError, ConfigError  # noqa: E402

TYPES = get_typestore(Stores.ROS2_JAZZY)
PROMPT, OTHER = Topic("/prompt", "std_msgs/msg/String", latched=True), Topic("/other", "std_msgs/msg/String")


def text(words: str) -> bytes:
    return bytes(TYPES.serialize_cdr(TYPES.types["std_msgs/msg/String"](words), "std_msgs/msg/String"))


def write(directory, count=5, splits=None, compression="none", size=3):
    writer = BagWriter(directory, splits or Splits(), compression)
    for n in range(count):
        writer.write(PROMPT if n % 2 else OTHER, 1000 + n * 10**9, text(str(n) * size))
    writer.close()
    return [str(n) * size for n in range(count)]


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize(("splits", "files"), [(Splits(), 1), (Splits(seconds=2.0), 3), (Splits(bytes=1 << 21), 2)])
def test_rosbags_and_mcap_read_what_was_written(tmp_path, compression, splits, files):
    size = 900_000 if splits.bytes else 3
    if splits.bytes and compression == "zstd":
        files = 1  # the limit is on what lies on the disk
    words = write(tmp_path / "bag", 5, splits, compression, size)
    assert len(list((tmp_path / "bag").glob("*.mcap"))) == files
    with AnyReader([tmp_path / "bag"]) as reader:
        assert [reader.deserialize(data, c.msgtype).data for c, _, data in reader.messages()] == words
        assert (reader.message_count, reader.start_time, reader.duration) == (5, 1000, 4 * 10**9 + 1)
        kept = {c.topic: c.ext.offered_qos_profiles[0].durability.name for c in reader.connections}
        assert kept == {"/prompt": "TRANSIENT_LOCAL", "/other": "VOLATILE"}
        assert {c.digest for c in reader.connections} == {TYPES.hash_rihs01("std_msgs/msg/String")}
    found = []
    for path in sorted((tmp_path / "bag").glob("*.mcap")):
        with path.open("rb") as stream:
            reader = make_reader(stream, decoder_factories=[DecoderFactory()])
            assert reader.get_header().profile == "ros2"
            found += [message.data for _, _, _, message in reader.iter_decoded_messages()]
    assert found == words
    assert [message.data for message in read_messages(tmp_path / "bag")] == [text(word) for word in words]


def test_metadata_follows_rosbag2(tmp_path):
    write(tmp_path / "run", 5, Splits(seconds=2.0))
    found = yaml.safe_load((tmp_path / "run" / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert (found["version"], found["storage_identifier"], found["message_count"]) == (9, "mcap", 5)
    assert found["relative_file_paths"] == ["run_0.mcap", "run_1.mcap", "run_2.mcap"]
    assert [file["message_count"] for file in found["files"]] == [2, 2, 1]
    assert sum(topic["message_count"] for topic in found["topics_with_message_count"]) == 5


def test_a_bag_is_never_written_over(tmp_path):
    with pytest.raises(ConfigError, match="expected a directory that can be made anew"):
        BagWriter(tmp_path)


def test_a_file_cut_anywhere_gives_its_finished_chunks(tmp_path):
    writer = BagWriter(tmp_path / "bag", compression="zstd")
    for n in range(4):
        writer.write(OTHER, n, text(str(n)))
        writer.finish_chunk()
    writer.close()
    (path,) = (tmp_path / "bag").glob("*.mcap")
    whole = path.read_bytes()
    counts = set()
    for length in range(100, len(whole)):
        path.write_bytes(whole[:length])
        found = [message.data for message in read_messages(path)]
        assert found == [text(str(n)) for n in range(len(found))]
        counts.add(len(found))
    assert counts == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("content", [b"", b"no mcap at all"])
def test_what_is_no_bag_is_said(tmp_path, content):
    with pytest.raises(BagError, match="expected an mcap file"):
        list(read_messages(tmp_path))
    (tmp_path / "x.mcap").write_bytes(content)
    if content:
        with pytest.raises(BagError, match="expected an mcap file"):
            list(read_messages(tmp_path))
    else:  # killed before the first byte
        assert not list(read_messages(tmp_path))


class SlowWriter(BagWriter):
    """Writes nothing before `go`."""

    def write(self, *args):
        self.entered.set()
        assert self.go.wait(60)
        super().write(*args)


def test_a_slow_disk_blocks_nobody_and_what_is_dropped_is_counted(tmp_path):
    writer = SlowWriter(tmp_path / "bag")
    writer.go, writer.entered = threading.Event(), threading.Event()
    out = WriterThread(writer, most_bytes=len(text("0")) * 3)
    out.put(OTHER, 0, text("0"))
    assert writer.entered.wait(60)  # it is in the hands of the disk: the queue is empty
    for n in range(1, 6):
        out.put(OTHER, n, text(str(n)))
    assert out.dropped == {"/other": 2}
    writer.go.set()
    out.close()
    assert [message.data for message in read_messages(tmp_path / "bag")] == [text(str(n)) for n in range(4)]


def test_a_full_disk_ends_the_bag_and_says_so(tmp_path, monkeypatch):
    writer = BagWriter(tmp_path / "bag")
    writer.write(OTHER, 0, text("kept"))
    writer.finish_chunk()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer._mcap, "add_message", full)
    out = WriterThread(writer)
    for n in range(3):
        out.put(OTHER, n, text("lost"))
    with pytest.raises(BagError, match="No space left on device.*Free the disk"):
        out.close()
    out.put(OTHER, 9, text("late"))
    assert out.dropped["/other"] == 4
    assert [message.data for message in read_messages(tmp_path / "bag")] == [text("kept")]


def test_topics_follow_the_node_and_a_file(tmp_path):
    (tmp_path / "map.yaml").write_text("base_0_rgb: /front/image_raw\n")
    found = topic_map(tmp_path / "map.yaml", "/left/pi05_policy")
    assert found["base_0_rgb"] == "/front/image_raw" and found["state"] == "/left/pi05_policy/joint_states"


@pytest.mark.parametrize("content", ["- a", "nothing", "who: /a", "state: relative", "state: 3", "a: [", "1: /a"])
def test_a_wrong_topic_map_is_refused(tmp_path, content):
    (tmp_path / "map.yaml").write_text(content)
    with pytest.raises(ConfigError, match="topic map"):
        topic_map(tmp_path / "map.yaml")


@given(st.one_of(st.binary(max_size=200), st.text(alphabet="abs:-[]{}&*!\"'\n #/0", max_size=60).map(str.encode)))
def test_any_topic_map_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("map") / "map.yaml"
    path.write_bytes(content)
    try:
        assert set(topic_map(path)) == set(topic_map())
    except ConfigError:
        pass


def test_a_bag_tells_its_topics_in_every_file_also_after_a_kill(tmp_path):
    topics = topic_map(node="/arm/policy")
    writer = BagWriter(tmp_path / "b", Splits(bytes=1), about={"node": "/arm/policy", "topics": json.dumps(topics)})
    for n in range(3):
        writer.write(PROMPT, n, text("x"))
    writer.finish_chunk()  # and never closed
    for path in sorted((tmp_path / "b").glob("*.mcap")):
        assert topics_told(read_about(path)) == topics and read_about(path)["node"] == "/arm/policy"
    assert len(writer.files) == 3 and len(list(read_messages(tmp_path / "b"))) == 3
    write(tmp_path / "other")
    assert read_about(tmp_path / "other") == {} and topics_told({}) is None
    with pytest.raises(ConfigError, match="topic map of the bag: expected roles among"):
        topics_told({"topics": "{gripper: /x}"})
