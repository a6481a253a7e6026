"""Runs a checkpoint on the simulated arm, on held-out episodes that no training has seen, and counts successes. Needs
MuJoCo (pip install 'pi05_ros[sim]') and an OpenGL library (sim/headless.py).

Every setting runs the same episodes with the same noise, so that two are compared episode by episode: the table's last
column is the difference from the last setting. Intervals are 95 %: Wilson's for a rate, Newcombe's for a difference.
--expert lets the scripted expert drive, which is the most that can be reached.

The last line of output is a JSON object: episodes, settings (each with steps, delay_s, successes, rate, low, high,
difference, kinds, outcomes, and trials: 1 or 0 for each episode), quantisation (what is in low precision, and what of
it is simulated; else null), seconds. Exit status 1 where --at-least is given and the last setting's rate is below it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi05_ros.cli.options import count_list, positive
from pi05_ros.cli.report import Report, console, progress, table
from pi05_ros.errors import ConfigError

if TYPE_CHECKING:
    from pi05_ros.sim.closed_loop import Loop, Trial

HELP = "count a checkpoint's successes on the simulated arm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="checkpoint directory")
    parser.add_argument("--expert", action="store_true", help="the scripted expert drives instead")
    parser.add_argument("--backend", default="eager", metavar="NAME",
                        help="one name, or vision=...,prefix=...,expert=... (default: eager)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<number> (default: auto)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--horizon", type=positive, metavar="H", help="actions in a chunk (default: as the model says)")
    parser.add_argument("--batch", type=positive, metavar="B",
                        help="episodes at once; 1 for backends that take one (default: 16 with eager, else 1)")
    parser.add_argument("--workers", type=positive, default=1, metavar="N",
                        help="processes, each with its own copy of the model (default: 1)")
    group = parser.add_argument_group("episodes")
    group.add_argument("--episodes", type=positive, default=200, metavar="N", help="default: 200")
    group.add_argument("--first", type=int, default=0, metavar="N",
                       help="number of the first held-out episode, to share them out among processes (default: 0)")
    group.add_argument("--tasks", metavar="KIND,...", help="touch, left, right, forward, sideways (default: all)")
    group.add_argument("--wrong-colour", action="store_true", help="name another block than the one that counts")
    group.add_argument("--mask", metavar="CAMERA", help="a camera that the policy does not get")
    group = parser.add_argument_group("loop")
    group.add_argument("--steps", type=count_list, default=(10,), metavar="N,...",
                       help="denoising steps, several to compare (default: 10)")
    group.add_argument("--delay-ms", type=delays, default=(0.0,), metavar="MS,...",
                       help="from observation to first command, several to compare; rounded up to control steps "
                            "(default: 0)")
    group.add_argument("--execute", type=positive, default=10, metavar="N",
                       help="control steps between two observations (default: 10)")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="pictures of some episodes of the last setting")
    parser.add_argument("--at-least", type=float, metavar="RATE", help="gate: exit status 1 below it")


def delays(text: str) -> tuple[float, ...]:
    numbers = tuple(float(part) for part in text.split(","))
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"expected milliseconds from 0 on, received {text}")
    return numbers


def run(args: argparse.Namespace) -> Report:
    from pi05_ros.model.quant_config import read_quantisation
    from pi05_ros.schema import CAMERAS
    from pi05_ros.sim.closed_loop import Loop
    from pi05_ros.sim.contact_sheet import save_contact_sheet
    from pi05_ros.sim.demonstrations import seeded_task
    from pi05_ros.sim.evaluation import Evaluation, run_all
    from pi05_ros.sim.tasks import HELD_OUT_SEEDS, parse_kinds
    from pi05_ros.transforms.robot_loader import load_robot

    if args.expert == bool(args.checkpoint):
        raise ConfigError("evaluate", expected="--checkpoint PATH or --expert", received="both" if args.expert else
                          "neither", way_out="Give one of them.")
    if args.mask not in (None, *CAMERAS):
        raise ConfigError("--mask", expected="one of " + ", ".join(CAMERAS), received=repr(args.mask),
                          way_out="Choose one of them.")
    kinds = parse_kinds(args.tasks)
    seeds = HELD_OUT_SEEDS[args.first:args.first + args.episodes] if args.first >= 0 else ()
    if len(seeds) < args.episodes:
        raise ConfigError("--first", expected=f"0 to {len(HELD_OUT_SEEDS) - args.episodes}", received=str(args.first),
                          way_out="Begin with another episode.")
    begun, period = time.monotonic(), load_robot("tabletop").control_period_s
    loops = [Loop(steps, args.execute, ceil(delay_ms * 1e-3 / period - 1e-9))
             for delay_ms in args.delay_ms for steps in args.steps]
    evaluation = Evaluation(
        str(args.checkpoint) if args.checkpoint else None, tuple(loops[:1] if args.expert else loops), args.backend,
        args.device, args.dtype, args.horizon, args.batch, args.wrong_colour, args.mask, film=args.sheet is not None)
    with progress("evaluating") as update:
        trials, rows = run_all(evaluation, {seed: seeded_task(seed, kinds) for seed in seeds}, args.workers, update)
    settings = summary(trials, evaluation.loops, period)
    quantised = read_quantisation(args.checkpoint) if args.checkpoint and args.checkpoint.is_dir() else None
    precision = quantised.summary() if quantised else None
    table(f"{'expert' if args.expert else args.checkpoint}: {len(seeds)} held-out episodes"
          + (f", {precision}" if precision else ""),
          ("steps", "delay [s]", "success", "95 %", "against the last"),
          [("-" if args.expert else one["steps"], f"{one['delay_s']:.2f}", f"{one['rate']:.1%}",
            f"{one['low']:.1%} to {one['high']:.1%}", "{:+.1%} ({:+.1%} to {:+.1%})".format(*one["difference"]))
           for one in settings])
    if args.sheet:
        save_contact_sheet(args.sheet, rows)
        console.print(f"pictures: {args.sheet}", highlight=False)
    ok = args.at_least is None or settings[-1]["rate"] >= args.at_least
    return Report(ok=ok, data={"episodes": len(seeds), "first": args.first, "kinds": list(kinds), "settings": settings,
                               "execute": args.execute, "wrong_colour": args.wrong_colour, "mask": args.mask,
                               "quantisation": precision,
                               "seconds": time.monotonic() - begun})


def summary(trials: Sequence[Sequence[Trial]], loops: Sequence[Loop], period: float) -> list[dict[str, Any]]:
    """Rates and intervals of each setting, and its difference from the last."""
    from collections import Counter

    from pi05_ros.sim.success import paired_difference, wilson

    last = [trial.success for trial in trials[-1]]
    settings = []
    for loop, done in zip(loops, trials, strict=True):
        won = [trial.success for trial in done]
        low, high = wilson(sum(won), len(won))
        by_kind = {kind: [trial.success for trial in done if trial.kind == kind]
                   for kind in sorted({trial.kind for trial in done})}
        settings.append({
            "steps": loop.num_steps, "delay_s": loop.delay * period, "successes": sum(won),
            "rate": sum(won) / len(won), "low": low, "high": high, "difference": paired_difference(won, last),
            "kinds": {kind: [sum(of), len(of)] for kind, of in by_kind.items()},
            "outcomes": dict(Counter(trial.outcome for trial in done)), "trials": [int(one) for one in won]})
    return settings
