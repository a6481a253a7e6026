"""`end-to-end`: the real node between real sensors, every one a process of its own, from stamp to trajectory.

Cameras on one beat and joint states go over DDS to the node. A chunk's provenance tells its history: newest stamp of
the set, set complete (`transport`), taken by the worker, published. `queue` is the time it waited behind a busy worker
or a busy device, `device` the policy's stages, `overhead` all the rest of the latency: transport, decoding, what a GPU
does not hide of the `transforms`, hand-over, planning and `publishing`. Every frame sent is used, or counted as
dropped, lost or refused; `uncounted` is the rest, less the frame that may remain unread at the end.

JSON: runs [{rate_hz, seconds, sent, trajectories, latency_ms, overhead_ms, device_ms, queue_ms, transport_ms,
transforms_ms, publishing_ms {p50, p99, most}, dropped, lost, refused, uncounted}].
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from pi05_ros.benchmark.findings import Findings, Gate, Table
from pi05_ros.config import share_directory
from pi05_ros.errors import WorkerError
from pi05_ros.ros.lifecycle_client import LifecycleClient
from pi05_ros.ros.subscriptions import TOPICS

TARGET = "/pi05_policy"
DEVICE_STAGES = ("images", "vision", "prefix", "expert")
PATIENCE_S = 60.0
QUIET_S = 2.5  # without a trajectory, and long enough for two reports: the node has finished


@dataclass(frozen=True)
class Load:
    """What the sensors send: rates in Hz, size in pixels."""

    rate_hz: float
    seconds: float
    joint_rate_hz: float = 200.0
    height: int = 480
    width: int = 640
    cameras: tuple[str, ...] = tuple(TOPICS.values())


@dataclass(frozen=True)
class EndToEnd:
    """Milliseconds of each trajectory by part, and counts; `sent` by topic, the others by cause."""

    load: Load
    parts_ms: Mapping[str, np.ndarray]
    sent: Mapping[str, int]
    dropped: Mapping[str, int]
    lost: Mapping[str, int]
    refused: Mapping[str, int]

    @property
    def trajectories(self) -> int:
        return len(self.parts_ms["latency"])

    def uncounted(self) -> dict[str, int]:
        """Frames of each camera that nobody accounts for."""
        # A set that the worker took counts for each camera, whether it became a trajectory or was refused. What the
        # watchdog says of silent inputs ("unusable ...") is no frame.
        taken = self.trajectories + sum(n for cause, n in self.refused.items() if not cause.startswith("unusable"))
        slots = {topic: slot for slot, topic in TOPICS.items()}
        out = {}
        for topic in self.load.cameras:
            gone = sum(count for cause, count in self.dropped.items() if cause.startswith(slots[topic]))
            out[topic] = max(0, self.sent[topic] - taken - gone - self.lost.get(topic, 0) - 1)
        return out

    def rows(self) -> list[tuple[str, ...]]:
        """A table's rows: part, p50, p99 and most in ms."""
        return [(part, *(f"{value:.2f}" for value in percentiles(values).values()))
                for part, values in self.parts_ms.items()]

    def as_data(self) -> dict[str, Any]:
        parts = {f"{part}_ms": percentiles(values) for part, values in self.parts_ms.items()}
        return {"rate_hz": self.load.rate_hz, "seconds": self.load.seconds, "sent": dict(self.sent),
                "trajectories": self.trajectories, **parts, "dropped": dict(self.dropped), "lost": dict(self.lost),
                "refused": dict(self.refused), "uncounted": self.uncounted()}


@dataclass
class Witness:
    """Provenance and diagnostics as they come."""

    provenance: list[dict[str, str]] = field(default_factory=list)
    report: dict[str, str] = field(default_factory=dict)
    reports: int = 0
    last_s: float = 0.0

    def on_provenance(self, message: DiagnosticArray) -> None:
        self.provenance.append({pair.key: pair.value for pair in message.status[0].values})
        self.last_s = time.monotonic()

    def on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name.endswith(": policy"):
                self.report = {pair.key: pair.value for pair in status.values}
                self.reports += 1

    def counts(self, kind: str) -> dict[str, int]:
        """`dropped`, `lost` or `refused`, by cause."""
        return {key.removeprefix(f"{kind}."): int(value) for key, value in self.report.items()
                if key.startswith(f"{kind}.")}


def measure(loads: Iterable[Load], parameters: Mapping[str, object],
            say: Callable[[str], object] = lambda text: None) -> list[EndToEnd]:
    """One node with these parameters, configured once; each load in turn.

    Raises:
        WorkerError: a process ended, a transition was refused, or nothing came.
    """
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ.setdefault("FASTRTPS_DEFAULT_PROFILES_FILE", str(share_directory() / "config" / "fastdds.xml"))
    words = {name: repr(value) if isinstance(value, str) else value for name, value in parameters.items()}
    arguments = [word for name, value in words.items() for word in ("-p", f"{name}:={value}")]
    policy = subprocess.Popen([sys.executable, "-m", "pi05_ros.ros.node", "--ros-args", *arguments])
    rclpy.init()
    try:
        stage = Stage(policy)
        for transition in ("configure", "activate"):
            say(transition)
            if not stage.lifecycle.change(transition, timeout_s=600.0):
                raise WorkerError(transition, expected="to succeed", received="a refusal",
                                  way_out="The node's log above says why.")
        found = []
        for load in loads:
            say(f"{load.rate_hz:g} Hz for {load.seconds:g} s")
            found.append(stage.run(load))
        stage.lifecycle.change("deactivate")
        stage.lifecycle.change("cleanup")
        return found
    finally:
        rclpy.try_shutdown()
        if policy.poll() is None:
            policy.send_signal(signal.SIGINT)
        try:
            policy.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            policy.kill()


def findings(runs: Sequence[EndToEnd], most_p50_ms: float | None, most_p99_ms: float | None) -> Findings:
    """A table a load; no frame may be uncounted, and the overhead not above its targets."""
    tables, gates = [], []
    for one in runs:
        at = f"{one.load.rate_hz:g} Hz"
        tables.append(Table(f"cameras at {at}, joints at {one.load.joint_rate_hz:g} Hz, {one.load.seconds:g} s: "
                            f"{one.trajectories} trajectories", ("part", "p50 ms", "p99 ms", "most ms"), one.rows()))
        gates.append(Gate(f"{at}: frames uncounted", float(sum(one.uncounted().values())), 0.0))
        overhead = percentiles(one.parts_ms["overhead"])
        gates += [Gate(f"{at}: overhead {name}, ms", overhead[name], limit)
                  for name, limit in (("p50", most_p50_ms), ("p99", most_p99_ms)) if limit is not None]
    return Findings(tables, {"runs": [one.as_data() for one in runs]}, gates)


class Stage:
    """The node's process, and a witness that spins in this one."""

    def __init__(self, policy: subprocess.Popen) -> None:
        self._policy, self._node, self.witness = policy, Node("end_to_end"), Witness()
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._node.create_subscription(DiagnosticArray, f"{TARGET}/provenance", self.witness.on_provenance, 1000)
        self._node.create_subscription(DiagnosticArray, "/diagnostics", self.witness.on_diagnostics, 10)
        self.lifecycle = LifecycleClient(self._node, self._executor, TARGET)
        self.lifecycle.wait(PATIENCE_S)

    def run(self, load: Load) -> EndToEnd:
        self._until_reported()
        before = {kind: self.witness.counts(kind) for kind in ("dropped", "lost", "refused")}
        self.witness.provenance.clear()
        sensors = {topic: start_sensor(topic, load) for topic in (*load.cameras, "joint_states")}
        try:
            for topic, sensor in sensors.items():
                self._expect_line(topic, sensor, "ready")
            begin_s = time.time() + 1.0
            for sensor in sensors.values():
                assert sensor.stdin is not None
                sensor.stdin.write(f"{begin_s}\n")
                sensor.stdin.flush()
            self._spin_until(time.monotonic() + 1.0 + load.seconds)
            sent = {topic: int(self._expect_line(topic, sensor)) for topic, sensor in sensors.items()}
            while time.monotonic() - self.witness.last_s < QUIET_S:
                self._spin_until(time.monotonic() + 0.1)
            self._until_reported()
        finally:
            for sensor in sensors.values():
                assert sensor.stdin is not None
                sensor.stdin.close()
                sensor.wait(PATIENCE_S)
        gone = {kind: {cause: count - before[kind].get(cause, 0) for cause, count in self.witness.counts(kind).items()}
                for kind in before}
        if not self.witness.provenance:
            raise WorkerError("end-to-end", expected="trajectories", received=f"none of {sent} sent; {gone}",
                              way_out="See the node's log above.")
        return EndToEnd(load, parts_of(self.witness.provenance), sent, **gone)

    def _spin_until(self, end_s: float) -> None:
        while time.monotonic() < end_s:
            if self._policy.poll() is not None:
                raise WorkerError("pi05_policy", expected="to live", received=f"exit status {self._policy.returncode}",
                                  way_out="Its log is above.")
            self._executor.spin_once(timeout_sec=0.05)

    def _until_reported(self) -> None:
        """Two reports more: the second one began after now."""
        goal, end_s = self.witness.reports + 2, time.monotonic() + PATIENCE_S
        while self.witness.reports < goal:
            if time.monotonic() > end_s:
                raise WorkerError("/diagnostics", expected="a report a second", received="none",
                                  way_out="See the node's log above.")
            self._spin_until(time.monotonic() + 0.05)

    def _expect_line(self, topic: str, sensor: subprocess.Popen, word: str = "") -> str:
        assert sensor.stdout is not None
        line = sensor.stdout.readline().strip()
        if not line or (word and line != word):
            raise WorkerError(topic, expected=word or "a number", received=repr(line), way_out="Its log is above.")
        return line


def start_sensor(topic: str, load: Load) -> subprocess.Popen:
    rate = load.joint_rate_hz if topic == "joint_states" else load.rate_hz
    return subprocess.Popen(
        [sys.executable, "-m", "pi05_ros.sim.sensor_load", "--topic", f"{TARGET}/{topic}", "--rate", str(rate),
         "--seconds", str(load.seconds), "--height", str(load.height), "--width", str(load.width)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def parts_of(provenance: Iterable[Mapping[str, str]]) -> dict[str, np.ndarray]:
    """Milliseconds of each trajectory, by part."""
    def ms(later: str, earlier: str) -> np.ndarray:
        return 1e-6 * np.array([int(one[later]) - int(one[earlier]) for one in chunks])

    def stages(*names: str) -> np.ndarray:
        return np.array([sum(float(one.get(f"stage_ms.{name}", 0.0)) for name in names) for one in chunks])

    chunks = list(provenance)
    latency = ms("published_ns", "observation_stamp_ns")
    queue = ms("inference_started_ns", "inputs_complete_ns") + stages("waiting")
    device = stages(*DEVICE_STAGES)
    return {"latency": latency, "overhead": latency - device - queue, "device": device, "queue": queue,
            "transport": ms("inputs_complete_ns", "observation_stamp_ns"),
            "transforms": stages("transform", "inverse"), "publishing": ms("published_ns", "planned_ns")}


def percentiles(values: np.ndarray) -> dict[str, float]:
    return {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99)),
            "most": float(values.max())}
