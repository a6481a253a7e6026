"""Normalisation statistics of a data set, over its data as the model will see it (PI05_SPEC section 10)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pi05_ros.errors import ConfigError
from pi05_ros.schema import ACTION_DIM, Conventions, FieldStats, NormStats
from pi05_ros.train.dataset import Episode
from pi05_ros.transforms.robot import ordered_steps
from pi05_ros.transforms.robot_file import Robot

# A dimension that rests most of the time would be divided by almost nothing, and its rare motion become enormous.
LEAST_SHARE = 0.2  # of the whole range lies between q01 and q99, at least
LEAST_SPAN = 0.02  # in the numbers of the model before normalisation
# The flow begins at noise of deviation 1 and is mostly learnt near it (flow_matching.py). Differences from the state
# are mostly small and seldom large: between 1 and 99 % they would be a third of the noise, and two ways to go, or a
# centimetre, would drown in it. So the actions' bounds are no farther from the mean than this many deviations.
MOST_DEVIATIONS = 1.2


def dataset_stats(episodes: Iterable[Episode], robot: Robot, horizon: int) -> NormStats:
    """Statistics after the robot's own steps and differences, before normalisation.

    Of the states of all frames, and of the actions of their chunks.

    Raises:
        ConfigError: no episode, or one whose state or actions are not as wide as the robot's.
    """
    *steps, _ = ordered_steps(robot, Conventions(state_norm="identity", action_norm="identity"), None, ACTION_DIM)
    states, actions = [], []
    for episode in episodes:
        check_robot(episode, robot)
        assert episode.frame_steps is not None
        for control_step in episode.frame_steps:
            chunk, state = action_chunk(episode, control_step, horizon), episode.state[control_step].astype(np.float64)
            for step in steps:
                chunk, state = step.apply(chunk, state), step.encode_state(state)
            states.append(state)
            actions.append(chunk.astype(np.float32))
    if not states:
        raise ConfigError("episodes", expected="at least one", received="none", way_out="Record some.")
    return NormStats(state=field_stats(np.stack(states)), actions=field_stats(np.concatenate(actions), MOST_DEVIATIONS))


def field_stats(values: np.ndarray, most_deviations: float | None = None) -> FieldStats:
    """[n, d] to its statistics; the quantiles are moved together to so many standard deviations from the mean, and
    apart where the data hardly moves (LEAST_SHARE, LEAST_SPAN)."""
    mean, std = values.mean(axis=0, dtype=np.float64), values.std(axis=0, dtype=np.float64)
    q01, q99 = np.quantile(values, (0.01, 0.99), axis=0)
    least = np.maximum(LEAST_SHARE * (values.max(axis=0) - values.min(axis=0)), LEAST_SPAN)
    if most_deviations is not None:
        q01, q99 = np.maximum(q01, mean - most_deviations * std), np.minimum(q99, mean + most_deviations * std)
    middle, half = (q01 + q99) / 2, np.maximum(q99 - q01, least) / 2
    return FieldStats(mean=mean, std=std, q01=middle - half, q99=middle + half)


def action_chunk(episode: Episode, control_step: int, horizon: int) -> np.ndarray:
    """float64 [horizon, A] from `control_step` on; beyond the end the last action repeats."""
    rows = np.minimum(np.arange(control_step, control_step + horizon), len(episode.actions) - 1)
    return episode.actions[rows].astype(np.float64)


def check_robot(episode: Episode, robot: Robot) -> None:
    for what, array, width in (("state", episode.state, robot.state_dim),
                               ("actions", episode.actions, robot.action_dim)):
        if array.shape[1] != width:
            raise ConfigError(f"{what} of {episode.name}", expected=f"{width} numbers, as robot '{robot.name}' has",
                              received=str(array.shape[1]),
                              way_out="Choose the robot file that the episodes were recorded with.")
