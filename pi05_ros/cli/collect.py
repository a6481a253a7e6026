"""Records seeded episodes of the simulated arm's scripted expert into DATASET for `pi05 train`; its layout is described
in pi05_ros/train/dataset.py. Needs MuJoCo (pip install 'pi05_ros[sim]') and an OpenGL library (sim/headless.py).

The same options give the same data, whatever --workers. The same command again goes on where the last one stopped; an
episode in which the expert failed is left out.

The last line of output is a JSON object: dataset, episodes, frames, failed (of this run), next_seed, bytes,
episodes_per_second.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from pi05_ros.cli.options import positive
from pi05_ros.cli.report import Report, progress, table
from pi05_ros.errors import ConfigError

HELP = "record demonstrations of the simulated arm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="directory, made if it is not there")
    parser.add_argument("--episodes", type=positive, default=2000, metavar="N",
                        help="in the data set at the end (default: 2000)")
    parser.add_argument("--tasks", metavar="KIND,...",
                        help="touch, left, right, forward, sideways (default: all, drawn evenly)")
    parser.add_argument("--image-size", type=positive, default=224, metavar="PIXELS",
                        help="of the stored frames; 112 is all that the small model reads (default: 224)")
    parser.add_argument("--frame-every", type=positive, default=2, metavar="N",
                        help="control steps between two samples (default: 2)")
    parser.add_argument("--astray", type=float, default=0.5, metavar="SHARE",
                        help="episodes that begin anywhere on the table, 0 to 1 (default: 0.5)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="of a new data set (default: 0)")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, metavar="N",
                        help="processes (default: one for each CPU)")


def run(args: argparse.Namespace) -> Report:
    from pi05_ros.schema import CAMERAS
    from pi05_ros.sim.demonstrations import Recording, demonstrations
    from pi05_ros.sim.tasks import TRAIN_SEEDS, parse_kinds
    from pi05_ros.train.dataset import INDEX, DatasetWriter, read_index

    recording = Recording(parse_kinds(args.tasks), args.image_size, args.frame_every, args.astray)
    first = args.first_seed
    if (args.dataset / INDEX).exists():
        first = read_index(args.dataset)["episodes"][-1]["seed"] + 1
    if first not in TRAIN_SEEDS:
        raise ConfigError("--first-seed", expected=f"0 to {TRAIN_SEEDS.stop - 1}; those above are for evaluation",
                          received=str(first), way_out="Begin with another seed.")
    begun, failed, seed = time.monotonic(), 0, first - 1
    with DatasetWriter(args.dataset, "tabletop", CAMERAS) as writer, progress("collecting") as update:
        before = writer.recorded
        missing = args.episodes - before
        source = demonstrations(recording, range(first, TRAIN_SEEDS.stop), min(args.workers, max(1, missing)))
        while writer.recorded < args.episodes:
            seed, episode = next(source)
            if episode is None:
                failed += 1
            else:
                writer.add(episode)
            update(writer.recorded - before, missing)
        source.close()  # type: ignore[attr-defined]  # ends the processes
        made = writer.recorded - before
    entries = read_index(args.dataset)["episodes"]
    figures = {"dataset": str(args.dataset), "episodes": len(entries), "frames": sum(e["frames"][1] - e["frames"][0]
               for e in entries), "failed": failed, "next_seed": seed + 1,
               "bytes": sum(file.stat().st_size for file in args.dataset.glob("*.npz")),
               "episodes_per_second": made / (time.monotonic() - begun)}
    counts = {kind: sum(entry["task"] == kind for entry in entries) for kind in recording.kinds}
    table("Collected", ("what", "value"), [*counts.items(), *((k, f"{v:.4g}" if isinstance(v, float) else v)
                                                              for k, v in figures.items())])
    return Report(ok=True, data={**figures, "tasks": counts})
