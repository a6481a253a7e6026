"""The whole of the package without ROS and without overlap: an observation in, a chunk of actions out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pi05_ros.backends import base
from pi05_ros.config import Pi05Config, tiny_config
from pi05_ros.errors import ConfigError, ObservationError
from pi05_ros.model.checkpoint import Checkpoint, open_checkpoint
from pi05_ros.model.pinned import pinned_memory
from pi05_ros.model.recipe import DeviceSource, RecipeSource
from pi05_ros.model.weights import Progress, WeightSource
from pi05_ros.runtime.anticipation import Anticipation
from pi05_ros.runtime.forward import Forward, Given, Prepared
from pi05_ros.runtime.gpu_sensors import Sensors, gpu_sensors
from pi05_ros.runtime.pipelined import Pipeline
from pi05_ros.runtime.sequential import Sequential
from pi05_ros.runtime.streams import mark_here
from pi05_ros.runtime.timing import StageTimer
from pi05_ros.schema import (
    ActionChunk,
    Conventions,
    FieldStats,
    Guidance,
    ModelInputs,
    NormStats,
    Observation,
    PromptFormat,
)
from pi05_ros.transforms.prompt import PromptTokenizer
from pi05_ros.transforms.robot import RobotTransforms
from pi05_ros.transforms.robot_file import Robot
from pi05_ros.transforms.robot_loader import load_robot
from pi05_ros.transforms.tiny_tokenizer import tiny_tokenizer

MAX_DENOISING_STEPS = 50
SIZES: dict[str, Callable[..., Pi05Config]] = {"tiny": tiny_config, "full": Pi05Config}


@dataclass(frozen=True)
class Request:
    """An observation for the stages, and all that its chunk depends on. The frames are ready, and tokens and noise
    float32 [1, H, 32] are made when they are asked for: then a GPU is busy with the frames."""

    observation: Observation
    frames: Sequence[np.ndarray | None]
    encode: Callable[[], ModelInputs]
    draw: Callable[[], np.ndarray]
    noise_given: bool
    num_steps: int
    seed: int
    chunk_index: int

    @cached_property
    def inputs(self) -> ModelInputs:
        """Raises ObservationError as `RobotTransforms.encode`."""
        return self.encode()

    @cached_property
    def noise(self) -> np.ndarray:
        return self.draw()[None]


class Policy:
    """pi0.5 behind one call.

        policy = Policy.load(checkpoint="my_checkpoint", robot="aloha", device="cuda", dtype="bfloat16")
        chunk = policy.infer(Observation(images={"base_0_rgb": frame, ...}, state=joints, prompt="fold the towel"))
        chunk.actions  # [H, robot_action_dim], the robot's own units
    """

    def __init__(self, stages: base.StageSet, transforms: RobotTransforms, seed: int = 0,
                 rtc_training_max_delay: int = 0) -> None:
        self.stages, self.transforms, self.seed = stages, transforms, seed
        self.rtc_training_max_delay = rtc_training_max_delay  # rows; 0: not trained for real-time chunking
        self.config: Pi05Config = stages.config
        self.robot: Robot = transforms.robot
        self._chunk_index = 0
        self.soon: Callable[[], None] | None = None  # called shortly before a GPU has made a chunk, as far as is known
        self._anticipation = Anticipation()

    @classmethod
    def load(cls, checkpoint: str | Path | None = None, robot: str | Robot = "arm6", backend: str = "eager",
             device: str = "cpu", dtype: str = "float32", seed: int = 0, tokenizer: str | Path | None = None,
             action_horizon: int | None = None, rope_inv_freq: str = "float32",
             prompt_format: PromptFormat | None = None, size: str = "tiny",
             on_progress: Progress | None = None) -> Policy:
        """Load a checkpoint directory (openpi or lerobot), or without one the embedded model with random weights.

        `size` of the embedded one: `tiny`, or `full` to measure with the real shapes. README has the other arguments,
        which are parameters of the node too.

        Raises:
            ConfigError, CheckpointError, BackendError: with what was expected, what came, and the way out.
        """
        robot = load_robot(robot) if isinstance(robot, str) else robot
        source: WeightSource
        cameras: tuple[str, ...] = ()
        max_delay = 0
        if checkpoint is None:
            source, conventions, known = embedded_model(robot, size, action_horizon, rope_inv_freq, device)
            stats: NormStats | None = known
            tokens = PromptTokenizer(tokenizer or tiny_tokenizer(), source.config.max_token_len)
        else:
            source = opened = open_checkpoint(checkpoint, action_horizon=action_horizon, asset_id=robot.asset_id,
                                              tokenizer=tokenizer, rope_inv_freq=rope_inv_freq)
            conventions, stats, cameras = opened.conventions, opened.stats, opened.camera_keys
            tokens, max_delay = _checkpoint_tokenizer(opened, robot), opened.rtc_training_max_delay
        transforms = RobotTransforms(robot, conventions, stats, tokens, source.config, cameras, prompt_format)
        stages = base.build(backend, source, device, dtype, conventions.resize, on_progress)
        policy = cls(stages, transforms, seed, max_delay)
        if stages.device.type == "cuda":
            policy.warm_up()
        return policy

    def warm_up(self) -> None:
        """One chunk of nothing, so that the first real one does not wait for what a GPU loads and allocates."""
        config, order = self.config, self.transforms.camera_order
        self.sample(ModelInputs(
            frames=[np.zeros((1, 480, 640, 3), np.uint8) if slot else None for slot in order],
            image_mask=np.array([[slot is not None for slot in order]]),
            tokens=np.zeros((1, config.max_token_len), np.int64), token_mask=np.ones((1, config.max_token_len), bool),
            state=np.zeros((1, config.action_dim), np.float32),
        ), np.zeros((1, config.action_horizon, config.action_dim), np.float32), num_steps=10)

    def pipeline(self, overlap: bool) -> Pipeline | Sequential:
        """How chunks follow each other: the next one begun while the last is denoised, or one at a time."""
        return Pipeline(self) if overlap else Sequential(self)

    def sensors(self) -> Sensors:
        """Reads the GPU's memory and temperature, for diagnostics."""
        return gpu_sensors(self.stages.device)

    @property
    def frame_memory(self) -> Callable[[int], np.ndarray]:
        """Gives so many bytes from which `infer` takes pixels without a copy (pinned for a GPU); keeps no policy alive.

        It raises ObservationError where there are none.
        """
        return pinned_memory if self.stages.device.type == "cuda" else plain_memory

    def summary(self) -> str:
        """One line for logs: what runs where."""
        names = set(self.stages.names.values())
        backend = names.pop() if len(names) == 1 else ", ".join(f"{s}={b}" for s, b in self.stages.names.items())
        return (f"{self.config.kind}, {self.config.prefix.depth} layers of width {self.config.prefix.width}, "
                f"horizon {self.config.action_horizon}, backend {backend} on {self.stages.device}"
                + (f", {quantised.summary()}" if (quantised := self.stages.quantisation) else "")
                + (f"; here {runs}" if (runs := self.stages.how_layers_run()) else ""))

    def infer(self, observation: Observation, num_steps: int = 10, seed: int | None = None,
              chunk_index: int | None = None, noise: np.ndarray | None = None,
              guidance: Guidance | None = None) -> ActionChunk:
        """One chunk for one observation.

        Args:
            num_steps: denoising steps, 1 to 50.
            seed, chunk_index: choose the noise; by default the policy's seed and a counter of its calls.
            noise: float32 [H, 32], instead of drawing it.
            guidance: for real-time chunking.

        Raises:
            ObservationError: the observation is not usable, or the model answered with NaN.
            ConfigError: `num_steps` or `noise` out of range or shape.
        """
        timer = StageTimer(self.stages.device)
        request = self.request(timer, observation, num_steps, seed, chunk_index, noise)
        return self.chunk(timer, request, self._made(request, num_steps, guidance, timer)[0], guidance)

    def request(self, timer: StageTimer, observation: Observation, num_steps: int, seed: int | None = None,
                chunk_index: int | None = None, noise: np.ndarray | None = None) -> Request:
        """The part before the stages: arguments as in `infer`. What is wrong with state or prompt is found when the
        stages ask for them."""
        if not 1 <= num_steps <= MAX_DENOISING_STEPS:
            raise ConfigError("denoising_steps", expected=f"1 to {MAX_DENOISING_STEPS}", received=str(num_steps),
                              way_out="10 is what the checkpoints were trained to be sampled with.")
        seed = self.seed if seed is None else seed
        if chunk_index is None:
            chunk_index, self._chunk_index = self._chunk_index, self._chunk_index + 1
        frames = self.transforms.frames(observation)
        given = None if noise is None else self._checked(noise)

        def encode() -> ModelInputs:
            with timer.host("transform"):
                return self.transforms.encode(observation, frames)

        def draw() -> np.ndarray:
            return draw_noise(seed, chunk_index, self.config) if given is None else given

        return Request(observation, [frame for frame in frames if frame is not None], encode, draw, given is not None,
                       num_steps, seed, chunk_index)

    def chunk(self, timer: StageTimer, request: Request, normalised: np.ndarray,
              guidance: Guidance | None = None) -> ActionChunk:
        """The part after the stages: float32 [H, 32] to the robot's units. Raises ObservationError for NaN."""
        observation = request.observation
        with timer.host("inverse"):
            if not np.isfinite(normalised).all():
                raise ObservationError("actions of the model", expected="finite numbers", received="NaN or infinity",
                                       way_out="Check the checkpoint and the inputs; use dtype float32 to compare.",
                                       cause="non-finite actions")
            actions = self.transforms.decode(normalised, observation.state)
        return ActionChunk(
            actions=actions, normalised=normalised, stamp_ns=observation.stamp_ns,
            control_period_s=self.robot.control_period_s, prompt=observation.prompt, num_steps=request.num_steps,
            seed=request.seed, chunk_index=request.chunk_index, noise_given=request.noise_given,
            stage_times_ms=timer.milliseconds(), guidance=guidance,
        )

    def sample(self, inputs: ModelInputs, noise: np.ndarray, num_steps: int, guidance: Guidance | None = None,
               timer: StageTimer | None = None) -> np.ndarray:
        """The four stages, batched: noise float32 [B, H, 32] to actions float32 [B, H, 32], model space."""
        return self._made(Given(inputs, noise), num_steps, guidance, timer or StageTimer(self.stages.device))

    def _made(self, prepared: Prepared, num_steps: int, guidance: Guidance | None, timer: StageTimer) -> np.ndarray:
        self._anticipation.begin()
        forward = Forward(self.stages, prepared, num_steps, timer)
        actions = forward.expert(forward.prefix(forward.vision()), guidance)
        if self.soon is not None and actions.device.type == "cuda":
            self._anticipation.wait((num_steps, len(prepared.frames)), mark_here(actions.device).reached, self.soon)
        made = actions.cpu().numpy()  # the host waits here
        self._anticipation.done()
        return made

    def _checked(self, noise: np.ndarray) -> np.ndarray:
        expected = (self.config.action_horizon, self.config.action_dim)
        if noise.shape != expected:
            raise ConfigError("noise", expected=f"shape {list(expected)}", received=str(list(noise.shape)),
                              way_out="One row an action, 32 columns.")
        return noise.astype(np.float32)


def _checkpoint_tokenizer(opened: Checkpoint, robot: Robot) -> PromptTokenizer:
    if opened.robot_action_dim not in (None, robot.action_dim):
        raise ConfigError(f"robot '{robot.name}'", expected=f"{opened.robot_action_dim} actions, as the checkpoint has",
                          received=str(robot.action_dim), way_out="Choose the robot file that belongs to it.")
    if opened.tokenizer_path is None:
        raise ConfigError("tokenizer", expected="paligemma_tokenizer.model in the checkpoint's directory",
                          received="none", way_out="Put it there, or give its path as `tokenizer`.")
    return PromptTokenizer(opened.tokenizer_path, opened.config.max_token_len)


def plain_memory(size: int) -> np.ndarray:
    return np.empty(size, np.uint8)


def draw_noise(seed: int, chunk_index: int, config: Pi05Config) -> np.ndarray:
    """float32 [H, 32], N(0, 1): a function of (seed, chunk_index) alone, so that a chunk can be made again."""
    generator = np.random.Generator(np.random.PCG64([seed, chunk_index]))
    return generator.standard_normal((config.action_horizon, config.action_dim), dtype=np.float32)


def embedded_model(robot: Robot, size: str = "tiny", action_horizon: int | None = None,
                   rope_inv_freq: str = "float32",
                   device: str = "cpu") -> tuple[WeightSource, Conventions, NormStats]:
    """A pi0.5 with weights by recipe, and statistics under which it stays near the middle of the joints.

    Its motions mean nothing; it shows the whole path at work without a checkpoint. The tiny one is the same on every
    machine; the full one is drawn on the GPU, where there is one.
    """
    if size not in SIZES:
        raise ConfigError("size", expected=" or ".join(SIZES), received=repr(size), way_out="Choose one of them.")
    config = SIZES[size](action_horizon=action_horizon or 50, rope_inv_freq=rope_inv_freq)
    low, high = -np.ones(robot.state_dim), np.ones(robot.state_dim)
    if robot.joints:
        bounds = np.array([((j.lower - j.offset) / j.scale, (j.upper - j.offset) / j.scale) for j in robot.joints])
        low, high = bounds.min(axis=1), bounds.max(axis=1)
    centre, reach = 0.5 * (low + high)[: robot.action_dim], 0.05 * (high - low)[: robot.action_dim]
    differences = [j.delta or j.action == "velocity" for j in robot.joints] or [False] * robot.action_dim
    centre = np.where(differences, 0.0, centre)
    actions = FieldStats(q01=centre - reach, q99=centre + reach)
    drawn_there = size == "full" and base.check_device(device).type == "cuda"
    source = DeviceSource(config) if drawn_there else RecipeSource(config)
    return source, Conventions(), NormStats(state=FieldStats(q01=low, q99=high), actions=actions)
