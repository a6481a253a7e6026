"""What the trials of several settings say: rates and jerk, each with its interval, compared episode by episode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pi05_ros.sim.episode import Loop, Trial
from pi05_ros.sim.success import paired_difference, wilson

RESAMPLES = 1000  # of a bootstrap


def score(done: Sequence[Trial]) -> dict[str, Any]:
    """Of one setting: successes and their rate with Wilson's interval, by kind of task and by outcome, jerk (RMS of all
    episodes, median of their peaks, rad/s^3), and for each episode 1 or 0."""
    won = [trial.success for trial in done]
    low, high = wilson(sum(won), len(won))
    by_kind = {kind: [trial.success for trial in done if trial.kind == kind]
               for kind in sorted({trial.kind for trial in done})}
    return {
        "successes": sum(won), "rate": sum(won) / len(won), "low": low, "high": high,
        "kinds": {kind: [sum(of), len(of)] for kind, of in by_kind.items()},
        "outcomes": dict(Counter(trial.outcome for trial in done)),
        "jerk_rms": rms(_all(done, "jerk_rms")), "jerk_peak": median(_all(done, "jerk_peak")),
        "trials": [int(one) for one in won], "jerk_peaks": [round(trial.jerk_peak, 1) for trial in done]}


def compare(trials: Sequence[Sequence[Trial]], loops: Sequence[Loop], expert: Sequence[Trial],
            period_s: float, against: Sequence[bool] | None = None) -> list[dict[str, Any]]:
    """The score of each setting; its rate's difference from that of `against`, the same episodes of another run, or of
    the last setting; how many times as much as the expert it jerks: [value, low, high]."""
    last = [trial.success for trial in trials[-1]] if against is None else against
    return [{"mode": loop.join.mode, "steps": loop.num_steps, "delay_s": loop.delay * period_s, **score(done),
             "difference": paired_difference([trial.success for trial in done], last),
             **{f"{name}_times_expert": paired_ratio(_all(done, name), _all(expert, name), of)
                for name, of in (("jerk_rms", rms), ("jerk_peak", median))}}
            for loop, done in zip(loops, trials, strict=True)]


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def median(values: np.ndarray) -> float:
    return float(np.median(values))


def paired_ratio(one: np.ndarray, other: np.ndarray, of: Callable[[np.ndarray], float]) -> tuple[float, float, float]:
    """(`of` one over `of` the other, low, high), 95 % by drawing the same episodes again and again (seeded)."""
    drawn = np.random.default_rng(0).integers(len(one), size=(RESAMPLES, len(one)))
    bottom = of(other)
    if bottom == 0:
        return float("inf"), float("inf"), float("inf")
    ratios = [of(one[rows]) / max(of(other[rows]), 1e-9) for rows in drawn]
    low, high = np.percentile(ratios, (2.5, 97.5))
    return of(one) / bottom, float(low), float(high)


def _all(trials: Sequence[Trial], name: str) -> np.ndarray:
    return np.array([getattr(trial, name) for trial in trials])
