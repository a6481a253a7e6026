"""`latency`: time of each stage, its floor on this hardware, memory, and the error against float32 eager.

Only figures from a GPU count as speed; on a CPU they show that the path works.
"""

from __future__ import annotations

import argparse

from pi05_ros.cli.options import add_model_options, add_shape_options, positive, weight_source
from pi05_ros.cli.report import Report, console, progress, table

HELP = "measure speed, memory and accuracy"
ERROR_GATES = {"float32": 1e-5, "bfloat16": 2e-2}  # relative, to float32 eager (PI05_SPEC section 14)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("latency",))
    parser.add_argument("--runs", type=positive, default=100, help="timed runs (default: 100)")
    add_model_options(parser)
    add_shape_options(parser)


def run(args: argparse.Namespace) -> Report:
    from pi05_ros.benchmark.latency import measure

    source = weight_source(args)
    with progress("loading weights") as update:
        result = measure(source, args.backend, args.device, args.dtype, args.cameras, args.tokens, args.steps,
                         args.runs, args.seed, update)
    ceiling = result.ceiling
    console.print(f"{result.environment['device']}: copy {ceiling.bytes_per_s / 1e12:.2f} TB/s, {args.dtype} product "
                  f"{ceiling.flop_per_s / 1e12:.1f} TFLOP/s", highlight=False)
    table(f"{args.backend} {args.dtype}, {args.cameras} cameras, {args.tokens or source.config.max_token_len} tokens, "
          f"horizon {source.config.action_horizon}, {args.steps} steps, {args.runs} runs",
          ("stage", "median ms", "p99 ms", "floor ms", "gap"),
          [(name, f"{t.median:.3f}", f"{t.p99:.3f}", *_gap(t.median, result.floors_ms.get(name)))
           for name, t in result.times.items()])
    memory = "" if result.memory_gb is None else f", memory {result.memory_gb:.2f} GB"
    console.print(f"relative error to float32 eager {result.error:.2e}{memory}", highlight=False)
    gate = ERROR_GATES[args.dtype]
    if not result.error <= gate:
        console.print(f"[bold red]failed:[/] relative error above {gate}", highlight=False)
    return Report(ok=result.error <= gate, data={
        "environment": result.environment, "error": result.error, "memory_gb": result.memory_gb,
        "ceiling": {"bytes_per_s": ceiling.bytes_per_s, "flop_per_s": ceiling.flop_per_s},
        "median_ms": {k: t.median for k, t in result.times.items()},
        "p99_ms": {k: t.p99 for k, t in result.times.items()}, "floor_ms": result.floors_ms,
        "shape": {"cameras": args.cameras, "tokens": args.tokens or source.config.max_token_len, "steps": args.steps,
                  "horizon": source.config.action_horizon, "dtype": args.dtype, "backend": args.backend}})


def _gap(median: float, floor: float | None) -> tuple[str, str]:
    return ("-", "-") if floor is None else (f"{floor:.3f}", f"{median / floor:.1f} x")
