"""What exists between configure and cleanup, and how it is built and taken away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.node import Node

from pi05_ros.errors import Pi05Error, WorkerError
from pi05_ros.ros import parameters
from pi05_ros.ros.commands import Commands
from pi05_ros.ros.conversions import image_decoder
from pi05_ros.ros.loading import load, wait
from pi05_ros.ros.motion import Motion
from pi05_ros.ros.subscriptions import Subscriptions, assembler, without_cameras
from pi05_ros.runtime.chunking import JointLimits
from pi05_ros.runtime.gpu_sensors import Sensors
from pi05_ros.runtime.inference_loop import Delivery, InferenceLoop
from pi05_ros.runtime.joining import Joining, inference_delay
from pi05_ros.runtime.mailbox import Mailbox
from pi05_ros.runtime.policy import Policy
from pi05_ros.runtime.worker import Worker
from pi05_ros.schema import CAMERAS
from pi05_ros.transforms.robot_loader import load_robot

STOP_WORKER_S = 30.0
Finished = Delivery | tuple[int, Exception]  # what the worker hands over


@dataclass(frozen=True)
class Parts:
    """One configuration of the node."""

    policy: Policy
    sensors: Sensors
    worker: Worker
    mailbox: Mailbox
    loop: InferenceLoop
    joining: Joining
    commands: Commands
    motion: Motion
    inputs: Subscriptions

    def report(self, now_ns: int) -> dict[str, object]:
        """For /diagnostics: the delay to expect, in seconds and control steps; ages of the inputs; the GPU."""
        delay_s = self.joining.delay.seconds
        steps = None if delay_s is None else inference_delay(delay_s, self.policy.robot.control_period_s)
        return {
            "held": self.motion.held,
            "deadline_misses": self.motion.deadline_misses,
            "inference_delay_s": "unknown" if delay_s is None else f"{delay_s:.4f}",
            "inference_delay": "unknown" if steps is None else steps,
            **{f"age_s.{slot}": f"{age:.4f}" for slot, age in self.mailbox.ages_s(now_ns).items()},
            **self.sensors(),
        }

    def counts(self) -> Counter[str]:
        """Messages received and (on the way) lost, by topic; inputs taken and dropped, by slot and cause."""
        counted = {"received": self.inputs.received, "lost": self.inputs.lost, "taken": self.mailbox.taken,
                   "dropped": self.mailbox.dropped + self.loop.dropped.copy()}  # copied: the worker may add a cause
        return Counter({f"{what}.{which}": n for what, by in counted.items() for which, n in by.copy().items()})


@dataclass(frozen=True)
class Hooks:
    """Of the node. `hand_over` and `soon` are called on the worker's thread, the others on the executor's."""

    values: Callable[[], dict[str, Any]]
    now_ns: Callable[[], int]
    stop: Callable[[], bool]
    hand_over: Callable[[Finished], None]
    soon: Callable[[], None]
    refuse: Callable[[Pi05Error], None]
    on_prompt: Callable[[str], None]
    make_worker: Callable[[], Worker] = Worker


def build(node: Node, load_policy: Callable[..., Policy], hooks: Hooks, undo: ExitStack) -> Parts:
    """All parts, in order; `undo` takes them away in reverse, also after half of them.

    Raises:
        Pi05Error: a parameter, robot file, checkpoint, backend or GPU that does not do.
    """
    values, log = hooks.values(), node.get_logger().info
    robot = without_cameras(load_robot(values["robot"]), values["absent_cameras"])
    parameters.check(values, robot.control_period_s)
    limits = JointLimits(robot)
    pool = undo.enter_context(ThreadPoolExecutor(len(CAMERAS), "pi05_decode"))  # its threads start when it is used
    worker = hooks.make_worker()
    undo.callback(_stop, worker)
    loaded = wait(worker.call(lambda: load(load_policy, robot, values, log, hooks.stop)), hooks.stop)
    max_delay = loaded.policy.rtc_training_max_delay
    parameters.check(values, robot.control_period_s, max_delay)
    decode, decoder = image_decoder()
    required = tuple(camera for camera, spec in robot.cameras.items() if spec.required)
    optional = tuple(camera for camera in robot.cameras if camera not in required)
    mailbox = Mailbox(required, optional, worker.wake, parameters.input_limits(values))
    assemble = assembler(decode, pool if values["compressed_images"] else None)
    joining = Joining(loaded.policy.transforms.encode_actions, max_delay)
    loop = InferenceLoop(loaded.pipeline, robot.control_period_s, mailbox, assemble,
                         lambda: parameters.loop_settings(hooks.values(), robot.default_prompt), hooks.now_ns,
                         hooks.hand_over, hooks.hand_over, joining)
    undo.callback(worker.call, loop.forget_policy)
    group = MutuallyExclusiveCallbackGroup()  # of its own: the node's never forgets what was destroyed (rclpy 7.1.6)
    commands = Commands(node, robot, limits, group)
    undo.callback(commands.destroy)
    inputs = Subscriptions(node, group, robot, (*required, *optional), mailbox, values["reliable_images"],
                           values["compressed_images"], loaded.policy.frame_memory, hooks.refuse, hooks.on_prompt)
    undo.callback(inputs.destroy)
    loaded.policy.soon = hooks.soon
    worker.repeat(loop.due, loop.step)
    log(f"configured: robot '{robot.name}', {loaded.policy.summary()}, images by {decoder}")
    return Parts(loaded.policy, loaded.sensors, worker, mailbox, loop, joining, commands,
                 Motion(limits, mailbox, commands, joining, hooks.now_ns, hooks.values, log), inputs)


def _stop(worker: Worker) -> None:
    if not worker.stop(STOP_WORKER_S):
        raise WorkerError("worker", expected=f"to end within {STOP_WORKER_S} s", received="no sign of it",
                          way_out="It still holds its memory; restart the process.")
