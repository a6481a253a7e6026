"""The end-to-end measurement: real processes, small and slow enough for a CPU, and its arithmetic."""

import json

import numpy as np
import pytest
from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image

from pi05_ros.benchmark import end_to_end
from pi05_ros.benchmark.end_to_end import EndToEnd, Load, Witness, parts_of
from pi05_ros.ros.wire_images import read_image
from pi05_ros.sim import sensor_load


def test_real_sensors_a_real_node_and_every_frame_accounted_for():
    load = Load(rate_hz=2.0, seconds=8.0, joint_rate_hz=20.0, height=48, width=64)  # a busy CPU halts for 2 s
    (found,) = end_to_end.measure([load], {"device": "cpu", "denoising_steps": 1, "max_input_age_s": 5.0,
                                           "max_committed_s": 5.0, "max_skew_s": 2.0})
    assert found.sent["joint_states"] > 30 and 1 <= found.sent["base_image"] <= 16
    assert found.trajectories >= 1 and set(found.uncounted().values()) == {0}, found
    assert (found.parts_ms["device"] > 0).all() and (found.parts_ms["transport"] > 0).all()
    total = sum(found.parts_ms[part] for part in ("overhead", "device", "queue"))
    np.testing.assert_allclose(total, found.parts_ms["latency"])
    assert json.dumps(found.as_data()) and found.rows()[0][0] == "latency"


def chunk():
    times = {"observation_stamp_ns": 1_000_000, "inputs_complete_ns": 3_000_000, "inference_started_ns": 4_000_000,
             "planned_ns": 24_000_000, "published_ns": 25_000_000}
    stages = {"transform": 0.7, "inverse": 0.1, "vision": 2.0, "prefix": 6.0, "waiting": 0.5, "expert": 7.0}
    return {key: str(value) for key, value in (times | {f"stage_ms.{s}": ms for s, ms in stages.items()}).items()}


def test_the_parts_of_a_latency():
    parts = parts_of([chunk()])
    assert {part: values[0] for part, values in parts.items()} == pytest.approx(
        {"latency": 24.0, "device": 15.0, "queue": 1.5, "transport": 2.0, "overhead": 7.5, "transforms": 0.8,
         "publishing": 1.0})


@pytest.mark.parametrize(("sent", "missing"), [(14, 0), (15, 0), (18, 3)])
def test_frames_that_nobody_counted_are_found(sent, missing):
    found = EndToEnd(Load(30.0, 1.0, cameras=("base_image",)), parts_of([chunk()] * 10), {"base_image": sent},
                     dropped={"base_0_rgb": 1, "base_0_rgb out of order": 1, "left_wrist_0_rgb": 9},
                     lost={"base_image": 1, "left_wrist_image": 9}, refused={"late chunk": 1, "unusable state": 40})
    assert found.uncounted() == {"base_image": missing}


def test_gates_are_on_uncounted_frames_and_the_overhead():
    load = Load(30.0, 1.0, cameras=("base_image",))
    runs = [EndToEnd(load, parts_of([chunk()] * 10), {"base_image": 13}, {}, {}, {})]
    gates = {gate.name: gate for gate in end_to_end.findings(runs, most_p50_ms=8.0, most_p99_ms=7.0).gates}
    assert [gate.ok for gate in gates.values()] == [False, True, False]
    assert gates["30 Hz: frames uncounted"].value == 2 and gates["30 Hz: overhead p99, ms"].value == pytest.approx(7.5)


def test_reports_are_read_by_kind():
    witness = Witness(report={"dropped.base_0_rgb": "3", "lost.base_image": "1", "state": "active"})
    assert witness.counts("dropped") == {"base_0_rgb": 3} and witness.counts("refused") == {}


def test_a_sensor_keeps_the_beat_stamps_each_message_and_leaves_out_what_is_late(monkeypatch):
    clock, sent, waits = [100.0], [], []
    monkeypatch.setattr(sensor_load.time, "time", lambda: clock[0])
    monkeypatch.setattr(sensor_load.time, "time_ns", lambda: round(clock[0] * 1e9))

    def wait(seconds):
        waits.append(seconds)
        clock[0] += seconds

    message = bytearray(serialize_message(Image()))

    def publish():
        sent.append(read_image(message).stamp_ns)
        clock[0] += 1.0 if len(sent) == 2 else 0.0  # the second one takes a second

    count = sensor_load.send(publish, message, 100.5, 4.0, 8, wait)
    beats = [s * 1e-9 - 100.5 for s in sent]
    assert beats == pytest.approx([0.0, 0.25, 1.25, 1.25, 1.5, 1.75]) and count == 6
    assert waits == pytest.approx([0.5, 0.25, 0.25, 0.25])
