"""The lifecycle node `pi05_policy`: wires inputs, worker and outputs together, and keeps the robot safe.

Threads: the worker's thread computes and leaves finished chunks in an outbox; all else here runs on the executor's
thread. Chunks are planned and published there, where activations end too, so that nothing of an old activation can
follow its hold.
"""

from __future__ import annotations

import itertools
import traceback
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger

from pi05_ros.errors import ObservationError, Pi05Error, WorkerError
from pi05_ros.ros import parameters
from pi05_ros.ros.clock import now_ns
from pi05_ros.ros.diagnostics import Diagnostics
from pi05_ros.ros.parts import Finished, Hooks, Parts, build
from pi05_ros.ros.subscriptions import TOPICS
from pi05_ros.ros.supervised_node import SupervisedNode
from pi05_ros.runtime.chunking import NON_FINITE
from pi05_ros.runtime.inference_loop import Delivery
from pi05_ros.runtime.policy import Policy
from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.runtime.worker import Worker

WATCHDOG_PERIOD_S = 0.05


class PolicyNode(SupervisedNode):
    """README ("On a robot") lists its topics and parameters.

    Args:
        load_policy: makes the policy, on the worker's thread; `Policy.load` unless a test says otherwise.
        make_worker: likewise the worker; a soak's has no thread.
    """

    def __init__(self, load_policy: Callable[..., Policy] = Policy.load, make_worker: Callable[[], Worker] = Worker,
                 **kwargs: Any) -> None:
        super().__init__("pi05_policy", **kwargs)
        self._load_policy, self._make_worker = load_policy, make_worker
        self.stop_requested = False
        self.parts: Parts | None = None
        self._undo_configure = ExitStack()
        self._outbox: deque[Finished] = deque()
        self._epochs = itertools.count(1)  # never the same twice, whatever is cleaned up and configured in between
        self._epoch: int | None = None  # of the running activation
        self._fault = ""  # why the node deactivated itself; until it is activated or cleaned up
        self._useful_ns = 0  # when the robot last got a chunk, or was activated
        self._now_seen_ns = 0
        parameters.declare(self)
        self._values = parameters.snapshot(self)
        self.add_on_set_parameters_callback(self._check_parameters)
        self.add_post_set_parameters_callback(self._take_parameters)
        self._left: tuple[list[str], JointTrajectoryPlan | None] = ([], None)  # by the last configuration: joints, plan
        self.diagnostics = Diagnostics(self)
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # a simulation that stands still must not stop the watchdog
        self.create_timer(WATCHDOG_PERIOD_S, self._watch, clock=steady)
        self.create_timer(1.0, self._diagnose, clock=steady)
        self.create_service(Trigger, "~/reset", self._on_reset)

    # ------------------------------------------------------------------ lifecycle

    def configure(self) -> None:
        self._values = parameters.snapshot(self)
        parameters.check(self._values)
        hooks = Hooks(lambda: self._values, self._now_ns, lambda: self.stop_requested, self._hand_over, self._soon,
                      self.diagnostics.refuse, self._on_prompt, self._make_worker)
        with ExitStack() as undo:  # undoes what was made if a later step fails
            self.parts = build(self, self._load_policy, hooks, undo)
            self._undo_configure = undo.pop_all()
        self.parts.motion.resume(*self._left)

    def activate(self) -> None:
        assert self.parts is not None
        if not self.parts.worker.alive or self.parts.loop.busy_s() > self._values["worker_timeout_s"]:
            raise WorkerError("worker", expected="to be running", received="a thread that ended or does not answer",
                              way_out="Clean up and configure again.")
        self._open_gate(self.parts)
        self._fault = ""

    def deactivate(self) -> None:
        if self.parts is None or self._epoch is None:
            return
        self.parts.loop.close()
        self._epoch = None
        if self._fault:
            self.parts.motion.on_fault(self._fault)
        else:
            self.parts.motion.hold("deactivated")

    def teardown(self) -> None:
        """Take the topics away, free the model on its thread, end the thread."""
        parts, self._epoch, self.parts = self.parts, None, None
        self._fault = ""
        self._undo_configure.close()
        self._empty_outbox()
        if parts is not None:
            self._left = parts.motion.joints, parts.commands.last
            parts.mailbox.clear()
            self.diagnostics.counted += parts.counts()

    def _open_gate(self, parts: Parts) -> None:
        self._epoch, self._useful_ns = next(self._epochs), self._now_ns()
        self.diagnostics.counted["activations"] += 1
        parts.motion.begin()
        parts.loop.open(self._epoch)
        parts.worker.wake()

    # ------------------------------------------------------------------ worker's thread

    def _hand_over(self, item: Finished) -> None:
        self._outbox.append(item)
        if self.executor is not None:  # a task, because EventsExecutor knows no guard conditions
            self.executor.create_task(self._empty_outbox)

    def _soon(self) -> None:
        if self.executor is not None:
            self.executor.create_task(self._rehearse)

    # ------------------------------------------------------------------ executor's thread

    def _rehearse(self) -> None:
        if self.parts is None or self._epoch is None:
            return
        try:
            self.parts.motion.rehearse()
        except Exception:  # the executor must live: nothing depends on a rehearsal, and publishing says what is wrong
            self.parts.policy.soon = None
            self.get_logger().error(f"planning is not rehearsed until the node is configured again:\n"
                                    f"{traceback.format_exc()}")

    def _empty_outbox(self) -> None:
        while self._outbox:
            item = self._outbox.popleft()
            epoch = item.epoch if isinstance(item, Delivery) else item[0]
            if self.parts is None or epoch != self._epoch:  # its activation has ended: nothing may follow the hold
                if isinstance(item, Delivery):
                    self.diagnostics.counted["dropped.activation ended"] += 1
                else:
                    self._refuse(item[1])
                continue
            try:
                if isinstance(item, Delivery):
                    self._check_clock(self.parts, self._now_ns())  # a chunk must not join what ran in another time
                    self._useful_ns = self.parts.motion.publish(item)
                    self.diagnostics.published(item, self._useful_ns, self._values["latency_budget_s"])
                else:
                    self._on_failure(self.parts, item[1])
            except ObservationError as error:
                self._on_failure(self.parts, error)
            except Exception:  # the executor must live; what broke is in the log and the robot is held
                self.get_logger().error(f"publishing failed:\n{traceback.format_exc()}")
                self.diagnostics.refused["publishing failed"] += 1
                self._stop_robot(self.parts, "publishing failed")

    def _stop_robot(self, parts: Parts, why: str) -> None:
        """What `on_fault` says. A controller that cannot be told is logged; the watchdog tries again."""
        try:
            parts.motion.on_fault(why)
        except Exception:  # the executor must live to try again; `held` stays False until it worked
            self.get_logger().error(f"the robot could not be held ({why}):\n{traceback.format_exc()}")

    def _on_failure(self, parts: Parts, error: Exception) -> None:
        """Bad input is counted, and a fault if it lasts; numbers that are not finite are one at once; anything else
        deactivates the node."""
        if isinstance(error, ObservationError):
            self.diagnostics.refuse(error)
            starved = self._now_ns() - self._useful_ns > self._values["input_timeout_s"] * 1e9
            if not parts.motion.held and (starved or error.cause in (NON_FINITE, "non-finite actions")):
                self._stop_robot(parts, error.cause)
            return
        notes = "\n".join(getattr(error, "__notes__", []))
        self.get_logger().error(f"inference failed: {error}\n{notes}\nThe node is deactivated; activate to try again, "
                                "or clean up and configure.")
        self._refuse(error)
        self._fault = str(error)
        self.trigger_deactivate()

    def _refuse(self, error: Exception) -> None:
        self.diagnostics.refuse(error if isinstance(error, Pi05Error) else WorkerError(
            "inference", expected="a chunk", received=f"{type(error).__name__}: {error}", cause="inference failed",
            way_out="See the log; activate to try again, or clean up and configure."))

    def _watch(self) -> None:
        """Silent inputs stop the robot; a worker that is gone or does not answer deactivates the node."""
        now_ns, timeout = self._now_ns(), self._values["input_timeout_s"]
        if self.parts is None or self._epoch is None:
            return
        self._check_clock(self.parts, now_ns)
        if (silence := self._worker_silence(self.parts)) is not None:
            self._on_failure(self.parts, silence)
            return
        if now_ns - self._useful_ns < timeout * 1e9:
            return
        causes = self.parts.mailbox.missing(now_ns, timeout)
        for slot, cause in causes.items():
            self.diagnostics.refuse(ObservationError(
                f"~/{TOPICS.get(slot, 'joint_states')}", expected=f"a usable message at least every {timeout} s",
                received=cause, cause=f"unusable {slot}", way_out=
                "Check the publisher, its clock and QoS, and the remapping; the robot is held meanwhile."))
        if causes and not self.parts.motion.held:
            self._stop_robot(self.parts, "inputs are silent")

    def _check_clock(self, parts: Parts, now_ns: int) -> None:
        """Where the clock was set back, a simulation began anew: inputs and the running trajectory are forgotten."""
        if now_ns < self._now_seen_ns:
            self.diagnostics.counted["clock set back"] += 1
            parts.mailbox.clear()
            parts.motion.clock_set_back(self._now_seen_ns, now_ns)
            self._useful_ns = now_ns
        self._now_seen_ns = now_ns

    def _worker_silence(self, parts: Parts) -> WorkerError | None:
        if not parts.worker.alive:
            return WorkerError("worker", expected="to be running", received="a thread that ended: "
                               f"{parts.worker.failure!r}", way_out="Clean up and configure again.")
        limit_s = self._values["worker_timeout_s"]
        if (busy_s := parts.loop.busy_s()) > limit_s:
            return WorkerError("worker", expected=f"a chunk within worker_timeout_s = {limit_s} s",
                               received=f"none after {busy_s:.2f} s", cause="worker stuck",
                               way_out="Look at the GPU (nvidia-smi), then clean up and configure, or restart.")
        return None

    def _diagnose(self) -> None:
        shown = {name: self._values[name] for name in ("denoising_steps", "execution_horizon", "prompt")}
        if self.parts is not None:
            self.parts.inputs.ask()
            self.parts.commands.ask()
            shown |= self.parts.report(self._now_ns())
        counted = Counter() if self.parts is None else self.parts.counts()
        self.diagnostics.publish(self.state_label, self._fault, shown, counted)

    def _now_ns(self) -> int:
        return now_ns(self.get_clock())

    # ------------------------------------------------------------------ parameters, prompt, reset

    def set_parameters(self, parameter_list: list[Parameter]) -> list[SetParametersResult]:
        return self._counted(super().set_parameters(parameter_list))

    def set_parameters_atomically(self, parameter_list: list[Parameter]) -> SetParametersResult:
        return self._counted([super().set_parameters_atomically(parameter_list)])[0]

    def _counted(self, answers: list[SetParametersResult]) -> list[SetParametersResult]:
        for answer in answers:
            if not answer.successful:
                self.diagnostics.refused["parameter"] += 1
        return answers

    def _check_parameters(self, changed: list[Parameter]) -> SetParametersResult:
        if self.parts is None:
            return parameters.refuse(changed, False, self._values)
        policy = self.parts.policy
        return parameters.refuse(changed, True, self._values, policy.robot.control_period_s,
                                 policy.rtc_training_max_delay)

    def _take_parameters(self, changed: list[Parameter]) -> None:
        known = {p.name: p.value for p in changed if p.name in parameters.SPECS}
        self._values = {**self._values, **known}  # replaced whole: the worker reads one version
        if self.parts is not None:
            self.parts.policy.seed = self._values["seed"]  # the worker reads it once a chunk, when it begins
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
        self.parts.motion.hold("reset")
        self._open_gate(self.parts)
        response.success, response.message = True, "waiting for the next complete set of inputs"
        return response
