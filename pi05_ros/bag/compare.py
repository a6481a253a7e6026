"""How far replayed chunks are from recorded ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi05_ros.bag.replay import Replayed
from pi05_ros.errors import BagError


@dataclass(frozen=True)
class Comparison:
    """N chunks of H actions of D numbers.

    names: of the D numbers. errors: float64 [N, H, D], replayed less recorded, the robot's units. identical: bool [N],
    the same bits. times_s: float64 [N], of the observations, from the first one. recorded_ms, replayed_ms: float64 [N],
    the stages' total. missing: chunks that could not be replayed, by reason.
    """

    names: tuple[str, ...]
    errors: np.ndarray
    identical: np.ndarray
    times_s: np.ndarray
    recorded_ms: np.ndarray
    replayed_ms: np.ndarray
    missing: dict[str, int]

    @property
    def largest(self) -> float:
        return float(np.abs(self.errors).max(initial=0.0))

    def by_joint(self) -> np.ndarray:
        """Root mean square [D]."""
        return np.sqrt((self.errors**2).mean(axis=(0, 1)))

    def by_action(self) -> np.ndarray:
        """Root mean square [H]."""
        return np.sqrt((self.errors**2).mean(axis=(0, 2)))

    def by_chunk(self) -> np.ndarray:
        """Root mean square [N]."""
        return np.sqrt((self.errors**2).mean(axis=(1, 2)))

    def as_data(self) -> dict[str, Any]:
        return {"chunks": len(self.identical), "identical": int(self.identical.sum()), "missing": self.missing,
                "largest_error": self.largest,
                "rms_by_joint": dict(zip(self.names, self.by_joint().tolist(), strict=True)),
                "rms_by_action": self.by_action().tolist(),
                "recorded_ms": percentiles(self.recorded_ms), "replayed_ms": percentiles(self.replayed_ms)}


def compare(replayed: Iterable[Replayed], names: tuple[str, ...]) -> Comparison:
    """Raises BagError: nothing could be replayed, or the chunks differ in shape."""
    missing: Counter[str] = Counter()
    rows = []
    for item in replayed:
        if item.chunk is None:
            missing[f"{item.made.name}: {item.why}"] += 1
            continue
        recorded, actions = item.made.actions, item.chunk.actions
        if recorded.shape != actions.shape:
            raise BagError(item.made.name, expected=f"actions of shape {list(recorded.shape)}, as recorded",
                           received=str(list(actions.shape)), way_out="Replay with the same robot and horizon.")
        rows.append((item.chunk.stamp_ns, actions.astype(np.float64) - recorded,
                     np.ascontiguousarray(actions, "<f4").tobytes() == recorded.tobytes(),
                     float(item.made.values.get("stage_ms.total", "nan")), item.chunk.stage_times_ms["total"]))
    if not rows:
        raise BagError("replay", expected="a chunk whose inputs are in the bag",
                       received="; ".join(list(missing)[:3]) or "none",
                       way_out="Record on the machine of the node; see `dropped` and `lost` of the recorder.")
    rows.sort(key=lambda row: row[0])
    stamps, errors, identical, recorded_ms, replayed_ms = zip(*rows, strict=True)
    return Comparison(names, np.stack(errors), np.array(identical), (np.array(stamps) - stamps[0]) * 1e-9,
                      np.array(recorded_ms), np.array(replayed_ms), dict(missing))


def percentiles(values: np.ndarray) -> dict[str, float]:
    """Of those that were recorded; empty if none was."""
    if not len(values := values[np.isfinite(values)]):
        return {}
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
