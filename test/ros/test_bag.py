"""A run of the demo recorded over DDS and replayed; and a recorder that is killed."""

import json
import os
import re
import signal
import subprocess
import sys
from base64 import b64encode
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("mcap", reason="needs the extra `bag`")
pytest.importorskip("rosbags", reason="needs the extra `bag`")

from diagnostic_msgs.msg import DiagnosticArray, KeyValue  # noqa: E402
from rclpy.serialization import deserialize_message, serialize_message  # noqa: E402
from rendering import seen_world  # noqa: E402, F401 (a fixture)
from robot_stand_in import PATIENCE_S  # noqa: E402
from rosbags.highlevel import AnyReader  # noqa: E402
from sensor_msgs.msg import Image, JointState  # noqa: E402

from pi05_ros.bag.driven import driven_run  # noqa: E402
from pi05_ros.bag.reader import read_messages  # noqa: E402
from pi05_ros.bag.replay import input_slots, read_run, replay, stamp_of  # noqa: E402
from pi05_ros.bag.setup import load_policy  # noqa: E402
from pi05_ros.bag.topics import topic_map  # noqa: E402
from pi05_ros.bag.writer import BagWriter, Topic  # noqa: E402
from pi05_ros.cli.main import main  # noqa: E402
from pi05_ros.config import share_directory, tiny_config  # noqa: E402
from pi05_ros.errors import BagError, ConfigError  # noqa: E402
from pi05_ros.model.recipe import RecipeSource  # noqa: E402
from pi05_ros.quantize.recorded import bag_samples, transforms_for  # noqa: E402
from pi05_ros.ros.conversions import guidance_values  # noqa: E402
from pi05_ros.runtime.joining import Joining, JoinSettings  # noqa: E402
from pi05_ros.schema import CAMERAS, Observation  # noqa: E402
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
def recording(tmp_path_factory, seen_world):  # noqa: F811
    """(bag directory, the recorder's report) of a dozen seconds of the demo, ended by SIGTERM."""
    bag = tmp_path_factory.mktemp("bags") / "run"
    recorder = subprocess.Popen([*PROGRAM, "record", str(bag), "--compression", "zstd"], stdout=subprocess.PIPE,
                                text=True, env=ALONE)
    demo = [*PROGRAM, "demo", "--duration", "12", "--device", "cpu", "--steps", "2", "--film", f"{bag.parent}/demo.gif"]
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
    assert report["changed"] == {"steps": 3} and len(report["rms_by_action"]) == 20
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 4 and "steps = 3" in page and "http" not in page
    assert "nan" not in page and page.count("<polyline") == 4


def test_a_guided_chunk_is_made_again_with_the_recorded_chunk_that_guided_it(recording, tmp_path):
    """Provenance of the second chunk as the node would have written it in chunk_mode guided."""
    topics, names = topic_map(), ("guided", "alone")
    run = read_run(recording[0], topics)
    policy = load_policy(run, {}, print)
    once = {item.made.name: item for item in replay(recording[0], topics, run, policy) if item.chunk}
    first, second = next((a, b) for a, b in pairwise(run.made) if {a.name, b.name} <= once.keys())
    joining = Joining(policy.transforms.encode_actions)
    joining.made(chunk := once[first.name].chunk)
    joining.published(chunk, chunk.stamp_ns, late_s=0.033)  # as after a hold: it acted later than its stamp says
    joining.delay.seconds = 0.06
    seen = observation_of(recording[0], topics, second, policy)
    guidance = joining.guidance(seen, JoinSettings("guided", schedule="exp", beta=5.0))
    chunk = policy.infer(seen, 2, seed=int(second.values["seed"]), chunk_index=int(second.values["chunk_index"]),
                         guidance=guidance)
    assert np.abs(chunk.actions - second.actions).max() > 1e-6  # guidance does something
    values = {"guidance": "identity", **guidance_values(guidance),
              "actions_float32": b64encode(chunk.actions.astype("<f4").tobytes()).decode()}
    writers = {name: BagWriter(tmp_path / name) for name in names}
    for message in read_messages(recording[0]):
        data = message.data
        if message.topic == topics["provenance"]:
            data = with_values(data, second, values)
        for name, writer in writers.items():
            if not (name == "alone" and message.topic == topics["provenance"] and data == message.data):
                writer.write(Topic(message.topic, message.type), message.time_ns, data)
    for name, writer in writers.items():
        writer.close()
        run = read_run(tmp_path / name, topics)
        (again,) = [item for item in replay(tmp_path / name, topics, run, policy) if item.made.name == second.name]
        if name == "guided":
            np.testing.assert_array_equal(again.chunk.actions, again.made.actions)
        else:
            assert again.chunk is None and "guided by a chunk that is not in the bag" in again.why


def observation_of(bag, topics, made, policy):
    inputs = {}
    slots = input_slots(topics)
    for message in read_messages(bag):
        slot = slots.get(message.topic)
        if slot and made.stamps_ns.get(slot) == stamp_of(message):
            inputs[slot] = deserialize_message(message.data, JointState if slot == "state" else Image)
    images = {slot: np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)
              for slot, image in inputs.items() if slot != "state"}
    order = [list(inputs["state"].name).index(joint.name) for joint in policy.robot.joints]
    state = np.array(inputs["state"].position)[order].astype(np.float32)
    stamp = max(ns for slot, ns in made.stamps_ns.items() if slot != "state")
    return Observation(images, state, made.values["prompt"], stamp)


def with_values(cdr, made, values):
    """The chunk's provenance with other values; any other chunk's as it is."""
    message = deserialize_message(cdr, DiagnosticArray)
    pairs = {pair.key: pair.value for pair in message.status[0].values}
    if (pairs["epoch"], pairs["chunk_index"]) != (made.values["epoch"], made.values["chunk_index"]):
        return cdr
    pairs |= {key: str(value) for key, value in values.items()}
    message.status[0].values = [KeyValue(key=key, value=value) for key, value in pairs.items()]
    return serialize_message(message)


def test_another_robots_bag_is_compared_with_what_its_joints_did(recording, tmp_path, capsys):
    """No node of ours in it, and topics of its own."""
    topics, writer = topic_map(), BagWriter(tmp_path / "driven")
    names = {topics[role]: f"/robot/{role}" for role in (*CAMERAS, "state")}
    for message in read_messages(recording[0]):
        if message.topic in names:
            writer.write(Topic(names[message.topic], message.type), message.time_ns, message.data)
    writer.close()
    (tmp_path / "map.yaml").write_text("".join(f"{name.rsplit('/', 1)[1]}: {name}\n" for name in names.values()))
    words = ["replay", str(tmp_path / "driven"), "--topics", str(tmp_path / "map.yaml"), "--against", "joints",
             "--every", "0.3", "--robot", "arm6", "--html", str(tmp_path / "page.html")]
    assert main([*words]) == 1
    assert "Give --prompt" in capsys.readouterr().err
    assert main([*words, "--prompt", "push"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["against"] == "joints" and report["chunks"] >= 2 and report["recorded_ms"] == {}
    assert report["largest_error"] > 0 and "what the joints did next" in (tmp_path / "page.html").read_text()
    mapped = topic_map(tmp_path / "map.yaml")
    run = driven_run(tmp_path / "driven", mapped, load_robot("arm6"), 50, "push", 0.3)
    moves = {stamp_of(m): deserialize_message(m.data, JointState) for m in read_messages(tmp_path / "driven")
             if m.topic == "/robot/state"}
    order = [list(next(iter(moves.values())).name).index(joint.name) for joint in load_robot("arm6").joints]
    for made in run.made:
        base = int(made.values["observation_stamp_ns"])
        for k in (0, 20, 49):
            nearest = min(moves, key=lambda ns: abs(ns - base - k * 20_000_000))
            np.testing.assert_allclose(made.actions[k], np.array(moves[nearest].position)[order], atol=0.03)
    with pytest.raises(ConfigError, match="joint positions as actions"):
        driven_run(tmp_path / "driven", mapped, load_robot("libero"), 10, "push")
    with pytest.raises(BagError, match="20000.0 s of joints after"):
        driven_run(tmp_path / "driven", mapped, load_robot("arm6"), 10**6, "push")


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


def test_every_series_of_the_foxglove_layout_is_in_a_recording(recording):
    panels = json.loads((share_directory() / "config" / "foxglove.json").read_text())["configById"]
    images = [panel["imageMode"]["imageTopic"] for panel in panels.values() if "imageMode" in panel]
    paths = [series["value"] for panel in panels.values() for series in panel.get("paths", [])]
    assert len(images) == 3 and len(paths) > 20
    with AnyReader([recording[0]]) as reader:
        last = {connection.topic: reader.deserialize(data, connection.msgtype)
                for connection, _, data in reader.messages()}
    assert {*images, "/diagnostics"} <= last.keys()
    for path in paths:
        topic, *steps = re.findall(r"/[\w/]+|\.\w+|\[\d+\]|\[:\]\{key==\"[\w.]+\"\}", path)
        found = last[topic]
        for step in steps:
            if step[0] == ".":
                found = getattr(found, step[1:])
            elif step.startswith("[:]"):
                (found,) = [pair for pair in found if pair.key == step.split('"')[1]]
            else:
                found = found[int(step[1:-1])]
        assert np.isfinite(float(found)), path


def test_calibration_takes_the_observations_of_a_recording(recording):
    transforms = transforms_for(RecipeSource(tiny_config(action_horizon=50)), load_robot("arm6"))
    made = len(read_run(recording[0], topic_map()).made)
    (one,) = bag_samples(recording[0], transforms, 1, seed=0)
    assert one.actions is None and one.inputs.image_mask.any() and one.inputs.tokens.shape[1] >= 1
    assert {frame.dtype.name for frame in one.inputs.frames if frame is not None} == {"uint8"}
    with pytest.raises(BagError, match="fewer --samples"):
        bag_samples(recording[0], transforms, made + 1, seed=0)


def test_an_export_is_judged_by_the_observations_of_a_recording(recording, tmp_path, capsys):
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="needs the extra `export`")
    assert main(["export", "--output", str(tmp_path), "--stages", "vision,prefix,expert"]) == 0
    words = ["validate", str(tmp_path), "--observations", f"bag:{recording[0]}", "--cases", "2", "--steps", "1,3"]
    assert main(words) == 2  # whose robot?
    assert main([*words, "--robot", "arm6"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert max(report["graphs"].values()) < 1e-5 and set(report["graphs"]) == {"vision", "prefix", "modulation", "step"}
    assert len({one["case"] for one in report["cases"] if one["graph"] == "vision"}) == 2


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
