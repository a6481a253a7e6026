"""One observation through the whole policy, without ROS. Images left out are random noise of 480x640, so that the
path can be tried with nothing at hand; the result then means nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from pi05_ros.cli.options import add_model_options, positive
from pi05_ros.cli.report import Report, console, progress, table
from pi05_ros.errors import ConfigError

HELP = "one observation in, one chunk of actions out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--robot", default="arm6", help="robot name or YAML file (default: arm6)")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model, if the checkpoint has none")
    parser.add_argument("--image", action="append", default=[], metavar="CAMERA=FILE",
                        help="picture of a camera, e.g. base_0_rgb=view.png; repeat")
    parser.add_argument("--state", help="comma-separated joint positions (default: middle of the limits)")
    parser.add_argument("--prompt", default="pick up the red block")
    parser.add_argument("--steps", type=positive, default=10, help="denoising steps (default: 10)")


def run(args: argparse.Namespace) -> Report:
    from pi05_ros.runtime.policy import Policy
    from pi05_ros.schema import Observation

    with progress("loading weights") as update:
        policy = Policy.load(args.checkpoint, args.robot, args.backend, args.device, args.dtype, args.seed,
                             args.tokenizer, args.horizon, size=args.size, on_progress=update)
    robot = policy.robot
    images, rng = read_images(args.image), np.random.default_rng(args.seed)
    for camera in robot.cameras:
        if camera not in images:
            console.print(f"{camera}: no --image given, random noise instead", highlight=False)
            images[camera] = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
    if args.state:
        state = parse_state(args.state)
    else:
        state = np.array([0.5 * (j.lower + j.upper) for j in robot.joints] or [0.0] * robot.state_dim, np.float32)
    chunk = policy.infer(Observation(images, state, args.prompt), args.steps)
    names = [joint.name for joint in robot.joints] or [f"action {i}" for i in range(robot.action_dim)]
    table(f"{policy.summary()}: actions of '{args.prompt}'", ("t [s]", *names),
          [(f"{k * chunk.control_period_s:.2f}", *(f"{x:.3f}" for x in row)) for k, row in enumerate(chunk.actions)])
    return Report(ok=True, data={"actions": chunk.actions.tolist(), "stage_ms": dict(chunk.stage_times_ms),
                                 "prompt": chunk.prompt, "denoising_steps": chunk.num_steps, "seed": chunk.seed})


def parse_state(text: str) -> np.ndarray:
    """Comma-separated numbers to float32 [d]."""
    try:
        return np.array([float(number) for number in text.split(",")], np.float32)
    except ValueError as error:
        raise ConfigError("--state", expected="comma-separated numbers", received=repr(text),
                          way_out="For example --state 0,0.5,-1.2,0,0,0,0.02.") from error


def read_images(pairs: list[str]) -> dict[str, np.ndarray]:
    """CAMERA=FILE to uint8 [h, w, 3] RGB."""
    from PIL import Image

    images = {}
    for pair in pairs:
        camera, _, path = pair.partition("=")
        try:
            with Image.open(path) as picture:
                images[camera] = np.asarray(picture.convert("RGB"))
        except OSError as error:
            raise ConfigError("--image", expected="CAMERA=FILE with a readable picture", received=f"'{pair}': {error}",
                              way_out="For example --image base_0_rgb=view.png.") from error
    return images
