"""The real node on a simulated clock under seeded faults: messages lost, late, doubled, damaged or contradictory, clock
jumps, parameter storms, prompts, lifecycle transitions, and a policy that fails. In this process on one thread, or with
--dds in a process of its own that is also killed, with publishers that end and begin anew.

A simulated controller executes every published trajectory, and what it executes is judged: nothing that is not finite,
beyond a limit, too fast, stale or of a past activation. Every fault must be found again in /diagnostics. Without --dds
the same seed is the same run.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from pathlib import Path
from typing import Any

from pi05_ros.cli.options import positive
from pi05_ros.cli.report import Report, console, progress, table
from pi05_ros.errors import ConfigError

HELP = "inject faults into the node and judge what a simulated robot executes"
LONG_S = 120.0  # simulated, from which on what grows in a node's process is judged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cycles", type=positive, default=20_000, help="control periods (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: 0)")
    parser.add_argument("--share", type=float, default=None,
                        help="of the cycles that have a fault (default: 0.1; with --dds 0.04)")
    parser.add_argument("--robot", default="arm6", help="robot name or YAML file (default: arm6)")
    parser.add_argument("--dds", type=positive, metavar="SECONDS",
                        help="the node in a process of its own, over DDS, for so many simulated seconds; Linux")
    parser.add_argument("--speed", type=float, default=5.0, help="with --dds: simulated seconds a second (default: 5)")
    parser.add_argument("--picture", type=Path, metavar="FILE",
                        help="with --dds: memory, threads and descriptors of the node over time, as a PNG")


def run(args: argparse.Namespace) -> Report:
    if args.picture and not args.dds:
        raise ConfigError("--picture", expected="--dds beside it", received="a soak in this process",
                          way_out="Add --dds SECONDS, or leave it out.")
    return over_dds(args) if args.dds else in_process(args)


def in_process(args: argparse.Namespace) -> Report:
    import rclpy
    from rclpy.logging import LoggingSeverity, get_logger_level, set_logger_level

    from pi05_ros.sim.soak import Soak
    from pi05_ros.sim.standing import PIECES, grown, standing

    rclpy.init()
    spoken = get_logger_level("pi05_policy")
    set_logger_level("pi05_policy", LoggingSeverity.FATAL)  # thousands of injected errors are no news
    began_s, stood = time.monotonic(), []
    try:
        soak = Soak(args.robot, args.seed, 0.1 if args.share is None else args.share)
        with progress("soaking") as update:
            for piece in range(PIECES):
                soak.run(args.cycles * (piece + 1) // PIECES - args.cycles * piece // PIECES)
                gc.collect()
                stood.append(standing())
                update(piece + 1, PIECES)
        accounts = soak.compared()
        soak.close()
    finally:
        set_logger_level("pi05_policy", spoken)
        rclpy.try_shutdown()
    data = {"cycles": args.cycles, "seed": args.seed, "seconds": round(time.monotonic() - began_s, 1),
            "standing": stood[-1]}
    return _report(soak.found, data, grown(stood, args.cycles), accounts)


def over_dds(args: argparse.Namespace) -> Report:
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    from pi05_ros.sim.standing import draw, grown, in_pieces
    from pi05_ros.sim.wire_soak import WireSoak

    began_s = time.monotonic()
    soak = WireSoak(args.robot, args.seed, 0.04 if args.share is None else args.share, args.speed,
                    lambda line: console.print(line, highlight=False))
    try:
        soak.run(args.dds)
    finally:
        soak.close()
    life_s = soak.life_s
    long = life_s >= LONG_S
    problems = grown(in_pieces(soak.first_life), round(life_s / soak.period_s)) if long else []
    if args.picture:
        draw(soak.standing, soak.starts, args.picture, f"{soak.seconds:.0f} simulated seconds under faults over DDS")
    seconds, judge = time.monotonic() - began_s, soak.judge
    data = {"simulated_seconds": round(soak.seconds, 1), "seed": args.seed, "seconds": round(seconds, 1),
            "speed": round(soak.seconds / seconds, 2), "node_processes": len(soak.starts),
            "first_life_s": round(life_s, 1), "growth_judged": long, "late_commands": judge.late,
            "refused_by_controller": judge.refused, "samples_excused": judge.excused,
            "longest_on_the_way_s": round(judge.longest_s, 3), "counted": dict(sorted(soak.counted.items()))}
    return _report(soak.found, data, problems, soak.accounts())


def _report(found: Any, data: dict[str, Any], problems: list[str], accounts: list[Any]) -> Report:
    from pi05_ros.sim.accounts import span

    data |= {"trajectories": found.trajectories, "fastest": round(found.fastest, 3)}
    problems = [f"{what}, {found.counts[what]} times, first at {first}"
                for what, first in found.violations.items()] + problems
    table("Soak", ("what", "value"), [(what, value) for what, value in data.items() if what != "counted"])
    table("Injected", ("fault", "times"), sorted(found.injected.items()))
    table("Found again in /diagnostics", ("faults", "counter", "expected", "counted"),
          sorted((a.faults, a.counter, span(a), a.found) for a in accounts))
    for problem in problems:
        console.print("[bold red]failed:[/]", problem, highlight=False, markup=True)
    return Report(ok=not problems, data={**data, "injected": dict(found.injected),
                                         "accounts": {a.counter: [a.low, a.high, a.found] for a in accounts},
                                         "problems": problems})
