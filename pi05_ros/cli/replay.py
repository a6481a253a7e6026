"""Makes the chunks of a recorded run again, from the recorded inputs and with the recorded noise, and compares. The
same model on the same machine gives the same bits, and that is the gate. With another backend, precision, checkpoint or
number of steps they differ, and the gate is --tolerance, if given. A chunk whose inputs the bag lacks always fails.

With --against joints the bag may be any robot's, without our node: the policy looks at its inputs every --every
seconds, and is compared with what the joints did next.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pi05_ros.cli.options import positive
from pi05_ros.cli.report import Report, console, progress, table
from pi05_ros.errors import ConfigError

HELP = "make the chunks of a recorded run again and compare"
MODEL = ("checkpoint", "robot", "backend", "device", "dtype", "tokenizer", "size")  # parameters of the node


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bag", type=Path, help="bag directory or mcap file")
    parser.add_argument("--node", help="full name of the node (default: the bag's, or /pi05_policy)")
    parser.add_argument("--topics", type=Path, metavar="FILE", help="YAML map of topics (default: the bag's, if it "
                        "has one)")
    group = parser.add_argument_group("instead of what was recorded")
    for name in MODEL:
        group.add_argument(f"--{name}", metavar="VALUE", help=f"the node's parameter {name}")
    group.add_argument("--steps", type=positive, metavar="N", help="denoising steps")
    parser.add_argument("--against", choices=("chunks", "joints"), default="chunks",
                        help="what the chunks are compared with: those recorded (default), or the joints' motion")
    parser.add_argument("--every", type=float, default=0.5, metavar="S", help="of --against joints (default: 0.5)")
    parser.add_argument("--prompt", help="of --against joints, instead of the bag's")
    parser.add_argument("--tolerance", type=float, metavar="X",
                        help="largest error of an action that is no failure, the robot's units (default: the same "
                             "bits where nothing was changed)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots")


def run(args: argparse.Namespace) -> Report:
    try:
        from pi05_ros.bag.compare import compare
        from pi05_ros.bag.driven import driven_run
        from pi05_ros.bag.html import page
        from pi05_ros.bag.reader import read_about
        from pi05_ros.bag.replay import Run, read_run, replay
        from pi05_ros.bag.setup import load_policy
        from pi05_ros.bag.topics import topic_map, topics_told
    except ImportError as error:
        raise ConfigError("replaying", expected="ROS and the extra `bag`", received=str(error),
                          way_out="pip install 'pi05_ros[ros,bag]'") from error
    about = read_about(args.bag)
    node = args.node or about.get("node", "/pi05_policy")
    told = None if args.node or args.topics else topics_told(about)
    topics = told or topic_map(args.topics, node)
    changed: dict[str, Any] = {name: value for name in MODEL if (value := getattr(args, name)) is not None}
    driven = args.against == "joints"
    found = Run() if driven else read_run(args.bag, topics, node)
    policy = load_policy(found, changed, lambda line: console.print(line, highlight=False))
    if driven:
        horizon = policy.config.action_horizon
        found = driven_run(args.bag, topics, policy.robot, horizon, args.prompt, args.every)

    def counted():
        with progress("replaying") as update:
            for done, item in enumerate(replay(args.bag, topics, found, policy, args.steps)):
                update(done + 1, len(found.made))
                yield item

    names = tuple(j.name for j in policy.robot.joints) or tuple(f"action {i}" for i in range(policy.robot.action_dim))
    comparison = compare(counted(), names)
    if args.steps is not None:
        changed["steps"] = args.steps
    data = {"bag": str(args.bag), "against": args.against, "changed": changed, "tolerance": args.tolerance,
            **comparison.as_data(), "unreadable": dict(found.unreadable)}
    table(f"{args.bag}: {policy.summary()}", ("what", "value"), [
        ("chunks replayed", len(comparison.identical)), ("bit for bit the same", int(comparison.identical.sum())),
        ("not replayable", len(comparison.missing)), ("largest error", f"{comparison.largest:.3g}"),
        *((f"{which} p50", f"{ms['p50']:.2f} ms") for which in ("recorded", "replayed")
          if (ms := data[f"{which}_ms"]))])
    for why in list(comparison.missing)[:5]:
        console.print(f"not replayed: {why}", highlight=False, markup=False)
    if args.html:
        try:
            args.html.write_text(page(comparison, str(args.bag), policy.summary(), changed, args.against))
        except OSError as error:
            raise ConfigError("--html", expected="a file that can be written", received=str(error),
                              way_out="Choose another.") from error
    if args.tolerance is not None:
        within = comparison.largest <= args.tolerance
    else:
        within = bool(changed) or driven or comparison.identical.all()
    return Report(ok=bool(within) and not comparison.missing and not found.unreadable, data=data)
