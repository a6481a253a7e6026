"""`compare`: backends side by side in one run, at one shape or several.

Each backend is first built alone, for its memory, with nothing else on the device; then all are built and timed in
turns (`order` says how), so that clocks and heat treat them alike. `--backends` are names separated by commas; stages
of one choice are joined by `+`: `eager,cuda,vision=cuda+prefix=cuda`. `cuda@fp8_mlp` is the model quantised by that
recipe, in memory; its floors are those of its precisions. Targets hold for the last backend named.

JSON: rows, each as `latency` gives them (backend, shape, median_ms, p99_ms, floor_ms, gap, p99_ratio, error,
error_limit, repeats, ran: how many quantised layers run how, memory, energy); runs, rate_hz, order, horizon, seed.
"""

from __future__ import annotations

from collections.abc import Sequence

from pi05_ros.benchmark.clock import ORDER, pace
from pi05_ros.benchmark.findings import Findings, Table, gap
from pi05_ros.benchmark.inputs import STANDARD_SHAPES, Shape
from pi05_ros.benchmark.measure import TIMED_STAGES, Row, Targets, measure, sound
from pi05_ros.benchmark.setting import Setting
from pi05_ros.errors import ConfigError

COLUMNS = ("shape", "backend", "images ms", *(f"{stage} ms" for stage in TIMED_STAGES), "total ms", "p99 ms",
           "floor ms", "gap", "allocated GB", "reserved GB", "error", "repeats")
FLOORS = ("shape", "backend", *TIMED_STAGES, "total", "quantised layers")


def run(setting: Setting, backends: Sequence[str], shapes: Sequence[Shape], runs: int, seed: int,
        targets: Targets, rate_hz: float = 0.0) -> Findings:
    rows = measure(setting, backends, shapes, runs, seed, rate_hz)
    gates = [gate for row in rows for gate in sound(row)]
    gates += [gate for row in rows if row.backend == backends[-1]
              for gate in targets.gates(row, list(shapes).index(row.shape))]
    horizon = setting.config.action_horizon
    title = (f"{setting.dtype}, horizon {horizon}, medians of {runs} runs, {pace(rate_hz)}; "
             "shape is cameras/tokens/steps")
    return Findings([Table(title, COLUMNS, [_cells(row) for row in rows]),
                     Table("floors, ms, and the gap to them", FLOORS, [_floors(row) for row in rows])],
                    {"rows": [row.as_data() for row in rows], "runs": runs, "rate_hz": rate_hz, "order": ORDER,
                     "horizon": horizon, "seed": seed}, gates,
                    [f"order: {ORDER}", *(f"{row.shape} {row.backend}: {row.energy}" for row in rows)])


def _floors(row: Row) -> tuple[str, ...]:
    ran = ", ".join(f"{count} {how}" for how, count in row.ran.items())
    floors = ((row.floors_ms[part], row.times[part].median) for part in (*TIMED_STAGES, "total"))
    return str(row.shape), row.backend, *(f"{floor:.2f} ({gap(median, floor)})" for floor, median in floors), ran or "-"


def _cells(row: Row) -> tuple[str, ...]:
    total, floor = row.times["total"], row.floors_ms["total"]
    memory = ("-", "-") if row.memory is None else (f"{row.memory.allocated_gb:.2f}", f"{row.memory.reserved_gb:.2f}")
    return (str(row.shape), row.backend, *(f"{row.times[stage].median:.2f}" for stage in ("images", *TIMED_STAGES)),
            f"{total.median:.2f}", f"{total.p99:.2f}", f"{floor:.2f}", gap(total.median, floor), *memory,
            f"{row.error:.1e}", "yes" if row.repeats else "NO")


def parse_backends(text: str) -> list[str]:
    """`eager,cuda,vision=cuda+prefix=cuda` to choices as backends/base.py reads them."""
    choices = [choice.strip().replace("+", ",") for choice in text.split(",")]
    if "" in choices or len(set(choices)) < len(choices):
        raise ConfigError("--backends", expected="different names separated by commas", received=repr(text),
                          way_out="For example --backends eager,cuda or eager,vision=cuda+prefix=cuda.")
    return choices


def parse_shapes(text: str) -> list[Shape]:
    """`3/200/10,2/48/10`, or `standard` for the three of `STANDARD_SHAPES`."""
    if text == "standard":
        return list(STANDARD_SHAPES)
    try:
        shapes = [Shape(*(int(number) for number in case.split("/"))) for case in text.split(",")]
    except (TypeError, ValueError):
        shapes = []
    if not shapes or len(set(shapes)) < len(shapes) or any(shape.steps < 1 for shape in shapes):
        raise ConfigError("--cases", expected="different CAMERAS/TOKENS/STEPS separated by commas, or 'standard'",
                          received=repr(text), way_out="For example --cases 3/200/10,2/48/10.")
    return shapes
