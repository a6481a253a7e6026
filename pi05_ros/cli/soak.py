"""The real node, in this process and on a simulated clock, under seeded faults: messages lost, late, doubled, damaged
or contradictory, clock jumps, parameter storms, prompts, lifecycle transitions, and a policy that fails.

A simulated controller executes every published trajectory, and what it executes is judged: nothing that is not finite,
beyond a limit, too fast, stale or of a past activation. The same seed is the same run.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

from pi05_ros.cli.options import positive
from pi05_ros.cli.report import Report, console, progress, table

HELP = "inject faults into the node and judge what a simulated robot executes"
PIECES = 20  # standing is looked at after each
WARM_UP = 5  # pieces until threads, descriptors and memory have settled
MEMORY_A_CYCLE = 100  # bytes that may be gained: a leak of one small object does more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cycles", type=positive, default=20_000, help="control periods (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: 0)")
    parser.add_argument("--share", type=float, default=0.1, help="of the cycles that have a fault (default: 0.1)")
    parser.add_argument("--robot", default="arm6", help="robot name or YAML file (default: arm6)")


def run(args: argparse.Namespace) -> Report:
    import rclpy
    from rclpy.logging import LoggingSeverity, get_logger_level, set_logger_level

    from pi05_ros.sim.accounts import span
    from pi05_ros.sim.soak import Soak

    rclpy.init()
    spoken = get_logger_level("pi05_policy")
    set_logger_level("pi05_policy", LoggingSeverity.FATAL)  # thousands of injected errors are no news
    began_s, standing = time.monotonic(), []
    try:
        soak = Soak(args.robot, args.seed, args.share)
        with progress("soaking") as update:
            for piece in range(PIECES):
                found = soak.run(args.cycles * (piece + 1) // PIECES - args.cycles * piece // PIECES)
                standing.append(_standing())
                update(piece + 1, PIECES)
        accounts = soak.compared()
        soak.close()
    finally:
        set_logger_level("pi05_policy", spoken)
        rclpy.try_shutdown()
    problems = [f"{what}, {found.counts[what]} times, first in {first}" for what, first in found.violations.items()]
    problems += grown(standing, args.cycles)
    data = {"cycles": args.cycles, "seed": args.seed, "seconds": round(time.monotonic() - began_s, 1),
            "trajectories": found.trajectories, "fastest": round(found.fastest, 3), "standing": standing[-1]}
    table("Soak", ("what", "value"), data.items())
    table("Injected", ("fault", "times"), sorted(found.injected.items()))
    table("Found again in /diagnostics", ("faults", "counter", "expected", "counted"),
          sorted((a.faults, a.counter, span(a), a.found) for a in accounts))
    for problem in problems:
        console.print(f"[bold red]failed:[/] {problem}", highlight=False)
    return Report(ok=not problems, data={**data, "injected": dict(found.injected),
                                         "accounts": {a.counter: [a.low, a.high, a.found] for a in accounts},
                                         "problems": problems})


def grown(standing: list[dict[str, int]], cycles: int) -> list[str]:
    """What became more between the end of the warm-up and the end."""
    first, last = standing[WARM_UP], standing[-1]
    allowed = {"threads": 0, "descriptors": 0, "memory": MEMORY_A_CYCLE * cycles + 2**20}
    return [f"{what} grew from {first[what]} to {last[what]}" for what, more in allowed.items()
            if last[what] - first[what] > more]


def _standing() -> dict[str, Any]:
    """Threads, descriptors and resident bytes of this process, as Linux counts them."""
    import os
    from pathlib import Path

    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"threads": len(os.listdir("/proc/self/task")), "descriptors": len(os.listdir("/proc/self/fd")),
            "memory": pages * os.sysconf("SC_PAGE_SIZE")}
