"""The lifecycle node `pi05_policy`: wires inputs, worker and outputs together, and keeps the robot safe.

Threads: the worker's thread computes and leaves finished chunks in an outbox; all else here runs on the executor's
thread. Chunks are planned and published there, where activations end too, so that nothing of an old activation can
follow its hold.
"""

from __future__ import annotations

import itertools
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger

from pi05_ros.errors import ObservationError, Pi05Error, WorkerError
from pi05_ros.ros import parameters
from pi05_ros.ros.commands import Commands
from pi05_ros.ros.conversions import image_decoder
from pi05_ros.ros.diagnostics import Diagnostics
from pi05_ros.ros.loading import load, wait
from pi05_ros.ros.subscriptions import TOPICS, Subscriptions, assembler, without_cameras
from pi05_ros.ros.supervised_node import SupervisedNode
from pi05_ros.runtime.chunking import NON_FINITE, JointLimits, JointMeasurement, plan_chunk, plan_hold
from pi05_ros.runtime.inference_loop import Delivery, InferenceLoop
from pi05_ros.runtime.mailbox import Mailbox, age_s
from pi05_ros.runtime.policy import Policy
from pi05_ros.runtime.worker import Worker
from pi05_ros.schema import CAMERAS
from pi05_ros.transforms.robot_loader import load_robot

WATCHDOG_PERIOD_S = 0.05
STOP_WORKER_S = 30.0


@dataclass(frozen=True)
class Parts:
    """What exists between configure and cleanup."""

    policy: Policy
    limits: JointLimits
    worker: Worker
    mailbox: Mailbox
    loop: InferenceLoop
    commands: Commands
    inputs: Subscriptions


class PolicyNode(SupervisedNode):
    """README ("On a robot") lists its topics and parameters.

    Args:
        load_policy: makes the policy, on the worker's thread; `Policy.load` unless a test says otherwise.
    """

    def __init__(self, load_policy: Callable[..., Policy] = Policy.load, **kwargs: Any) -> None:
        super().__init__("pi05_policy", **kwargs)
        self._load_policy = load_policy
        self.stop_requested = False
        self.parts: Parts | None = None
        self._undo_configure = ExitStack()
        self._outbox: deque[Delivery | tuple[int, Exception]] = deque()
        self._epochs = itertools.count(1)  # never the same twice, whatever is cleaned up and configured in between
        self._epoch: int | None = None  # of the running activation
        self._held = False
        self._useful_ns = 0  # when the robot last got a chunk, or was activated
        self._now_seen_ns = 0
        parameters.declare(self)
        self._values = parameters.snapshot(self)
        self.add_on_set_parameters_callback(self._check_parameters)
        self.add_post_set_parameters_callback(self._take_parameters)
        self.diagnostics = Diagnostics(self)
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # a simulation that stands still must not stop the watchdog
        self.create_timer(WATCHDOG_PERIOD_S, self._watch, clock=steady)
        self.create_timer(1.0, self._diagnose, clock=steady)
        self.create_service(Trigger, "~/reset", self._on_reset)

    # ------------------------------------------------------------------ lifecycle

    def configure(self) -> None:
        values = self._values = parameters.snapshot(self)
        parameters.check(values)
        robot = without_cameras(load_robot(values["robot"]), values["absent_cameras"])
        limits, stop, compressed = JointLimits(robot), lambda: self.stop_requested, values["compressed_images"]
        with ExitStack() as undo:  # undoes what was made if a later step fails
            pool = undo.enter_context(ThreadPoolExecutor(len(CAMERAS), "pi05_decode"))  # its threads start when used
            worker = Worker()
            undo.callback(self._stop_worker, worker)
            policy, pipeline = wait(worker.call(lambda: load(
                self._load_policy, robot, values, self.get_logger().info, stop)), stop)
            decode, decoder = image_decoder()
            required = tuple(camera for camera, spec in robot.cameras.items() if spec.required)
            optional = tuple(camera for camera in robot.cameras if camera not in required)
            mailbox = Mailbox(required, optional, worker.wake, parameters.input_limits(values))
            loop = InferenceLoop(
                pipeline, robot.control_period_s, mailbox, assembler(decode, pool if compressed else None),
                lambda: parameters.loop_settings(
                    self._values, robot.default_prompt), self._now_ns, self._hand_over, self._hand_over)
            undo.callback(worker.call, loop.forget_policy)
            commands = Commands(self, robot)
            undo.callback(commands.destroy)
            inputs = Subscriptions(self, robot, (*required, *optional), mailbox, values["reliable_images"],
                                   compressed, self.diagnostics.refuse, self._on_prompt)
            undo.callback(inputs.destroy)
            worker.repeat(loop.due, loop.step)
            self.parts = Parts(policy, limits, worker, mailbox, loop, commands, inputs)
            self._undo_configure = undo.pop_all()
        self.get_logger().info(f"configured: robot '{robot.name}', {policy.summary()}, images by {decoder}")

    def activate(self) -> None:
        assert self.parts is not None
        if not self.parts.worker.alive:
            raise WorkerError("worker", expected="to be running", received="a thread that ended",
                              way_out="Clean up and configure again.")
        self._open_gate(self.parts)

    def deactivate(self) -> None:
        if self.parts is None or self._epoch is None:
            return
        self.parts.loop.close()
        self._epoch = None
        self._hold(self.parts, "deactivated")

    def teardown(self) -> None:
        """Take the topics away, free the model on its thread, end the thread."""
        self._epoch = self.parts = None
        self._undo_configure.close()
        self._outbox.clear()

    def _open_gate(self, parts: Parts) -> None:
        self._epoch, self._held, self._useful_ns = next(self._epochs), False, self._now_ns()
        parts.loop.open(self._epoch)
        parts.worker.wake()

    def _stop_worker(self, worker: Worker) -> None:
        if not worker.stop(STOP_WORKER_S):
            raise WorkerError("worker", expected=f"to end within {STOP_WORKER_S} s", received="no sign of it",
                              way_out="It still holds its memory; restart the process.")

    # ------------------------------------------------------------------ worker's thread

    def _hand_over(self, item: Delivery | tuple[int, Exception]) -> None:
        self._outbox.append(item)
        if self.executor is not None:  # a task, because EventsExecutor knows no guard conditions
            self.executor.create_task(self._empty_outbox)

    # ------------------------------------------------------------------ executor's thread

    def _empty_outbox(self) -> None:
        while self._outbox:
            item = self._outbox.popleft()
            epoch = item.epoch if isinstance(item, Delivery) else item[0]
            if self.parts is None or epoch != self._epoch:  # its activation has ended: nothing may follow the hold
                if not isinstance(item, Delivery) and not isinstance(item[1], ObservationError):
                    self.get_logger().error(f"inference of an ended activation failed: {item[1]}")
                continue
            try:
                if isinstance(item, Delivery):
                    self._publish(self.parts, item)
                else:
                    self._on_failure(self.parts, item[1])
            except ObservationError as error:
                self._on_failure(self.parts, error)
            except Exception:  # the executor must live; what broke is in the log and the robot is held
                self.get_logger().error(f"publishing failed:\n{traceback.format_exc()}")
                self._hold(self.parts, "publishing failed")

    def _publish(self, parts: Parts, delivery: Delivery) -> None:
        now_ns = self._now_ns()
        causes = parts.mailbox.missing(now_ns, self._values["input_timeout_s"])
        measured = self._measured(parts, now_ns)
        if measured is None or causes:  # the inputs fell silent while the worker was busy
            raise ObservationError("chunk", expected="inputs that still arrive when it is published",
                                   received=", ".join(f"{slot}: {why}" for slot, why in causes.items()) or "old joints",
                                   way_out="Check the inputs named.", cause="silent at publication")
        plan = plan_chunk(delivery.chunk, parts.limits, measured, now_ns, parameters.command_limits(self._values),
                          parts.commands.last)
        parts.commands.publish(plan)
        parts.commands.publish_provenance(delivery, now_ns, measured.stamp_ns, plan)
        self._held, self._useful_ns = False, now_ns
        self.diagnostics.published(delivery, now_ns)

    def _on_failure(self, parts: Parts, error: Exception) -> None:
        """Bad input is counted, and holds the robot if it lasts; numbers that are not finite hold it at once; anything
        else deactivates the node."""
        if isinstance(error, ObservationError):
            self.diagnostics.refuse(error)
            starved = self._now_ns() - self._useful_ns > self._values["input_timeout_s"] * 1e9
            if not self._held and (starved or error.cause in (NON_FINITE, "non-finite actions")):
                self._hold(parts, error.cause)
            return
        notes = "\n".join(getattr(error, "__notes__", []))
        self.get_logger().error(f"inference failed: {error}\n{notes}\nThe robot is held and the node deactivated; "
                                "activate to try again, or clean up and configure.")
        self.diagnostics.refuse(error if isinstance(error, Pi05Error) else WorkerError(
            "inference", expected="a chunk", received=f"{type(error).__name__}: {error}", cause="inference failed",
            way_out="See the log; activate to try again, or clean up and configure."))
        self.trigger_deactivate()

    def _watch(self) -> None:
        """Hold the robot when a required input falls silent; deactivate if the worker's thread is gone."""
        now_ns, timeout = self._now_ns(), self._values["input_timeout_s"]
        if self.parts is None or self._epoch is None:
            return
        if now_ns < self._now_seen_ns:  # the clock was set back: a simulation began anew
            self.parts.mailbox.clear()
            self.parts.commands.last = None  # its times mean nothing now: nothing may join it
            self._useful_ns = now_ns
        self._now_seen_ns = now_ns
        if not self.parts.worker.alive:
            self._on_failure(self.parts, WorkerError(
                "worker", expected="to be running", received=f"a thread that ended: {self.parts.worker.failure!r}",
                way_out="Clean up and configure again."))
            return
        if now_ns - self._useful_ns < timeout * 1e9:
            return
        causes = self.parts.mailbox.missing(now_ns, timeout)
        for slot, cause in causes.items():
            self.diagnostics.refuse(ObservationError(
                f"~/{TOPICS.get(slot, 'joint_states')}", expected=f"a usable message at least every {timeout} s",
                received=cause, cause=f"unusable {slot}", way_out=
                "Check the publisher, its clock and QoS, and the remapping; the robot is held meanwhile."))
        if causes and not self._held:
            self._hold(self.parts, "inputs are silent")

    def _hold(self, parts: Parts, why: str) -> None:
        """Bring the robot to rest where it is. Nothing is published if nothing that we commanded is still running."""
        self._held = True
        now_ns, running = self._now_ns(), parts.commands.last
        if running is None or running.end_ns <= now_ns:
            return
        parts.commands.publish(plan_hold(running, self._measured(parts, now_ns), now_ns, parts.limits,
                                         self._values["stop_time_s"]))
        self.get_logger().info(f"hold: {why}")

    def _measured(self, parts: Parts, now_ns: int) -> JointMeasurement | None:
        """The joints as measured last, unless that was too long ago."""
        latest = parts.mailbox.latest(Mailbox.STATE)
        fresh = latest is not None and age_s(latest, now_ns) <= self._values["max_input_age_s"]
        return latest.value if latest is not None and fresh else None

    def _diagnose(self) -> None:
        dropped = self.parts.mailbox.dropped if self.parts is not None else {}
        shown = {name: self._values[name] for name in ("denoising_steps", "execution_horizon", "prompt")}
        self.diagnostics.publish(self.state_label, self._held, dropped, shown)

    def _now_ns(self) -> int:
        return self.get_clock().now().nanoseconds

    # ------------------------------------------------------------------ parameters, prompt, reset

    def _check_parameters(self, changed: list[Parameter]) -> SetParametersResult:
        return parameters.refuse(changed, configured=self.parts is not None, current=self._values)

    def _take_parameters(self, changed: list[Parameter]) -> None:
        known = {p.name: p.value for p in changed if p.name in parameters.SPECS}
        self._values = {**self._values, **known}  # replaced whole: the worker reads one version
        if self.parts is not None:
            self.parts.mailbox.limits = parameters.input_limits(self._values)
            self.parts.worker.wake()

    def _on_prompt(self, text: str) -> None:
        (answer,) = self.set_parameters([Parameter("prompt", value=text)])
        if not answer.successful:
            self.get_logger().error(f"~/prompt was refused: {answer.reason}")

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Hold, forget inputs, chunk counter and the chunk in the making; go on from the next complete set."""
        if self.parts is None or self._epoch is None:
            response.success, response.message = False, f"expected state active, received {self.state_label}"
            return response
        self._hold(self.parts, "reset")
        self._open_gate(self.parts)
        response.success, response.message = True, "waiting for the next complete set of inputs"
        return response
