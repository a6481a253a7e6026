"""Two processes over real DDS: the node as a user starts it, with the embedded tiny pi0.5."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from robot_stand_in import PATIENCE_S, provenance_of

from pi05_ros.errors import WorkerError
from pi05_ros.ros.lifecycle_client import LifecycleClient
from pi05_ros.runtime.chunking import CommandLimits, JointLimits, JointMeasurement, plan_chunk
from pi05_ros.runtime.policy import Policy
from pi05_ros.runtime.trajectory import Commanded
from pi05_ros.schema import CAMERAS, Observation


@pytest.fixture
def process(tmp_path):
    """The node in a process of its own; its log is in `process.log`."""
    log = open(tmp_path / "log", "w+")
    patient = ("max_input_age_s:=5.0", "input_timeout_s:=60.0", "worker_timeout_s:=60.0")  # with a machine that halts
    arguments = ["--ros-args", *(word for value in ("denoising_steps:=2", "device:=cpu", *patient)
                                 for word in ("-p", value))]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # two threads of PyTorch wait for each other on a busy machine
    process = subprocess.Popen([sys.executable, "-m", "pi05_ros.ros.node", *arguments], stderr=log, env=alone)

    def read() -> str:
        log.seek(0)
        return log.read()

    process.log = read
    yield process
    process.kill()
    process.wait()
    log.close()


@pytest.fixture
def lifecycle(process, robot, executor):
    client = LifecycleClient(robot, executor, "/pi05_policy")
    try:
        client.wait(PATIENCE_S)
    except WorkerError as error:
        pytest.fail(f"{error}\nprocess: {process.poll()}, log:\n{process.log()}")
    return client


def nanoseconds(stamp):
    return stamp.sec * 10**9 + stamp.nanosec


def test_observations_in_trajectories_out_checked_field_by_field(lifecycle, robot, process):
    assert lifecycle.state() == "unconfigured"
    assert lifecycle.change("configure") and lifecycle.state() == "inactive"
    assert lifecycle.change("activate") and lifecycle.state() == "active"
    robot.connect()
    policy = Policy.load(robot="arm6")
    limits, sent, running, commanded = JointLimits(robot.robot), set(), None, Commanded()
    joints_at = {}  # by their stamp

    def send():
        images = [robot.image(c) for c in range(3)]
        for image in images:  # one stamp for the set
            image.header.stamp = images[0].header.stamp
        sent.add(nanoseconds(images[0].header.stamp))
        if robot.trajectories:  # it is where it was last sent: one that stays behind is refused after a pause
            robot.positions = np.array(robot.trajectories[-1].points[-1].positions)
        joints = robot.joints()
        joints_at[nanoseconds(joints.header.stamp)] = robot.positions
        robot.send(images, joints)

    for n in range(5):
        robot.until(lambda n=n: len(robot.trajectories) > n, send, "a trajectory")
        robot.until(lambda n=n: len(robot.provenance) > n, what="its provenance")
        message, made = robot.trajectories[n], provenance_of(robot.provenance[n])
        stamp = nanoseconds(message.header.stamp)
        consumed = {c: int(made[f"input_stamp_ns.{c}"]) for c in CAMERAS if f"input_stamp_ns.{c}" in made}
        assert sent.issuperset(consumed.values())
        assert stamp == max(consumed.values()) == int(made["observation_stamp_ns"])
        assert (made["denoising_steps"], made["seed"], made["epoch"]) == ("2", "0", "1")
        assert int(made["chunk_index"]) >= n  # above it where a slow machine made a chunk too late to be published
        assert made["prompt"] == robot.robot.default_prompt
        times = [int(made[key]) for key in ("observation_stamp_ns", "inputs_complete_ns", "inference_started_ns",
                                            "planned_ns", "published_ns")]
        assert times == sorted(times)
        # Made again here from what the provenance says: the same chunk, hence the same trajectory.
        seen = {c: f for c, f in zip(CAMERAS, robot.frames, strict=True) if c in consumed}
        state = joints_at[int(made["input_stamp_ns.state"])]
        observation = Observation(seen, state.astype(np.float32), made["prompt"], stamp)
        chunk = policy.infer(observation, 2, seed=int(made["seed"]), chunk_index=int(made["chunk_index"]))
        measured_ns, planned_ns = int(made["planned_from_stamp_ns"]), int(made["planned_ns"])
        measured = JointMeasurement(measured_ns, joints_at[measured_ns], commanded.at(measured_ns))
        running = plan = plan_chunk(chunk, limits, measured, planned_ns, CommandLimits(), running)
        commanded.add(planned_ns, plan)
        assert message.joint_names == robot.names and len(message.points) == len(plan.times_s)
        np.testing.assert_allclose([p.positions for p in message.points], plan.positions, atol=1e-5)
        np.testing.assert_allclose([p.velocities for p in message.points], plan.velocities, atol=1e-3)
        times = [p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in message.points]
        np.testing.assert_allclose(times, plan.times_s, atol=2e-9)

    assert robot.set_parameter("denoising_steps", 5).successful
    robot.until(lambda: provenance_of(robot.provenance[-1])["denoising_steps"] == "5", send, "five steps")
    answer = robot.set_parameter("denoising_steps", 0)
    assert not answer.successful and "range" in answer.reason
    for transition, state in (("deactivate", "inactive"), ("cleanup", "unconfigured"), (5, "finalized")):
        assert lifecycle.change(transition) and lifecycle.state() == state
    assert process.poll() is None and "Traceback" not in process.log()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_active_holds_the_robot_and_ends_the_process_cleanly(lifecycle, robot, process, number):
    assert lifecycle.change("configure") and lifecycle.change("activate")
    robot.connect()
    robot.next_trajectory()
    process.send_signal(number)
    process.send_signal(number)  # ros2 launch sends it twice
    last = robot.trajectories[-1]
    left_ns = nanoseconds(last.header.stamp) + nanoseconds(last.points[-1].time_from_start) - robot.now_ns()
    if left_ns > 3 * 10**8:  # else, on a machine that halted here, it may have come to rest by itself
        robot.until(lambda: len(robot.trajectories[-1].points) == 1, what="the hold")
    assert process.wait(PATIENCE_S) == 0 and "Traceback" not in process.log()


def test_a_signal_before_configuring_ends_the_process_cleanly(lifecycle, process):
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0 and "Traceback" not in process.log()


def test_the_collector_has_little_to_look_through():
    """All that is imported for a node is 300 000 objects, whose collection stopped a chunk for 0.15 s."""
    code = "import gc; from pi05_ros.ros import node; node.spare_the_collector(); print(len(gc.get_objects()))"
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(left) < 5_000
