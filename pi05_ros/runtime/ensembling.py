"""Temporal ensembling: what several chunks say of the same moment, averaged (ACT, Zhao et al. 2023)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pi05_ros.schema import ActionChunk


class TemporalEnsemble:
    """The last chunks. Weights are exp(-coefficient * i), i = 0 for the oldest: above 0 the older ones count more."""

    MOST = 100  # chunks

    def __init__(self) -> None:
        self._chunks: list[ActionChunk] = []

    def reset(self) -> None:
        self._chunks = []

    def replace(self, chunk: ActionChunk, by: ActionChunk) -> None:
        """One that speaks of other moments than it did."""
        self._chunks = [by if one is chunk else one for one in self._chunks]

    def add(self, chunk: ActionChunk, coefficient: float) -> ActionChunk:
        """The chunk, each action the weighted mean of all that is said of its time."""
        self._chunks = [c for c in self._chunks if len(leftover(c, chunk.stamp_ns))][1 - self.MOST:] + [chunk]
        total, weights = np.zeros(chunk.actions.shape), np.zeros((len(chunk.actions), 1))
        for i, one in enumerate(self._chunks):
            said, weight = leftover(one, chunk.stamp_ns)[:len(total)], np.exp(-coefficient * i)
            total[:len(said)] += weight * said
            weights[:len(said)] += weight
        return replace(chunk, actions=(total / weights).astype(np.float32))


def leftover(previous: ActionChunk, stamp_ns: int) -> np.ndarray:
    """Actions [K, robot_action_dim] of a chunk at stamp_ns, stamp_ns + period, ...: as many as it reaches, between its
    own ones by linear interpolation. None for a stamp before its own."""
    elapsed = (stamp_ns - previous.stamp_ns) * 1e-9 / previous.control_period_s
    last = len(previous.actions) - 1
    if elapsed < 0 or elapsed > last:
        return previous.actions[:0]
    rows = elapsed + np.arange(int(last - elapsed + 1e-6) + 1)
    before = np.minimum(rows.astype(int), last)
    share = (rows - before)[:, None]
    after = np.minimum(before + 1, last)
    return ((1 - share) * previous.actions[before] + share * previous.actions[after]).astype(np.float32)
