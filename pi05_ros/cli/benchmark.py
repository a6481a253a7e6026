"""Only figures from a GPU count as speed; on a CPU they show that the path works. What the hardware can do is measured
first. The last line of output is a JSON object; `pi05 benchmark MODE --help` lists its fields, beside `environment`,
`ceiling` and `gates` [{name, value, limit, ok}], which every mode has. Exit status 0: every gate held.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi05_ros.cli.options import (
    add_model_options,
    add_shape_options,
    count_list,
    float_list,
    positive,
    positive_number,
    weight_source,
)
from pi05_ros.cli.report import Report, console, progress, table

if TYPE_CHECKING:
    import torch

    from pi05_ros.benchmark.findings import Findings
    from pi05_ros.benchmark.setting import Setting
    from pi05_ros.config import Pi05Config

HELP = "measure speed, memory and accuracy"
MODES = {"latency": "time of one backend at one shape, with memory and error", "stages": "every stage by itself",
         "accuracy": "error on random inputs, beside eager's own", "compare": "backends side by side in one run",
         "profile": "where the time goes, kernel by kernel",
         "pipeline": "chunks in overlap against one after the other",
         "end-to-end": "the real node between real sensors"}
RECIPES_TOO = ("latency", "stages", "compare", "profile")  # modes in which a backend may be `cuda@fp8`
RUNS = {"latency": 100, "stages": 100, "compare": 100, "profile": 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    modes = parser.add_subparsers(dest="mode", metavar="MODE", required=True)
    for name, what in MODES.items():
        mode = modes.add_parser(name, help=what, description=_documentation(name),
                                formatter_class=argparse.RawDescriptionHelpFormatter)
        mode.add_argument("--json", type=Path, metavar="FILE", default=argparse.SUPPRESS,
                          help="also write the JSON object to FILE")
        add_model_options(mode, backend=name != "compare")
        if name == "accuracy":
            mode.add_argument("--inputs", type=positive, default=20, metavar="N", help="random inputs (default: 20)")
            mode.set_defaults(seed=None)  # fresh inputs in every run
            continue
        if name == "pipeline":
            _add_pipeline_options(mode)
            continue
        if name == "end-to-end":
            _add_end_to_end_options(mode)
            continue
        add_shape_options(mode)
        mode.add_argument("--runs", type=positive, default=RUNS[name], help="timed runs (default: %(default)s)")
        if name == "compare":
            mode.add_argument("--backends", default="eager,cuda", metavar="LIST",
                              help="separated by commas; stages of one joined by +; cuda@fp8: quantised by that "
                              "recipe (default: eager,cuda)")
            mode.add_argument("--cases", metavar="LIST", help="CAMERAS/TOKENS/STEPS,... or 'standard' for 3/200/10,"
                              "2/48/10,3/200/3, instead of one shape")
        if name in ("latency", "compare"):
            mode.add_argument("--rate", type=positive_number, default=0.0, metavar="HZ",
                              help="begin a run so often, as cameras ask for chunks (default: back to back)")
            gates = mode.add_argument_group("gates", "exit with 1 where a figure is above")
            gates.add_argument("--max-ms", type=float_list, default=(), metavar="MS[,MS...]",
                               help="median of the total; one, or one a case")
            gates.add_argument("--max-p99", type=positive_number, metavar="RATIO", help="p99 of the total over median")
            gates.add_argument("--max-memory-gb", type=positive_number, metavar="GB", help="peak of reserved memory")


def _add_pipeline_options(mode: argparse.ArgumentParser) -> None:
    mode.add_argument("--cameras", type=int, default=3, metavar="N", help="cameras that are there (default: 3)")
    mode.add_argument("--tokens", type=int, metavar="L", help="valid prompt tokens (default: all slots)")
    mode.add_argument("--steps", type=count_list, default=(1, 2, 3, 5, 10), metavar="N,...",
                      help="denoising steps, a row each (default: 1,2,3,5,10)")
    mode.add_argument("--chunks", type=positive, default=100, help="of each run (default: 100)")
    mode.add_argument("--boundary", choices=("prefix", "vision"), default="prefix",
                      help="the last stage that overlaps with the chunk before (default: prefix)")
    mode.add_argument("--side-by-side", action="store_true",
                      help="begin a chunk so early that it runs beside the last one, not just before that is done")
    mode.add_argument("--trace", type=Path, metavar="FILE", help="write a few chunks as a Chrome or Perfetto trace")
    mode.add_argument("--picture", type=Path, metavar="FILE", help="draw a few chunks as a PNG")
    gates = mode.add_argument_group("gates", "exit with 1 where the last row's figure is above")
    gates.add_argument("--max-period-ms", type=positive_number, metavar="MS")
    gates.add_argument("--max-latency-ratio", type=positive_number, metavar="RATIO", help="overlap over one by one")


def _add_end_to_end_options(mode: argparse.ArgumentParser) -> None:
    mode.add_argument("--rates", type=float_list, default=(30.0, 60.0), metavar="HZ,...",
                      help="of the cameras, one after the other (default: 30,60)")
    mode.add_argument("--seconds", type=float_list, default=(10.0,), metavar="S[,S...]",
                      help="of every rate, or one a rate (default: 10)")
    mode.add_argument("--steps", type=positive, default=10, metavar="N", help="denoising steps (default: 10)")
    mode.add_argument("--overlap", action="store_true", help="the node's parameter of that name")
    gates = mode.add_argument_group("gates", "exit with 1 where a figure is above")
    gates.add_argument("--max-p50-ms", type=positive_number, metavar="MS", help="overhead of half the trajectories")
    gates.add_argument("--max-p99-ms", type=positive_number, metavar="MS", help="overhead of 99 %% of them")


def run(args: argparse.Namespace) -> Report:
    from pi05_ros.backends.base import check_device

    if args.mode == "end-to-end":
        from pi05_ros.benchmark.setting import environment

        return _report(_end_to_end(args), {"mode": args.mode, "environment": environment(check_device(args.device))})
    from pi05_ros.benchmark.recipes import with_recipes
    from pi05_ros.benchmark.setting import make_setting

    device = check_device(args.device)
    source = weight_source(args, device)
    measure = _plan(args, source.config, device)  # refuses wrong use before anything is measured
    setting = with_recipes(make_setting(source, device, args.dtype, progress), _choices(args))
    console.print(setting.headline(), highlight=False)
    return _report(measure(setting), {"mode": args.mode, **setting.summary()})


def _report(findings: Findings, summary: dict[str, Any]) -> Report:
    for found in findings.tables:
        table(found.title, found.columns, found.rows)
    for note in findings.notes:
        console.print(note, highlight=False)
    for gate in findings.gates:
        if not gate.ok:
            console.print(f"[bold red]failed:[/] {gate}", highlight=False)
    return Report(ok=findings.ok, data={**summary, **findings.as_data()})


def _end_to_end(args: argparse.Namespace) -> Findings:
    from pi05_ros.benchmark import end_to_end
    from pi05_ros.errors import ConfigError

    parameters = {"checkpoint": str(args.checkpoint or ""), "size": args.size, "backend": args.backend,
                  "device": args.device, "dtype": args.dtype, "seed": args.seed, "denoising_steps": args.steps,
                  "overlap": args.overlap, "action_horizon": args.horizon or 0}
    seconds = args.seconds * len(args.rates) if len(args.seconds) == 1 else args.seconds
    if len(seconds) != len(args.rates):
        raise ConfigError("--seconds", expected=f"one number, or {len(args.rates)} as --rates has",
                          received=str(len(seconds)), way_out="Give one, or one a rate.")
    loads = [end_to_end.Load(rate, length) for rate, length in zip(args.rates, seconds, strict=True)]
    runs = end_to_end.measure(loads, parameters, lambda text: console.print(text, highlight=False))
    return end_to_end.findings(runs, args.max_p50_ms, args.max_p99_ms)


def _plan(args: argparse.Namespace, config: Pi05Config, device: torch.device) -> Callable[[Setting], Findings]:
    """The mode's measurement, its options checked."""
    from pi05_ros.backends.base import parse_choice
    from pi05_ros.benchmark import accuracy, compare, latency, pipeline, profile, stages
    from pi05_ros.benchmark.inputs import Shape, check_shape
    from pi05_ros.benchmark.measure import Targets
    from pi05_ros.benchmark.recipes import split_choice

    backends = _choices(args)
    for choice in backends:
        (split_choice if args.mode in RECIPES_TOO else parse_choice)(choice)
    if args.mode == "accuracy":
        horizons = accuracy.HORIZONS if args.horizon is None else (args.horizon,)
        return partial(accuracy.run, backend=args.backend, count=args.inputs, horizons=horizons, seed=args.seed)
    if args.mode == "pipeline":
        tokens = config.max_token_len if args.tokens is None else args.tokens
        check_shape(config, args.cameras, tokens)
        limits = pipeline.Targets(args.max_period_ms, args.max_latency_ratio)
        return partial(pipeline.run, backend=args.backend, cameras=args.cameras, tokens=tokens,
                       step_counts=args.steps, chunks=args.chunks, seed=args.seed, boundary=args.boundary,
                       side_by_side=args.side_by_side, targets=limits, trace=args.trace, picture=args.picture)
    shapes = [Shape(args.cameras, config.max_token_len if args.tokens is None else args.tokens, args.steps)]
    if args.mode == "compare" and args.cases:
        shapes = compare.parse_shapes(args.cases)
    for shape in shapes:
        check_shape(config, shape.cameras, shape.tokens)
    if args.mode in ("latency", "compare"):
        targets = Targets(args.max_ms, args.max_p99, args.max_memory_gb)
        targets.check(shapes)
        if args.mode == "compare":
            return partial(compare.run, backends=backends, shapes=shapes, runs=args.runs, seed=args.seed,
                           targets=targets, rate_hz=args.rate)
        return partial(latency.run, backend=args.backend, shape=shapes[0], runs=args.runs, seed=args.seed,
                       targets=targets, rate_hz=args.rate)
    if args.mode == "profile":
        profile.require_gpu(device)
    mode = stages if args.mode == "stages" else profile
    return partial(mode.run, backend=args.backend, shape=shapes[0], runs=args.runs, seed=args.seed)


def _choices(args: argparse.Namespace) -> list[str]:
    from pi05_ros.benchmark.compare import parse_backends

    return parse_backends(args.backends) if args.mode == "compare" else [args.backend]


def _documentation(mode: str) -> str | None:
    """The mode's own words, read without importing it (and PyTorch with it)."""
    source = Path(__file__).parents[1] / "benchmark" / f"{mode.replace('-', '_')}.py"
    return ast.get_docstring(ast.parse(source.read_text()))
