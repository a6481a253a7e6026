"""Runs a checkpoint on the simulated arm, on held-out episodes that no training has seen, and counts successes. Needs
MuJoCo (pip install 'pi05_ros[sim]') and an OpenGL library (sim/headless.py).

Every setting (all combinations of --chunk-mode, --delay-ms and --steps) runs the same episodes with the same noise, so
that two are compared episode by episode. The table has the difference from the last setting, or from the last one of an
earlier run of the same episodes (--against FILE.json, as --json writes it), and how much the commands jerk, also
against the scripted expert's: RMS over all episodes, and the median of their peaks. Intervals are 95 %: Wilson's for a
rate, Newcombe's for a difference, a bootstrap's for jerk. --expert lets the scripted expert drive alone, which is the
most that can be reached.

--over-ros runs the real node in a process of its own, in simulated time that waits for it; the same is counted.

The last line of output is a JSON object: episodes, expert and settings (each with mode, steps, delay_s, successes,
rate, low, high, difference, kinds, outcomes, jerk_rms, jerk_peak, both _times_expert, and for each episode trials, 1 or
0, and jerk_peaks), over_ros (chunks, and how many of them were planned at another age than the delay says),
quantisation (what is in low precision, and what of it is simulated; else null), seconds.
Exit status 1 where --at-least is given and the last setting's rate is below it.
"""

from __future__ import annotations

import argparse
import json
import time
from math import ceil
from pathlib import Path
from typing import Any

from pi05_ros.cli.options import count_list, positive
from pi05_ros.cli.report import Report, console, progress, table
from pi05_ros.errors import ConfigError

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
    group.add_argument("--shuffle-state", action="store_true",
                       help="tell the policy of each joint that it is where the one before it is")
    group = parser.add_argument_group("loop")
    group.add_argument("--steps", type=count_list, default=(10,), metavar="N,...",
                       help="denoising steps, several to compare (default: 10)")
    group.add_argument("--delay-ms", type=delays, default=(0.0,), metavar="MS,...",
                       help="from observation to first command, several to compare; rounded up to control steps "
                            "(default: 0)")
    group.add_argument("--chunk-mode", type=modes, default=("delay_aware",), metavar="MODE,...",
                       help="how chunks join: plain, delay_aware, guided, trained, ensembled; several to compare "
                            "(default: delay_aware)")
    group.add_argument("--execute", type=positive, default=10, metavar="N",
                       help="control steps between two observations (default: 10)")
    group.add_argument("--over-ros", action="store_true",
                       help="through the node in a process of its own, over DDS, one episode at a time")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="pictures of some episodes of the last setting")
    parser.add_argument("--against", type=Path, metavar="FILE.json", help="an earlier run to hold this one against")
    parser.add_argument("--at-least", type=float, metavar="RATE", help="gate: exit status 1 below it")


def delays(text: str) -> tuple[float, ...]:
    numbers = tuple(float(part) for part in text.split(","))
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"expected milliseconds from 0 on, received {text}")
    return numbers


def modes(text: str) -> tuple[str, ...]:
    from pi05_ros.runtime.joining import CHUNK_MODES

    words = tuple(text.split(","))
    if unknown := [word for word in words if word not in CHUNK_MODES]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(CHUNK_MODES)}, received {unknown[0]}")
    return words


def run(args: argparse.Namespace) -> Report:
    from pi05_ros.model.quant_config import read_quantisation
    from pi05_ros.schema import CAMERAS
    from pi05_ros.sim.contact_sheet import save_contact_sheet
    from pi05_ros.sim.demonstrations import seeded_task
    from pi05_ros.sim.episode import Ablation
    from pi05_ros.sim.evaluation import Evaluation, run_all
    from pi05_ros.sim.scores import compare, score
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
    if args.over_ros and (args.expert or args.shuffle_state or args.workers > 1):
        raise ConfigError("--over-ros", expected="neither --expert, --shuffle-state nor --workers",
                          received="one of them", way_out="Run them in process.")
    earlier = read_earlier(args.against, args.first, len(seeds), kinds) if args.against else None
    begun, period = time.monotonic(), load_robot("tabletop").control_period_s
    ablation = Ablation(args.mask, args.wrong_colour, args.shuffle_state)
    evaluation = Evaluation(str(args.checkpoint) if args.checkpoint else None, settings_of(args, period), args.backend,
                            args.device, args.dtype, args.horizon, args.batch, ablation, args.sheet is not None)
    tasks = {seed: seeded_task(seed, kinds) for seed in seeds}
    with progress("evaluating") as update:
        if args.over_ros:
            from pi05_ros.sim.over_ros import run_over_ros

            ((expert, *trials), rows), moments = run_over_ros(evaluation, tasks, update)
        else:
            (expert, *trials), rows = run_all(evaluation, tasks, args.workers, update)
    best = score(expert)
    settings = compare(trials, evaluation.loops, expert, period, earlier) if trials else [best]
    quantised = read_quantisation(args.checkpoint) if args.checkpoint and args.checkpoint.is_dir() else None
    precision = quantised.summary() if quantised else None
    table(f"{'expert' if args.expert else args.checkpoint}: {len(seeds)} held-out episodes"
          + (f", {precision}" if precision else ""),
          ("mode", "steps", "delay [s]", "success", "95 %",
           f"against {args.against or 'the last'}", "jerk RMS, x expert", "peak, x expert"),
          [("expert", "", "", *rate(best), "", f"{best['jerk_rms']:.0f}", f"{best['jerk_peak']:.0f}"),
           *((one["mode"], one["steps"], f"{one['delay_s']:.2f}", *rate(one),
              "{:+.1%} ({:+.1%} to {:+.1%})".format(*one["difference"]),
              *("{:.0f}, {:.2f} ({:.2f} to {:.2f})".format(one[name], *one[f"{name}_times_expert"])
                for name in ("jerk_rms", "jerk_peak"))) for one in settings if trials)])
    if args.sheet:
        save_contact_sheet(args.sheet, rows)
        console.print(f"pictures: {args.sheet}", highlight=False)
    ok = args.at_least is None or settings[-1]["rate"] >= args.at_least
    return Report(ok=ok, data={
        "episodes": len(seeds), "first": args.first, "kinds": list(kinds), "expert": best, "settings": settings,
        "execute": args.execute, "wrong_colour": args.wrong_colour, "mask": args.mask,
        "shuffle_state": args.shuffle_state, "over_ros": vars(moments) if args.over_ros else None,
        "quantisation": precision, "seconds": time.monotonic() - begun})


def settings_of(args: argparse.Namespace, period_s: float) -> tuple[Any, ...]:
    """A Loop for each combination; the last option varies fastest."""
    from pi05_ros.runtime.joining import JoinSettings
    from pi05_ros.sim.episode import Loop

    return tuple(Loop(steps, args.execute, ceil(delay_ms * 1e-3 / period_s - 1e-9), join=JoinSettings(mode))
                 for mode in args.chunk_mode for delay_ms in args.delay_ms for steps in args.steps)


def read_earlier(file: Path, first: int, episodes: int, kinds: tuple[str, ...]) -> list[bool]:
    """The successes of the last setting of an earlier run. Raises ConfigError for other episodes, or another file."""
    try:
        run = json.loads(file.read_text())
        same = (run["first"], run["episodes"], run["kinds"]) == (first, episodes, list(kinds))
        trials = [bool(one) for one in run["settings"][-1]["trials"]]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError("--against", expected="a JSON file of pi05 evaluate", received=f"{file}: {error!r}",
                          way_out="Make one with --json FILE.") from error
    if not same or len(trials) != episodes:
        raise ConfigError("--against", expected="a run of the same episodes", received=f"{run['episodes']} from "
                          f"{run['first']} on, of {', '.join(run['kinds'])}",
                          way_out="Run both with the same --first, --episodes and --tasks.")
    return trials


def rate(one: dict[str, Any]) -> tuple[str, str]:
    return f"{one['rate']:.1%}", f"{one['low']:.1%} to {one['high']:.1%}"
