"""From a data set to a checkpoint, or a piece of the way: what `pi05 train` does."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pi05_ros.errors import ConfigError
from pi05_ros.model.save import save_openpi
from pi05_ros.model.weights import parameter_counts
from pi05_ros.schema import Conventions, NormStats
from pi05_ros.train.dataset import INDEX, Episode, read_episodes, read_index
from pi05_ros.train.initial import initial_model
from pi05_ros.train.presets import PRESETS, TrainSettings
from pi05_ros.train.samples import Samples, encode_episodes, step_generator
from pi05_ros.train.statistics import dataset_stats
from pi05_ros.train.tokenizer import state_token_ids, train_tokenizer
from pi05_ros.train.trainer import Trainer
from pi05_ros.transforms.prompt import PromptTokenizer
from pi05_ros.transforms.robot import RobotTransforms
from pi05_ros.transforms.robot_file import Robot

STATE, LOSSES, TOKENIZER = "training_state.pt", "losses.csv", "tokenizer.model"
CHECK_EVERY = 20  # steps between two looks at the clock and the loss: a look waits for the GPU
LOG_EVERY = 200  # steps between two lines of LOSSES: step, flow, goal, scene, each the mean of the last CHECK_EVERY
SAVE_EVERY_S = 120.0
ERROR_SAMPLES, ERROR_STEPS = 256, 10
VOCAB_MULTIPLE = 64
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class Prepared:
    """Data sets ready to be learnt: their samples, those held out (None: none), and what inference needs to know."""

    samples: Samples
    held_out: Samples | None
    transforms: RobotTransforms
    stats: NormStats
    tokenizer: bytes
    identity: str


def prepare(directories: Sequence[Path], robot: Robot, settings: TrainSettings, bar: Bar,
            held_out: int = 0) -> Prepared:
    """Read the data sets, as if they were one, twice: for their statistics, then for their samples. The last
    `held_out` episodes are not learnt.

    Raises:
        ConfigError: a data set is damaged, of another robot or other cameras, or no episode is left to learn from.
    """
    indices = [read_index(directory) for directory in directories]
    for directory, index in zip(directories, indices, strict=True):
        for key in ("robot", "cameras"):
            if index[key] != indices[0][key]:
                raise ConfigError(f"{key} of {directory}", expected=f"{indices[0][key]}, as in {directories[0]}",
                                  received=str(index[key]), way_out="Train on data sets of one robot at a time.")
    entries = [entry for index in indices for entry in index["episodes"]]
    cameras = tuple(indices[0]["cameras"])

    def all_episodes() -> Iterator[Episode]:
        return chain.from_iterable(map(read_episodes, directories))

    learnt = len(entries) - held_out
    if held_out < 0 or learnt < 1:
        raise ConfigError("held out episodes", expected=f"0 to {len(entries) - 1}", received=str(held_out),
                          way_out="Hold out fewer, or record more.")
    missing = [slot for slot, spec in robot.cameras.items() if spec.required and slot not in cameras]
    if missing:
        raise ConfigError(f"cameras of {directories[0]}", expected=f"{missing[0]}, which robot '{robot.name}' requires",
                          received=", ".join(cameras), way_out="Record it, or choose the robot of the data set.")
    model = train_tokenizer(prompt for entry in entries[:learnt] for prompt in entry["prompts"])
    vocab_size = PromptTokenizer(model).vocab_size
    config = PRESETS[settings.config](settings.horizon, -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE)
    with bar("statistics"):
        stats = dataset_stats(islice(all_episodes(), learnt), robot, settings.horizon)
    transforms = RobotTransforms(robot, Conventions(), stats, PromptTokenizer(model, config.max_token_len), config)
    frames = [entry["frames"][1] - entry["frames"][0] for entry in entries]
    parts: list[Samples] = []
    with bar("samples") as update:
        episodes = all_episodes()
        for count in (learnt, held_out):
            if count:
                here, frames = sum(frames[:count]), frames[count:]
                parts.append(encode_episodes(islice(episodes, count), here, cameras, transforms, settings.seed, update))
    parts = comparable(parts, robot.action_dim)
    content = [(directory / INDEX).read_bytes() for directory in directories]
    content.append(repr((asdict(robot), held_out)).encode())
    return Prepared(parts[0], parts[1] if held_out else None, transforms, stats, model,
                    hashlib.sha256(b"".join(content)).hexdigest())


def comparable(parts: list[Samples], robot_action_dim: int) -> list[Samples]:
    """Goals and scenes centred and scaled by those of the first part, so that guessing their mean costs about 1, as the
    flow does at first: goals all alike, since joints that hardly move must not count as those that do, scenes each
    column by itself."""
    goals, scenes = parts[0].goals, parts[0].scenes
    goal, scene = goals.mean(dim=0), scenes.mean(dim=0)
    goal_spread = (goals - goal)[:, :robot_action_dim].square().mean().sqrt().clamp(min=1e-6)
    scene_spread = (scenes - scene).square().mean(dim=0).sqrt().clamp(min=1e-6)
    return [replace(part, goals=(part.goals - goal) / goal_spread, scenes=(part.scenes - scene) / scene_spread)
            for part in parts]


def make_trainer(prepared: Prepared, settings: TrainSettings, device: torch.device, compiled: bool = False) -> Trainer:
    robot_action_dim = prepared.transforms.robot.action_dim
    model = initial_model(prepared.transforms.config, robot_action_dim, state_token_ids(prepared.tokenizer),
                          settings.seed)
    return Trainer(model, prepared.samples.to(device), settings, robot_action_dim, prepared.identity,
                   compiled)


def train(prepared: Prepared, settings: TrainSettings, output: Path, device: torch.device, bar: Bar,
          until: float = math.inf, dtype: str = "bfloat16", compiled: bool = False) -> dict[str, Any]:
    """Train to the last step, or until the monotonic clock shows `until`; resume what lies in `output`, and write the
    averaged weights there as a checkpoint.

    Returns:
        Figures: step, loss, action errors, parameters, bytes, speed.

    Raises:
        ConfigError: the loss is no number any more, or the run in `output` has other settings.
    """
    trainer = make_trainer(prepared, settings, device, compiled)
    output.mkdir(parents=True, exist_ok=True)
    if (output / STATE).exists():
        trainer.resume(output / STATE)
    looks = list[tuple[int, float]]()  # step and time; the first comes after what is compiled and tuned
    saved, losses = time.monotonic(), list[torch.Tensor]()
    loss = goal_loss = scene_loss = math.nan
    with bar("training") as update:
        while trainer.step < settings.steps:
            losses.append(trainer.advance())
            if trainer.step % CHECK_EVERY and trainer.step < settings.steps:
                continue
            (loss, goal_loss, scene_loss), losses = torch.stack(losses).mean(dim=0).tolist(), []
            if not math.isfinite(loss + goal_loss + scene_loss):
                raise ConfigError("loss", expected="a number", received=f"{loss} before step {trainer.step}",
                                  way_out="Lower --learning-rate; the state saved last is from before.")
            update(trainer.step, settings.steps)
            if trainer.step % LOG_EVERY == 0:
                with (output / LOSSES).open("a") as file:
                    file.write(f"{trainer.step},{loss:.5f},{goal_loss:.5f},{scene_loss:.5f}\n")
            now = time.monotonic()
            looks.append((trainer.step, now))
            if now > saved + SAVE_EVERY_S:
                trainer.save(output / STATE)
                write_checkpoint(trainer, prepared, output, dtype)  # what is there if the machine is lost
                saved = now
            if now > until:
                break
    trainer.save(output / STATE)
    weights = write_checkpoint(trainer, prepared, output, dtype)
    figures = {"step": trainer.step, "steps": settings.steps, "finished": trainer.step >= settings.steps, "loss": loss,
               "goal_loss": goal_loss, "scene_loss": scene_loss, **sampled_errors(trainer, trainer.samples),
               "parameters": sum(parameter_counts(prepared.transforms.config).values()),
               "checkpoint_bytes": weights.stat().st_size, "frames": len(prepared.samples),
               "steps_per_second": steps_per_second(looks)}
    if prepared.held_out is not None:
        unseen = sampled_errors(trainer, prepared.held_out.to(device))
        figures |= {f"held_out_{name}": error for name, error in unseen.items()}
    return figures


def steps_per_second(looks: list[tuple[int, float]]) -> float:
    """From the first look at the clock to the last; 0 where there were fewer than two."""
    if len(looks) < 2:
        return 0.0
    (first, begun), (last, ended) = looks[0], looks[-1]
    return (last - first) / (ended - begun)


def write_checkpoint(trainer: Trainer, prepared: Prepared, output: Path, dtype: str) -> Path:
    """openpi's layout, its tokenizer beside the weights, and how it was made. Returns the file of the weights."""
    robot, config = prepared.transforms.robot, prepared.transforms.config
    model, _ = trainer.averaged()
    save_openpi(model, output, config, prepared.stats, asset_id=robot.asset_id or robot.name, dtype=dtype)
    (output / TOKENIZER).write_bytes(prepared.tokenizer)
    made = {"step": trainer.step, "robot": robot.name, "data": prepared.identity, **asdict(trainer.settings)}
    (output / "training.json").write_text(json.dumps(made, indent=2) + "\n")
    return output / "model.safetensors"


def sampled_errors(trainer: Trainer, samples: Samples, count: int = ERROR_SAMPLES) -> dict[str, float]:
    """Of the averaged weights, root mean squares, normalised: `action_error` of actions sampled in 10 steps,
    `goal_error` and `scene_error` of the guesses of the episode's last action and of the scene.

    Where the data has two ways, so has the model: then the first two are no measure of success. Unseen episodes that
    are much worse than learnt ones say that episodes were learnt by heart.
    """
    (model, heads), width = trainer.averaged(), trainer.robot_action_dim
    generator = step_generator(trainer.settings.seed, trainer.settings.steps)
    rows = torch.from_numpy(np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(np.int64))
    noise = torch.randn((len(rows), *samples.actions.shape[1:]), generator=generator)
    errors = list[list[torch.Tensor]]()
    with torch.inference_mode():
        for part, x_1 in zip(rows.split(64), noise.split(64), strict=True):
            batch = samples.batch(part, x_1, torch.zeros(len(part)), None)
            mask = torch.ones(batch.pixels.shape[:2], dtype=torch.bool, device=trainer.device)
            cache = model.prefill(model.encode_images(batch.pixels), mask, batch.tokens, batch.token_mask)
            actions = model.denoise(cache, batch.noise, ERROR_STEPS)
            scene, goal = heads(cache, batch.tokens.shape[1])
            pairs = ((actions[..., :width], batch.actions[..., :width]), (goal[:, :width], batch.goals[:, :width]),
                     (scene, batch.scenes))
            errors.append([(guess - right).square().flatten(1).sum(dim=1) / max(1, right[0].numel())
                           for guess, right in pairs])
    means = [float(torch.cat(parts).mean().sqrt()) for parts in zip(*errors, strict=True)]
    return dict(zip(("action_error", "goal_error", "scene_error"), means, strict=True))
