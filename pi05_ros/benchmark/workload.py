"""Model inputs behind the interface of a policy: to measure how chunks follow each other, without a robot."""

from __future__ import annotations

import numpy as np

from pi05_ros.backends.base import StageSet
from pi05_ros.runtime.forward import Forward
from pi05_ros.runtime.policy import Request, draw_noise
from pi05_ros.runtime.timing import StageTimer
from pi05_ros.schema import ActionChunk, Guidance, ModelInputs, Observation

VARIETY = 7  # different inputs, so that a chunk with the features of another is found
NOTHING = Observation({}, np.zeros(0, np.float32), "")


class Workload:
    """Random inputs of one shape; chunk k sees the same in every run."""

    def __init__(self, stages: StageSet, cameras: int, tokens: int, seed: int,
                 frame: tuple[int, int] = (480, 640)) -> None:
        """frame: height and width of the camera frames."""
        self.stages, self.seed, config = stages, seed, stages.config
        rng = np.random.default_rng(seed)
        self._inputs = [ModelInputs(
            frames=[rng.integers(0, 256, (1, *frame, 3), dtype=np.uint8) for _ in range(cameras)],
            image_mask=np.ones((1, cameras), bool),
            tokens=rng.integers(3, config.prefix.vocab_size, (1, tokens)),
            token_mask=np.ones((1, tokens), bool),
            state=rng.uniform(-1, 1, (1, config.action_dim)).astype(np.float32),
        ) for _ in range(VARIETY)]

    def request(self, timer: StageTimer, observation: Observation, num_steps: int, seed: int | None = None,
                chunk_index: int | None = None, noise: np.ndarray | None = None) -> Request:
        index = chunk_index or 0
        inputs = self._inputs[index % VARIETY]

        def draw() -> np.ndarray:
            with timer.host("transform"):
                return draw_noise(self.seed, index, self.stages.config)

        return Request(observation, inputs.trimmed().frames, lambda: inputs, draw, False, num_steps, self.seed, index)

    def chunk(self, timer: StageTimer, request: Request, normalised: np.ndarray,
              guidance: Guidance | None = None) -> ActionChunk:
        with timer.host("inverse"):
            actions = normalised.copy()
        return ActionChunk(actions, normalised, request.observation.stamp_ns, 0.02, "", request.num_steps,
                           request.seed, request.chunk_index, stage_times_ms=timer.milliseconds(), guidance=guidance)

    def infer(self, observation: Observation, num_steps: int, *, chunk_index: int,
              guidance: Guidance | None = None) -> ActionChunk:
        """For `Sequential`."""
        timer = StageTimer(self.stages.device)
        request = self.request(timer, observation, num_steps, chunk_index=chunk_index)
        forward = Forward(self.stages, request, num_steps, timer)
        x_0 = forward.expert(forward.prefix(forward.vision()), guidance)
        return self.chunk(timer, request, x_0[0].cpu().numpy(), guidance)
