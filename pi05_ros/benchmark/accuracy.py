"""`accuracy`: how far a backend is from float32 eager on fresh random inputs, beside eager's own distance in its dtype.

Cameras, tokens, steps (1 to 20) and seeds are drawn anew in every run; `--seed` draws a set again. Horizons take turns.
`actions` is the whole forward; every stage is judged alone too, on float32 eager's own inputs to it, rounded to the
dtype. The gate, on every input: error <= 1.2 x eager's own (or below 1e-5, which is float32's rounding).

JSON: errors {what: {backend: {median, worst}, eager: {median, worst}, worst_ratio}}, inputs [{cameras, tokens, steps,
horizon, seed, backend: {what: error}, eager: {what: error}}], backend, seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pi05_ros.benchmark.error import STAGE_ERRORS, StageTruth, relative_error, run_stages, stage_errors, truth
from pi05_ros.benchmark.findings import Findings, Gate, Table
from pi05_ros.benchmark.inputs import BenchmarkInputs, Shape, random_inputs
from pi05_ros.benchmark.setting import Setting, release
from pi05_ros.config import Pi05Config

HORIZONS = (10, 15, 50)
MAX_STEPS = 20
ALLOWED = 1.2  # times eager's own error
NEGLIGIBLE = 1e-5  # below this an error is float32's rounding, whatever eager's is
WHAT = ("actions", *STAGE_ERRORS)


@dataclass(frozen=True)
class Draw:
    """One random input: its shape, horizon and seed."""

    shape: Shape
    horizon: int
    seed: int


def draws(config: Pi05Config, count: int, horizons: Sequence[int], seed: int) -> list[Draw]:
    """`count` inputs; horizons in turns."""
    rng = np.random.default_rng(seed)
    return [Draw(Shape(int(rng.integers(1, config.num_cameras + 1)), int(rng.integers(1, config.max_token_len + 1)),
                       int(rng.integers(1, MAX_STEPS + 1))), horizons[i % len(horizons)], int(rng.integers(2**31)))
            for i in range(count)]


def run(setting: Setting, backend: str, count: int, horizons: Sequence[int], seed: int | None) -> Findings:
    """One model at a time on the device: the truth, eager in the dtype, then the backend for every horizon."""
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
    drawn = draws(setting.config, count, horizons, seed)
    with truth(setting) as right, setting.watch("float32 eager") as update:
        truths = []
        for done, draw in enumerate(drawn):
            truths.append(StageTruth.of(right, _inputs(setting, draw), draw.shape.steps))
            update(done + 1, count)
        del right
    release()
    theirs = _errors(setting, "eager", drawn, truths)  # eager takes the horizon from the noise: one model for all
    release()
    ours: dict[Draw, dict[str, float]] = {}
    for horizon in dict.fromkeys(horizons):
        own = [draw for draw in drawn if draw.horizon == horizon]
        if own:
            ours.update(_errors(setting.at_horizon(horizon), backend, own, [truths[drawn.index(d)] for d in own]))
            release()
    return report(backend, setting.dtype, drawn, ours, theirs, seed)


def _inputs(setting: Setting, draw: Draw) -> BenchmarkInputs:
    config = setting.at_horizon(draw.horizon).config
    return random_inputs(config, setting.device, draw.shape.cameras, draw.shape.tokens, draw.seed)


def _errors(setting: Setting, backend: str, drawn: Sequence[Draw],
            truths: Sequence[StageTruth]) -> dict[Draw, dict[str, float]]:
    stages, found = setting.build(backend), {}
    with setting.watch(f"{backend} {setting.dtype}") as update:
        for done, (draw, right) in enumerate(zip(drawn, truths, strict=True)):
            inputs = _inputs(setting, draw)
            actions = relative_error(run_stages(stages, inputs, draw.shape.steps), right.actions)
            found[draw] = {"actions": actions, **stage_errors(stages, inputs, draw.shape.steps, right, setting.dtype)}
            update(done + 1, len(drawn))
    return found


def report(backend: str, dtype: str, drawn: Sequence[Draw], ours: dict[Draw, dict[str, float]],
           theirs: dict[Draw, dict[str, float]], seed: int) -> Findings:
    """Median and worst of both, and the worst ratio on any input, which is the gate."""
    errors: dict[str, dict[str, Any]] = {}
    gates, rows = [], []
    for what in WHAT:
        mine, eager = (np.array([found[draw][what] for draw in drawn]) for found in (ours, theirs))
        ratio = float(np.max(mine / np.maximum(eager, NEGLIGIBLE / ALLOWED)))
        errors[what] = {"backend": _spread(mine), "eager": _spread(eager), "worst_ratio": ratio}
        gates.append(Gate(f"{what}: error over eager's own", ratio, ALLOWED))
        rows.append((what, *(f"{x:.1e}" for spread in ("backend", "eager") for x in errors[what][spread].values()),
                     f"{ratio:.2f}", "yes" if gates[-1].ok else "NO"))
    columns = ("what", "median", "worst", "eager median", "eager worst", "worst ratio", "ok")
    title = f"{backend} {dtype}: relative error to float32 eager, {len(drawn)} random inputs, seed {seed}"
    inputs = [{**asdict(draw.shape), "horizon": draw.horizon, "seed": draw.seed, "backend": ours[draw],
               "eager": theirs[draw]} for draw in drawn]
    return Findings([Table(title, columns, rows)],
                    {"errors": errors, "inputs": inputs, "backend": backend, "seed": seed}, gates)


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "worst": float(np.max(values))}
