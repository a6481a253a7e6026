"""A run of the demo recorded over DDS and replayed; and a recorder that is killed."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("mcap", reason="needs the extra `bag`")
pytest.importorskip("rosbags", reason="needs the extra `bag`")

from robot_stand_in import PATIENCE_S  # noqa: E402
from rosbags.highlevel import AnyReader  # noqa: E402

from pi05_ros.bag.reader import read_messages  # noqa: E402
from pi05_ros.bag.replay import read_run, replay  # noqa: E402
from pi05_ros.bag.setup import load_policy  # noqa: E402
from pi05_ros.bag.topics import topic_map  # noqa: E402
from pi05_ros.bag.writer import BagWriter, Topic  # noqa: E402
from pi05_ros.cli.main import main  # noqa: E402
from pi05_ros.config import tiny_config  # noqa: E402
from pi05_ros.errors import BagError  # noqa: E402
from pi05_ros.model.recipe import RecipeSource  # noqa: E402
from pi05_ros.quantize.recorded import bag_samples, transforms_for  # noqa: E402
from pi05_ros.transforms.robot_loader import load_robot  # noqa: E402

PROGRAM = [sys.executable, "-m", "pi05_ros"]
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads of PyTorch wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """(bag directory, the recorder's report) of a few seconds of the demo, ended by SIGTERM."""
    bag = tmp_path_factory.mktemp("bags") / "run"
    recorder = subprocess.Popen([*PROGRAM, "record", str(bag), "--compression", "zstd"], stdout=subprocess.PIPE,
                                text=True, env=ALONE)
    demo = [*PROGRAM, "demo", "--duration", "4", "--device", "cpu", "--steps", "2"]
    subprocess.run(demo, capture_output=True, timeout=180, env=ALONE)
    recorder.send_signal(signal.SIGTERM)
    said, _ = recorder.communicate(timeout=PATIENCE_S)
    return bag, json.loads(said.splitlines()[-1]), recorder.returncode


def test_a_recorded_demo_is_replayed_bit_for_bit(recording, capsys):
    bag, recorded, status = recording
    assert status == 0 and recorded["ok"] and recorded["parameters_known"]
    made = read_run(bag, topic_map()).made
    assert len(made) == recorded["messages"]["/pi05_policy/provenance"] >= 2
    main(["replay", str(bag)])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["identical"] == report["chunks"] >= 2 and report["largest_error"] == 0
    assert report["chunks"] + len(report["missing"]) == len(made)  # best-effort images may be lost on the way


def test_other_steps_differ_and_the_page_shows_where(recording, capsys, tmp_path):
    bag = recording[0]
    assert main(["replay", str(bag), "--steps", "3", "--tolerance", "1e-9", "--html",
                 str(tmp_path / "page.html")]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["identical"] == 0 and report["largest_error"] > 0 and not report["ok"]
    assert report["changed"] == {"steps": 3} and len(report["rms_by_action"]) == 50
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 4 and "steps = 3" in page and "http" not in page
    assert "nan" not in page and page.count("<polyline") == 4


def test_rosbags_reads_the_recording_by_its_own_definitions(recording):
    bag, recorded, _ = recording
    with AnyReader([bag]) as reader:
        assert reader.message_count == sum(recorded["messages"].values())
        kinds = {c.topic: c.msgtype for c in reader.connections}
        assert kinds["/pi05_policy/base_image"] == "sensor_msgs/msg/Image"
        for connection, _, data in reader.messages():
            message = reader.deserialize(data, connection.msgtype)
            if connection.topic == "/pi05_policy/trajectory":
                assert len(message.joint_names) == 7 and message.points


def test_calibration_takes_the_observations_of_a_recording(recording):
    transforms = transforms_for(RecipeSource(tiny_config(action_horizon=50)), load_robot("arm6"))
    made = len(read_run(recording[0], topic_map()).made)
    (one,) = bag_samples(recording[0], transforms, 1, seed=0)
    assert one.actions is None and one.inputs.image_mask.any() and one.inputs.tokens.shape[1] >= 1
    assert {frame.dtype.name for frame in one.inputs.frames if frame is not None} == {"uint8"}
    with pytest.raises(BagError, match="fewer --samples"):
        bag_samples(recording[0], transforms, made + 1, seed=0)


def test_a_chunk_whose_frame_is_lacking_or_ambiguous_is_reported_never_guessed(recording, tmp_path):
    topics, writers = topic_map(), {name: BagWriter(tmp_path / name) for name in ("lacking", "ambiguous")}
    first = None
    for message in read_messages(recording[0]):
        topic = Topic(message.topic, message.type)
        for writer in writers.values():
            if message.topic != topics["base_0_rgb"]:
                writer.write(topic, message.time_ns, message.data)
        if message.topic == topics["base_0_rgb"]:
            first = first or message
            other = bytes([*message.data[:-1], message.data[-1] ^ 1])
            writers["ambiguous"].write(topic, message.time_ns, message.data)
            writers["ambiguous"].write(topic, message.time_ns, other)
    for writer in writers.values():
        writer.close()
    for name in writers:
        run = read_run(tmp_path / name, topics)
        policy = load_policy(run, {}, print)
        found = list(replay(tmp_path / name, topics, run, policy))
        refused = [item for item in found if item.chunk is None]
        assert refused and all("base_0_rgb stamped" in item.why for item in refused)
        assert name == "ambiguous" or len(refused) == len(run.made)


def test_a_bag_without_parameters_or_chunks_says_what_to_give(recording, tmp_path):
    topics, writer = topic_map(), BagWriter(tmp_path / "bare")
    for message in read_messages(recording[0]):
        if message.topic == topics["provenance"]:
            writer.write(Topic(message.topic, message.type), message.time_ns, message.data)
    writer.close()
    with pytest.raises(BagError, match="Give --robot"):
        load_policy(read_run(tmp_path / "bare", topics), {}, print)
    with pytest.raises(BagError, match="expected chunks with their actions"):
        read_run(tmp_path / "bare", topics | {"provenance": "/elsewhere"})


def test_a_killed_recorder_leaves_a_bag_that_opens(robot, tmp_path):
    recorder = subprocess.Popen([*PROGRAM, "record", str(tmp_path / "run")], stdout=subprocess.DEVNULL, env=ALONE)
    path = tmp_path / "run" / "run_0.mcap"
    try:
        robot.until(lambda: path.exists() and path.stat().st_size > 100_000, robot.send, "100 kB on the disk")
    finally:
        recorder.kill()
        recorder.wait()
    found = list(read_messages(tmp_path / "run"))
    assert {message.topic for message in found} >= {"/pi05_policy/base_image", "/pi05_policy/joint_states"}
    assert not (tmp_path / "run" / "metadata.yaml").exists()  # as rosbag2 leaves it; `ros2 bag reindex` makes it
