"""Loading the policy: minutes at full size, so it tells how far it is and can be interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import Any, TypeVar

from pi05_ros.errors import WorkerError
from pi05_ros.runtime.device_faults import named
from pi05_ros.runtime.gpu_sensors import Sensors
from pi05_ros.runtime.policy import Policy
from pi05_ros.runtime.sequential import ChunkPipeline
from pi05_ros.transforms.robot_file import Robot

SAY_EVERY_S = 2.0
Result = TypeVar("Result")


@dataclass(frozen=True)
class Loaded:
    """A policy, how its chunks follow each other, and its GPU's sensors."""

    policy: Policy
    pipeline: ChunkPipeline
    sensors: Sensors


def load(make: Callable[..., Policy], robot: Robot, values: dict[str, Any], say: Callable[[str], object],
         stop: Callable[[], bool]) -> Loaded:
    """Make the policy and what belongs to it from the node's parameter `values`, on the worker's thread.

    Raises:
        WorkerError: `stop` became true on the way.
        ConfigError, CheckpointError, BackendError: as `Policy.load`.
        WorkerError: the GPU failed, or has too little memory.
    """
    said_s = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal said_s
        if stop():
            raise interrupted()
        if time.monotonic() - said_s > SAY_EVERY_S:
            said_s = time.monotonic()
            say(f"loading weights: {100 * done // total} %")

    try:
        policy = make(checkpoint=values["checkpoint"] or None, robot=robot, backend=values["backend"],
                      device=values["device"], dtype=values["dtype"], seed=values["seed"],
                      tokenizer=values["tokenizer"] or None, action_horizon=values["action_horizon"] or None,
                      rope_inv_freq=values["rope_inv_freq"], prompt_format=values["prompt_format"] or None,
                      size=values["size"], on_progress=on_progress)
        return Loaded(policy, policy.pipeline(values["overlap"]), policy.sensors())
    except Exception as error:
        raise named(error) from error


def wait(future: Future[Result], stop: Callable[[], bool]) -> Result:
    """What was loaded, for the executor's thread, which holds no lock meanwhile; WorkerError if `stop` is asked."""
    while True:
        try:
            return future.result(timeout=0.2)
        except NotYet:
            if stop():
                raise interrupted() from None


def interrupted() -> WorkerError:
    return WorkerError("configure", expected="time to load", received="a request to stop", way_out="Start again.")
