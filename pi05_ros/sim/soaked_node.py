"""What the soak puts around the real node: a worker without a thread, a policy that may fail, caught outputs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from rclpy.clock import ClockType
from rclpy.time import Time
from trajectory_msgs.msg import JointTrajectory

from pi05_ros.ros.policy_node import PolicyNode
from pi05_ros.runtime.chunking import NON_FINITE, JointLimits
from pi05_ros.runtime.device_faults import OUT_OF_MEMORY
from pi05_ros.runtime.sequential import Sequential
from pi05_ros.schema import ActionChunk, Guidance, Observation
from pi05_ros.sim.faults import Fault
from pi05_ros.transforms.robot_file import Robot

HORIZON = 50
SLOWEST_S = 0.4  # of inference, as a fault


class InlineWorker:
    """In place of `Worker`: jobs run at once, the loop when `run` is called."""

    alive, failure = True, None

    def __init__(self) -> None:
        self._due: Callable[[], float | None] = lambda: None
        self._step: Callable[[], None] = lambda: None

    def call(self, job: Callable[[], Any]) -> Future:
        done: Future = Future()
        try:
            done.set_result(job())
        except Exception as error:  # as the worker does: it belongs to who waits for the job
            done.set_exception(error)
        return done

    def repeat(self, due: Callable[[], float | None], step: Callable[[], None]) -> None:
        self._due, self._step = due, step

    def wake(self) -> None:
        pass

    def stop(self, timeout_s: float) -> bool:
        return True

    def run(self) -> None:
        while self._due() == 0.0:
            self._step()


class ScriptedPolicy:
    """A chunk that swings every joint through its range; `trouble` is the fault of the next one. Its own transforms.

    Args:
        during: called with the seconds that a chunk takes, while it is made.
        failed: takes the counter of /diagnostics that a fault of the policy must show in.
    """

    rtc_training_max_delay = 0

    def __init__(self, robot: Robot, during: Callable[[float], None],
                 failed: Callable[[str], None] = lambda counter: None) -> None:
        self.robot, self._during, self._failed = robot, during, failed
        self.trouble: Fault | None = None
        self.transforms = self
        limits = JointLimits(robot)
        self._middle, self._half = (limits.lower + limits.upper) / 2, (limits.upper - limits.lower) / 2

    def summary(self) -> str:
        return "scripted"

    def pipeline(self, overlap: bool) -> Sequential:
        return Sequential(self)

    def frame_memory(self, size: int) -> np.ndarray:
        return np.empty(size, np.uint8)

    def encode_actions(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        return np.pad(actions, ((0, 0), (0, 32 - actions.shape[1]))).astype(np.float32)

    def sensors(self) -> Callable[[], dict[str, float]]:
        return dict

    def infer(self, observation: Observation, num_steps: int, *, chunk_index: int,
              guidance: Guidance | None = None) -> ActionChunk:
        trouble, self.trouble = self.trouble, None
        kind, amount = (trouble.kind, trouble.amount) if trouble else ("", 0.0)
        self._during(SLOWEST_S * amount if kind == "slow_inference" else 0.01)
        if kind == "worker_exception":
            self._failed(f"refused.{'inference failed' if amount < 0.5 else OUT_OF_MEMORY}")
            raise RuntimeError("injected") if amount < 0.5 else torch.OutOfMemoryError("CUDA out of memory (injected)")
        period = self.robot.control_period_s
        times = observation.stamp_ns * 1e-9 % 1000 + np.arange(HORIZON)[:, None] * period
        swing = np.sin(times * (1 + np.arange(len(self._middle)) / 3))
        actions = self._middle + (1.3 + 3 * amount * (kind == "bad_actions")) * self._half * swing
        if kind == "bad_actions" and amount < 0.5:
            actions[int(amount * HORIZON), 0] = np.nan if amount < 0.25 else np.inf
            self._failed(f"refused.{NON_FINITE}")
        return ActionChunk(actions.astype(np.float32), np.zeros((HORIZON, 32), np.float32), observation.stamp_ns,
                           period, observation.prompt, num_steps, 0, chunk_index, stage_times_ms={"total": 1.0},
                           guidance=guidance)


class Wire:
    """A publisher that hands what it gets to the soak; everything else is the real one's."""

    def __init__(self, publisher: Any, take: Callable[[Any], None]) -> None:
        self._publisher, self._take = publisher, take

    def publish(self, message: Any) -> None:
        self._take(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._publisher, name)


class SimulatedClock:
    """Of the node; time passes when the soak says so."""

    clock_type = ClockType.ROS_TIME

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns

    def now(self) -> Time:
        return Time(nanoseconds=self._now_ns(), clock_type=ClockType.ROS_TIME)


class SoakedNode(PolicyNode):
    """The policy node on a simulated clock, without a thread, its outputs caught.

    Args:
        take: takes (message, topic) of trajectories, provenance and diagnostics.
    """

    def __init__(self, take: Callable[[Any, str], None], now_ns: Callable[[], int], **kwargs: Any) -> None:
        self._take_output, self._simulated = take, SimulatedClock(now_ns)
        super().__init__(make_worker=InlineWorker, **kwargs)  # type: ignore[arg-type]

    def get_clock(self) -> Any:
        return self._simulated

    def create_publisher(self, msg_type: Any, topic: str, *args: Any, **kwargs: Any) -> Any:
        made = super().create_publisher(msg_type, topic, *args, **kwargs)
        caught = msg_type is JointTrajectory or topic in ("~/provenance", "/diagnostics")
        return Wire(made, lambda message: self._take_output(message, topic)) if caught else made

    def destroy_publisher(self, publisher: Any) -> bool:
        return super().destroy_publisher(getattr(publisher, "_publisher", publisher))

    def turn(self) -> None:
        """What the executor would do next."""
        self._empty_outbox()

    def watch(self) -> None:
        self._watch()

    def diagnose(self) -> None:
        self._diagnose()

    @property
    def epoch(self) -> int | None:
        return self._epoch
