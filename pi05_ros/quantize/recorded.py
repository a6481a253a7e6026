"""Observations that were recorded: a bag of the node, a data set of episodes, or one of LeRobot."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np

from pi05_ros.errors import BagError, ConfigError
from pi05_ros.model.checkpoint import Checkpoint
from pi05_ros.model.weights import WeightSource
from pi05_ros.quantize.lerobot import ACTIONS, STATES, LeRobotDataset
from pi05_ros.quantize.samples import Sample, drawn
from pi05_ros.runtime.policy import embedded_model
from pi05_ros.schema import ModelInputs, Observation
from pi05_ros.train.dataset import read_episodes, read_index
from pi05_ros.train.statistics import action_chunk, check_robot
from pi05_ros.transforms.actions import JointUnits
from pi05_ros.transforms.prompt import PromptTokenizer
from pi05_ros.transforms.robot import RobotTransforms
from pi05_ros.transforms.robot_file import Robot
from pi05_ros.transforms.tiny_tokenizer import tiny_tokenizer

Encoded = tuple[ModelInputs, np.ndarray | None]


def dataset_samples(directory: Path, transforms: RobotTransforms, count: int, seed: int) -> list[Sample]:
    """`count` frames drawn from the whole data set, each with the actions that followed it.

    Raises:
        ConfigError: the data set is damaged, of another robot, or has fewer frames.
    """
    index = read_index(directory)
    ends = np.cumsum([entry["frames"][1] - entry["frames"][0] for entry in index["episodes"]])
    wanted = choose(int(ends[-1]), count, seed, f"data set {directory}")
    found, first, horizon = dict[int, Encoded](), 0, transforms.config.action_horizon
    for episode in read_episodes(directory):
        check_robot(episode, transforms.robot)
        assert episode.frame_steps is not None
        for frame in range(len(episode.images)):
            if first + frame in wanted:
                step = int(episode.frame_steps[frame])
                images = dict(zip(index["cameras"], episode.images[frame], strict=True))
                state = episode.state[step]
                inputs = transforms.encode(Observation(images, state, episode.prompts[0]))
                chunk = transforms.encode_actions(action_chunk(episode, step, horizon), state)
                found[first + frame] = inputs, chunk[None]
        first += len(episode.images)
    return drawn([found[one] for one in wanted], transforms.config, seed)


def lerobot_samples(directory: Path, transforms: RobotTransforms, count: int, seed: int) -> list[Sample]:
    """`count` frames drawn from the whole LeRobot data set, each with the actions that followed it.

    Raises:
        ConfigError: the data set is damaged, of another robot, or has fewer frames; the extra `lerobot` is missing.
    """
    data, robot, horizon = LeRobotDataset(directory), transforms.robot, transforms.config.action_horizon
    states, actions = data.feature(STATES, robot.state_dim, robot), data.feature(ACTIONS, robot.action_dim, robot)
    cameras, units = data.cameras(robot), JointUnits.of(robot.joints) if robot.joints else None
    ends = np.cumsum([episode.length for episode in data.episodes])
    wanted = choose(int(ends[-1]) if len(ends) else 0, count, seed, f"data set {directory}")
    found = dict[int, Encoded]()
    for number in sorted(set(np.searchsorted(ends, wanted, side="right").tolist())):
        episode = data.episodes[number]
        first, rows = int(ends[number]) - episode.length, data.rows(episode, [states, actions, *cameras.values()])
        for row in (one - first for one in wanted if first <= one < first + episode.length):
            images = {slot: data.frame(episode, camera, rows, row) for slot, camera in cameras.items()}
            for slot in images:
                if robot.cameras[slot].rotate_180:  # they lie as the trainer saw them, and `encode` turns them
                    images[slot] = images[slot][::-1, ::-1]
            state, chunk = np.array(rows[states][row]), np.array(rows[actions])[row:row + horizon]
            chunk = np.pad(chunk, ((0, horizon - len(chunk)), (0, 0)), mode="edge")
            if units:  # from the numbers of the training data
                state, chunk = state * units.scale + units.offset, units.invert(chunk, state)
            inputs = transforms.encode(Observation(images, state, data.prompt(rows["task_index"][row])))
            found[first + row] = inputs, transforms.encode_actions(chunk, state)[None]
    return drawn([found[one] for one in wanted], transforms.config, seed)


def bag_samples(bag: Path, transforms: RobotTransforms, count: int, seed: int,
                topics: Path | None = None, node: str = "/pi05_policy") -> list[Sample]:
    """`count` of the observations that chunks of a recorded run were made from, through the code of the node. Without
    actions: those recorded are of another model, or of this one, which gives them again.

    Raises:
        BagError: the bag cannot be read, or has fewer chunks with all their inputs.
        ConfigError: ROS or the extra `bag` is not installed.
    """
    try:
        from pi05_ros.bag.replay import read_run, replay
        from pi05_ros.bag.topics import topic_map
    except ImportError as error:
        raise ConfigError("reading a bag", expected="ROS and the extra `bag`", received=str(error),
                          way_out="pip install 'pi05_ros[ros,bag]'") from error
    map_of_topics = topic_map(topics, node)
    run = read_run(bag, map_of_topics, node)
    encode = cast(Any, Encoder(transforms))  # of a policy, replay asks no more than this
    # Twice as many as wanted: chunks whose inputs the bag lacks are left out.
    run.made = [run.made[one] for one in choose(len(run.made), min(len(run.made), 2 * count), seed, f"bag {bag}")]
    order = {id(made): position for position, made in enumerate(run.made)}
    found = {order[id(one.made)]: cast(ModelInputs, one.chunk)
             for one in replay(bag, map_of_topics, run, encode) if one.chunk is not None}
    if len(found) < count:
        raise BagError(f"samples of bag {bag}", expected=f"{count} chunks with all their inputs",
                       received=f"{len(found)} of {len(run.made)}", way_out="Give fewer --samples, or record more.")
    return drawn([(found[one], None) for one in sorted(found)[:count]], transforms.config, seed)


def transforms_for(source: WeightSource, robot: Robot) -> RobotTransforms:
    """As at inference: the checkpoint's conventions, statistics and tokenizer; for random weights the embedded ones.

    Raises:
        ConfigError: the checkpoint has no tokenizer or no statistics, or is of another robot.
    """
    if not isinstance(source, Checkpoint):
        _, conventions, stats = embedded_model(robot, "tiny")
        tokenizer = PromptTokenizer(tiny_tokenizer(), source.config.max_token_len)
        return RobotTransforms(robot, conventions, stats, tokenizer, source.config)
    if source.tokenizer_path is None:
        raise ConfigError("tokenizer", expected="paligemma_tokenizer.model in the checkpoint's directory",
                          received="none", way_out="Put it there, or calibrate with synthetic observations.")
    tokenizer = PromptTokenizer(source.tokenizer_path, source.config.max_token_len)
    return RobotTransforms(robot, source.conventions, source.stats, tokenizer, source.config, source.camera_keys)


class Encoder:
    """In the place of a policy: what it would have run on, instead of what it gives."""

    def __init__(self, transforms: RobotTransforms) -> None:
        self._transforms = transforms
        self.robot: Robot = transforms.robot

    def infer(self, observation: Observation, *_: object, **__: object) -> ModelInputs:
        return self._transforms.encode(observation)


def choose(there: int, count: int, seed: int, where: str) -> list[int]:
    """`count` of `there` numbers in random order; the first of them are those of a smaller count."""
    if count > there:
        raise ConfigError(f"samples of {where}", expected=f"at most {there}, as it has", received=str(count),
                          way_out="Give fewer --samples, or record more.")
    return np.random.default_rng([seed, 2]).permutation(there)[:count].tolist()


