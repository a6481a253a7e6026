"""Loading the policy: minutes at full size, so it tells how far it is and can be interrupted."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pi05_ros.errors import WorkerError
from pi05_ros.runtime.device_faults import named
from pi05_ros.runtime.gpu_sensors import Sensors
from pi05_ros.runtime.policy import Policy
from pi05_ros.runtime.sequential import ChunkPipeline
from pi05_ros.runtime.streams import release_memory
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
        release_memory()
        return Loaded(policy, policy.pipeline(values["overlap"]), policy.sensors())
    except Exception as error:  # whatever it was, the memory goes back first; raised again, so the transition logs it
        fault = named(error)
        forget_frames(error)
        with suppress(RuntimeError):  # a CUDA context that is lost gives nothing back
            release_memory()
        if fault is error:
            raise
        raise fault from error


def forget_frames(error: BaseException | None) -> None:
    """Whoever keeps the error would keep what was half loaded: the frames of its traceback hold it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


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
