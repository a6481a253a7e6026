"""Learns a small pi0.5 from the episodes in every DATASET (pi05_ros/train/dataset.py describes them) and writes it to
--output as a checkpoint that every other verb reads. The same command again goes on where the last one stopped, after
--minutes or an interruption; on a CPU the result is the same bits either way.

The last line of output is a JSON object: step, steps, finished, loss (flow matching, of the last steps), goal_loss and
scene_loss (of the guesses of the episode's last action and of where things are), action_error, goal_error, scene_error
and, with --held-out, the same after held_out_ (root mean squares, normalised, of the averaged weights), parameters,
checkpoint_bytes, frames, steps_per_second, checkpoint.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from pathlib import Path

from pi05_ros.cli.options import positive, positive_number
from pi05_ros.cli.report import Report, console, progress, table
from pi05_ros.train.presets import PRESETS, TrainSettings

HELP = "train a small pi0.5 on recorded episodes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, nargs="+", metavar="DATASET", help="directory of recorded episodes; "
                        "several are learnt as one, in this order")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR",
                        help="directory of the checkpoint and of the run's state")
    parser.add_argument("--robot", metavar="NAME", help="robot name or YAML file (default: as the data set says)")
    parser.add_argument("--config", choices=tuple(PRESETS), default="small", help="size of the model (default: small)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<number> (default: auto)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16",
                        help="of the checkpoint's numbers (default: bfloat16)")
    parser.add_argument("--minutes", type=positive_number, metavar="M",
                        help="stop after so long, loading included; the same command goes on (default: never)")
    parser.add_argument("--held-out", type=int, default=0, metavar="N",
                        help="last episodes that are not learnt but measured (default: 0)")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the losses: a minute to begin with, then faster")
    group = parser.add_argument_group("run", "a run is resumed only under the same ones")
    group.add_argument("--horizon", type=positive, default=50, metavar="H", help="actions in a chunk (default: 50)")
    group.add_argument("--steps", type=positive, default=30_000, metavar="N", help="in all (default: 30000)")
    group.add_argument("--batch", type=positive, default=128, metavar="B", help="samples a step (default: 128)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--learning-rate", type=positive_number, default=1e-3, help="its peak (default: 0.001)")
    group.add_argument("--warmup", type=int, default=500, metavar="N", help="steps up to it (default: 500)")
    group.add_argument("--weight-decay", type=float, default=0.01, help="of matrices (default: 0.01)")
    group.add_argument("--clip-norm", type=positive_number, default=1.0, help="of the gradient (default: 1)")
    group.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights (default: 0.999)")
    group.add_argument("--goal-weight", type=float, default=1.0, metavar="W",
                       help="of the guess of the episode's last action, beside the flow (default: 1)")
    group.add_argument("--scene-weight", type=float, default=1.0, metavar="W",
                       help="of the guess of where things are, if the data set knows (default: 1)")
    group.add_argument("--no-augment", dest="augment", action="store_false", help="leave the images as they are")
    group.add_argument("--precision", choices=("float32", "bfloat16"),
                             help="of the products (default: bfloat16 on a GPU, float32 on a CPU)")


def run(args: argparse.Namespace) -> Report:
    begun = time.monotonic()
    from pi05_ros.backends.base import check_device
    from pi05_ros.train.dataset import read_index
    from pi05_ros.train.run import prepare, train
    from pi05_ros.transforms.robot_loader import load_robot

    device = check_device(args.device)
    args.precision = args.precision or ("bfloat16" if device.type == "cuda" else "float32")
    settings = TrainSettings(**{field.name: getattr(args, field.name) for field in fields(TrainSettings)})
    robot = load_robot(args.robot or read_index(args.dataset[0])["robot"])
    prepared = prepare(args.dataset, robot, settings, progress, args.held_out)
    until = begun + 60 * args.minutes if args.minutes else float("inf")
    figures = train(prepared, settings, args.output, device, progress, until, args.dtype, args.compile)
    table(f"{args.config} on {len(prepared.samples)} frames", ("what", "value"),
          ((name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in figures.items()))
    if not figures["finished"]:
        console.print("Not finished: the same command again goes on.", highlight=False)
    return Report(ok=True, data={**figures, "checkpoint": str(args.output)})
