"""Options that every verb spells the same way."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pi05_ros.model.weights import WeightSource


def add_model_options(parser: argparse.ArgumentParser, backend: bool = True) -> None:
    """Which model, where, in which precision; `backend=False` where a verb names its backends another way."""
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", type=Path, metavar="PATH", help="checkpoint directory or file, or the name of "
                       "one that comes with the package: tabletop")
    group.add_argument("--size", choices=("tiny", "full"), default="tiny",
                       help="without --checkpoint: size of the model with random weights (default: tiny)")
    if backend:
        group.add_argument("--backend", default="eager", metavar="NAME",
                           help="one name, or vision=...,prefix=...,expert=... (default: eager)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<number> (default: auto)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    group.add_argument("--horizon", type=positive, metavar="H", help="actions in a chunk (default: as the model says)")
    group.add_argument("--seed", type=int, default=0,
                       help="of inputs and noise, never of weights (default: %(default)s)")


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """The shape of one inference."""
    group = parser.add_argument_group("shape")
    group.add_argument("--cameras", type=int, default=3, metavar="N", help="cameras that are there (default: 3)")
    group.add_argument("--tokens", type=int, metavar="L", help="valid prompt tokens (default: all slots)")
    group.add_argument("--steps", type=positive, default=10, metavar="N", help="denoising steps (default: 10)")


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, received {number}")
    return number


def positive_number(text: str) -> float:
    """A number above 0, for argparse."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, received {text}")
    return number


def float_list(text: str) -> tuple[float, ...]:
    """Numbers above 0 separated by commas, for argparse."""
    return tuple(positive_number(part) for part in text.split(","))


def count_list(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on separated by commas, for argparse."""
    return tuple(positive(part) for part in text.split(","))


def weight_source(args: argparse.Namespace, device: torch.device) -> WeightSource:
    """The checkpoint, or random weights of the size asked for."""
    from dataclasses import replace

    from pi05_ros.benchmark.setting import random_source
    from pi05_ros.config import Pi05Config, tiny_config
    from pi05_ros.model.checkpoint import open_checkpoint
    from pi05_ros.model.recipe import RecipeSource

    if args.checkpoint:
        return open_checkpoint(args.checkpoint, action_horizon=args.horizon)
    config = tiny_config() if args.size == "tiny" else Pi05Config()
    config = replace(config, action_horizon=args.horizon) if args.horizon is not None else config
    if "tensorrt" in f"{getattr(args, 'backend', '')} {getattr(args, 'backends', '')}":
        return RecipeSource(config)  # what engines were exported from; a GPU draws other numbers
    return random_source(config, device)
