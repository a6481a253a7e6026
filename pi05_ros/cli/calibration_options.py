"""What the verbs of quantisation share: the model, and the observations that run through it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pi05_ros.cli.options import add_model_options, positive, weight_source
from pi05_ros.cli.report import progress
from pi05_ros.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from pi05_ros.model.pi05 import Pi05
    from pi05_ros.model.weights import WeightSource
    from pi05_ros.quantize.calibration import Statistics
    from pi05_ros.quantize.samples import Sample

SOURCES = "synthetic, dataset:DIR (episodes of `pi05 collect` or a recording), lerobot:DIR, bag:DIR"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, backend=False)
    group = parser.add_argument_group("observations")
    group.add_argument("--robot", metavar="NAME", help="robot of a bag or data set (default: as the data set says)")
    group.add_argument("--topics", type=Path, metavar="FILE", help="YAML map of a bag's topics, if remapped")
    group.add_argument("--node", default="/pi05_policy", help="of a bag: full name of the node (default: /pi05_policy)")
    group.add_argument("--batch", type=positive, default=4, metavar="B", help="observations at once (default: 4)")
    parser.add_argument("--outliers", type=float, metavar="FACTOR", help="with random weights: make a few channels of "
                        "the activations so much larger, without changing the actions; 32 is near trained models")


@dataclass(frozen=True)
class Subject:
    """The model before quantisation."""

    source: WeightSource
    model: Pi05
    device: torch.device
    resize: str


def open_subject(args: argparse.Namespace) -> Subject:
    """Load it whole; the robot's statistics if the checkpoint has those of several."""
    from pi05_ros.backends.base import check_device
    from pi05_ros.model.checkpoint import Checkpoint, open_checkpoint
    from pi05_ros.model.weights import load
    from pi05_ros.quantize.outliers import OutlierSource

    device = check_device(args.device)
    if args.checkpoint and args.robot:
        from pi05_ros.transforms.robot_loader import load_robot

        source: WeightSource = open_checkpoint(args.checkpoint, action_horizon=args.horizon,
                                               asset_id=load_robot(args.robot).asset_id)
    else:
        source = weight_source(args, device)
    if source.quantisation:
        raise ConfigError("--checkpoint", expected="a model before quantisation",
                          received=f"{args.checkpoint} ({source.quantisation.summary()})",
                          way_out="Give what it was made from.")
    if args.outliers:
        source = OutlierSource(source, args.outliers)
    with progress("loading") as update:
        model = load(source, device, args.dtype, on_progress=update)
    return Subject(source, model, device, source.conventions.resize if isinstance(source, Checkpoint) else "pil")


def observations(args: argparse.Namespace, source: WeightSource, wanted: str, count: int, seed: int) -> list[Sample]:
    """`wanted`: one of `SOURCES`. The first of them are those of a smaller count."""
    from pi05_ros.quantize.samples import synthetic

    kind, _, path = wanted.partition(":")
    if kind == "synthetic" and not path:
        return synthetic(source.config, count, seed)
    if kind not in ("dataset", "lerobot", "bag") or not path:
        raise ConfigError("observations", expected=SOURCES, received=repr(wanted), way_out="Give one of them.")
    from pi05_ros.quantize.recorded import bag_samples, dataset_samples, lerobot_samples, transforms_for
    from pi05_ros.train.dataset import read_index
    from pi05_ros.transforms.robot_loader import load_robot

    robot = args.robot or (read_index(path)["robot"] if kind == "dataset" else None)
    if robot is None:
        raise ConfigError("--robot", expected="the robot of the recording", received="nothing",
                          way_out="Give its name.")
    transforms = transforms_for(source, load_robot(robot))
    with progress(f"reading {path}"):
        if kind == "dataset":
            return dataset_samples(Path(path), transforms, count, seed)
        if kind == "lerobot":
            return lerobot_samples(Path(path), transforms, count, seed)
        return bag_samples(Path(path), transforms, count, seed, args.topics, args.node)


def calibrated(args: argparse.Namespace, subject: Subject, wanted: str, count: int, model: Pi05 | None = None,
               file: Path | None = None) -> Statistics:
    """Statistics of `wanted` observations, or those of an `activations:FILE`; `model`: to run instead of the subject's,
    with the same layers."""
    from pi05_ros.quantize.calibration import Statistics, calibrate

    kind, _, path = wanted.partition(":")
    if kind == "activations" and path:
        found = Statistics.read(Path(path))
        found.check_model(subject.model)
        return found
    samples = observations(args, subject.source, wanted, count, args.seed)
    made = {"observations": wanted, "seed": args.seed, "dtype": args.dtype, "outliers": args.outliers}
    with progress(f"calibrating with {wanted}") as update:
        return calibrate(model or subject.model, samples, made, args.batch, subject.resize, file, update)
