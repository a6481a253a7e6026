"""Held-out episodes through the real policy node: a process of its own, real DDS, simulated time in lockstep.

World, noise and moments are those of `closed_loop`: latency is in the sensors (time stands still while the policy
computes), so that a chunk is exactly as old when it is planned.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.parameter_client import AsyncParameterClient
from rclpy.task import Future
from std_srvs.srv import Trigger

from pi05_ros.errors import ConfigError, WorkerError
from pi05_ros.ros.lifecycle_client import LifecycleClient
from pi05_ros.ros.subscriptions import TOPICS
from pi05_ros.sim.closed_loop import evaluate_expert
from pi05_ros.sim.episode import COMMAND, Loop, Run, Trial
from pi05_ros.sim.evaluation import FILMED, Evaluation, Played, Progress, Row, caption
from pi05_ros.sim.processes import share_this_machine, start, stop
from pi05_ros.sim.tabletop_node import TabletopNode
from pi05_ros.sim.tabletop_parameters import TabletopParameters
from pi05_ros.sim.tasks import Task
from pi05_ros.sim.world import TabletopWorld

LOADING_S = 600.0
ANSWER_S = 120.0  # for a service, or a chunk
EXACT_S = 0.002  # a chunk that is planned further from its moment is counted


@dataclass
class Moments:
    """Of the chunks: how many, and how many were planned at another age than the setting says."""

    chunks: int = 0
    off_time: int = 0


class PolicyUnderTest:
    """The simulated robot in this process, the node in another; `with` starts and ends both.

    Topics carry this process's number, so that several can run on one machine.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation, self.moments = evaluation, Moments()
        name, masked = f"pi05_policy_{os.getpid()}", evaluation.ablation.masked
        share_this_machine()
        self._process = start("pi05_ros.ros.node", {
            "use_sim_time": True, "robot": "tabletop", "checkpoint": evaluation.checkpoint or "",
            "backend": evaluation.backend, "device": evaluation.device, "dtype": evaluation.dtype,
            "action_horizon": evaluation.horizon or 0, "max_committed_s": COMMAND.max_committed_s,
            "absent_cameras": TOPICS[masked].removesuffix("_image") if masked else "",
            "stop_time_s": COMMAND.stop_time_s, "command_lead_s": COMMAND.lead_s,
            "fade_s": COMMAND.fade_s,
            "max_skew_s": 0.001,  # joints of the very moment of the images
            "max_input_age_s": 5.0, "input_timeout_s": 60.0, "worker_timeout_s": ANSWER_S,
        }, {"__node": name, "/clock": f"/{name}/clock"})
        self._started_rclpy = not rclpy.ok()
        if self._started_rclpy:
            rclpy.init()
        self._period_ns = round(evaluation.robot.control_period_s * 1e9)
        self.node = TabletopNode(TabletopParameters(
            policy=f"/{name}", joint_rate_hz=1e9 / self._period_ns, lockstep=True, answer_timeout_s=ANSWER_S,
            hear_prompt=False), cli_args=["--ros-args", "-r", f"/clock:=/{name}/clock"])
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._lifecycle = LifecycleClient(self.node, self._executor, f"/{name}")
        self._parameters = AsyncParameterClient(self.node, f"/{name}")
        self._reset = self.node.create_client(Trigger, f"/{name}/reset")

    def __enter__(self) -> PolicyUnderTest:
        try:
            self._lifecycle.wait(60.0)
            for transition in ("configure", "activate"):
                if not self._lifecycle.change(transition, LOADING_S):
                    raise WorkerError(transition, expected="to succeed", received="a refusal",
                                      way_out="The policy node's log above says why.")
            self._until_it_answers()
        except BaseException:  # also an interrupt: where __enter__ fails nobody calls __exit__, processes would stay
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        stop(self._process)
        self._executor.shutdown()
        self.node.world.close()
        self.node.destroy_node()
        if self._started_rclpy:
            rclpy.try_shutdown()

    def use(self, loop: Loop) -> None:
        """From the next episode on."""
        loop.check(self._horizon, self._evaluation.robot)
        self._loop = loop
        join = loop.join
        self._set(denoising_steps=loop.num_steps, chunk_mode=join.mode, guidance_schedule=join.schedule,
                  guidance_beta=join.beta, guidance_jacobian=join.jacobian, guidance_horizon=join.horizon,
                  ensemble_coefficient=join.ensemble_coefficient)
        self.node.settings = replace(
            self.node.settings, sensor_delay_s=loop.delay * self._period_ns * 1e-9,
            image_rate_hz=1e9 / self._period_ns / loop.execute)

    def play(self, seed: int, task: Task) -> Run:
        """One episode to its end."""
        node, told = self.node, self._evaluation.ablation.told(task)
        self._set(prompt=told, seed=seed)
        node.still(2 * COMMAND.max_committed_s)  # nothing runs any more that the reset would hold
        self._answer(self._reset.call_async(Trigger.Request()), "~/reset")
        node.begin(seed, task)
        run = Run(node.world, seed, task, told, commands=[node.world.command])
        begun_ns = node.timeline.now_ns
        while run.outcome == "running" and run.steps < self._loop.limit:
            self._go_to(begun_ns + (run.steps + 1) * self._period_ns)
            if node.frames and (not run.frames or run.frames[-1] is not node.frames["base_0_rgb"]):
                run.frames.append(node.frames["base_0_rgb"])
            run.stepped(node.outcome)
        return run

    def _until_it_answers(self) -> None:
        """Both ends have met: a first chunk came back, whatever it says."""
        for seed in range(30):
            self.node.still(self._period_ns * 1e-9)
            self.node.begin(seed)
            self.node.run_to(self.node.timeline.now_ns + self._period_ns)
            until_s = time.monotonic() + 4.0
            while self.node.waiting and time.monotonic() < until_s:
                self._executor.spin_once(timeout_sec=0.02)
                self._check()
            if self.node.answered is not None and not self.node.waiting:
                (shape,) = (p.value for p in self.node.answered.status[0].values if p.key == "actions_shape")
                self._horizon, self.node.answered = int(shape.partition("x")[0]), None
                self.node.counts.clear()
                return
        raise WorkerError("policy node", expected="a trajectory for a set of images", received="none",
                          way_out="Look at its log above.")

    def _go_to(self, time_ns: int) -> None:
        while not self.node.run_to(time_ns):
            self._executor.spin_once(timeout_sec=0.02)
            self._check()
            self._look_at_answer()

    def _look_at_answer(self) -> None:
        if self.node.answered is None:
            return
        said = {pair.key: pair.value for pair in self.node.answered.status[0].values}
        self.node.answered = None
        age_ns = int(said["planned_ns"]) - int(said["observation_stamp_ns"])
        self.moments.chunks += 1
        self.moments.off_time += abs(age_ns - self._loop.delay * self._period_ns) > EXACT_S * 1e9

    def _set(self, **values: Any) -> None:
        given = [Parameter(name, value=value) for name, value in values.items()]
        answer = self._answer(self._parameters.set_parameters_atomically(given), "set_parameters_atomically")
        if not answer.result.successful:
            raise ConfigError("policy node", expected="to take " + ", ".join(values), received=answer.result.reason,
                              way_out="Correct the option.")

    def _answer(self, future: Future, what: str) -> Any:
        until_s = time.monotonic() + ANSWER_S
        while not future.done() and time.monotonic() < until_s:
            self._executor.spin_until_future_complete(future, 0.5)
            self._check()
        if not future.done():
            raise WorkerError(f"policy node, {what}", expected=f"an answer within {ANSWER_S} s", received="none",
                              way_out="Look at its log above.")
        return future.result()

    def _check(self) -> None:
        if self._process.poll() is not None or self.node.counts["unanswered"]:
            raise WorkerError("policy node", expected="to answer every set of images", received=
                              f"no answer in {ANSWER_S} s, or its end (status {self._process.poll()})",
                              way_out="Look at its log above.")


def run_over_ros(evaluation: Evaluation, tasks: dict[int, Task],
                 on_progress: Progress | None = None) -> tuple[Played, Moments]:
    """As `evaluation.run_all`, one episode at a time.

    Raises:
        ConfigError: a loop that does not fit the horizon; a setting that the node refuses.
        WorkerError: the node ended, or does not answer.
    """
    world = TabletopWorld()
    trials: list[list[Trial]] = [evaluate_expert(world, tasks)]
    rows: list[Row] = []
    with PolicyUnderTest(evaluation) as under_test:
        for loop in evaluation.loops:
            under_test.use(loop)
            rows.clear()
            trials.append([])
            for seed, task in tasks.items():
                run = under_test.play(seed, task)
                trials[-1].append(run.trial())
                if len(rows) < FILMED and evaluation.film:
                    rows.append((caption(run), run.frames))
                if on_progress:
                    on_progress(len(tasks) * (len(trials) - 2) + len(trials[-1]), len(tasks) * len(evaluation.loops))
        return (trials, rows), under_test.moments
