"""A policy that the test controls, in place of `Policy`."""

from __future__ import annotations

import threading

import numpy as np
from robot_stand_in import PATIENCE_S

from pi05_ros.runtime.sequential import Sequential
from pi05_ros.schema import ActionChunk


class FakePolicy:
    """Wants every joint at its present position plus 0.01; records observations; may fail or wait."""

    def __init__(self, robot):
        self.robot, self.seen, self.error, self.gate, self.wanted = robot, [], None, None, 0.01
        self.entered = threading.Semaphore(0)
        self.slope = 0.0  # by which each action goes on from the one before
        self.transforms, self.guidance, self.rtc_training_max_delay = self, [], 0

    def encode_actions(self, actions, state):
        return np.pad(actions - state, ((0, 0), (0, 32 - actions.shape[1]))).astype(np.float32)

    def summary(self):
        return "fake"

    def pipeline(self, overlap):
        return Sequential(self)

    def frame_memory(self, size):
        return np.empty(size, np.uint8)

    def sensors(self):
        return lambda: {"gpu_temperature_c": 40}

    def infer(self, observation, num_steps, *, chunk_index, guidance=None):
        self.seen.append(observation)
        self.guidance.append(guidance)
        self.entered.release()
        if self.gate is not None:
            assert self.gate.acquire(timeout=PATIENCE_S)
        if self.error is not None:
            raise self.error
        actions = (observation.state + self.wanted + self.slope * np.arange(500)[:, None]).astype(np.float32)
        return ActionChunk(actions, np.zeros((500, 32), np.float32), observation.stamp_ns, 0.02, observation.prompt,
                           num_steps, 0, chunk_index, stage_times_ms={"total": 1.0}, guidance=guidance)
