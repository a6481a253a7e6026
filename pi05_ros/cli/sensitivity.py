"""Two tables that recipes follow from. Each group of layers alone in each low precision: its error of the actions, and
the bytes it saves. And the calibration: the recipe's error after 8, 64, 512 observations of each source.

The last line of output is a JSON object: groups {group: {precision: median, worst, saved_bytes}}, calibration [{source,
samples, median, worst, smaller_scales: share of the layers whose scale was still below the last by more than 1 %}].
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pi05_ros.cli import calibration_options
from pi05_ros.cli.calibration_options import SOURCES, calibrated, observations, open_subject
from pi05_ros.cli.options import count_list, positive
from pi05_ros.cli.report import Report, progress, table

HELP = "what each group of layers costs in low precision"
FRESH = 1_000_003  # added to the seed: observations that no calibration has seen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="fp8", metavar="NAME", help="of the table of calibrations (default: fp8)")
    parser.add_argument("--calibration", default="synthetic", metavar="SOURCE,...",
                        help=f"several to compare; the first is the groups': {SOURCES} (default: synthetic)")
    parser.add_argument("--samples", type=count_list, default=(8, 64), metavar="N,...",
                        help="of the table of calibrations; the groups are calibrated with the last (default: 8,64)")
    parser.add_argument("--observations", default="synthetic", metavar="SOURCE", help="to measure errors on")
    parser.add_argument("--count", type=positive, default=4, metavar="N", help="of them (default: 4)")
    parser.add_argument("--steps", type=positive, default=10, metavar="N", help="denoising steps (default: 10)")
    calibration_options.add_options(parser)


def run(args: argparse.Namespace) -> Report:
    from pi05_ros.model.low_precision import PRECISIONS
    from pi05_ros.quantize.recipes import find_recipe
    from pi05_ros.quantize.sensitivity import calibration_effects, group_effects

    recipe, subject = find_recipe(args.recipe), open_subject(args)
    samples = observations(args, subject.source, args.observations, args.count, args.seed + FRESH)
    statistics = {source: calibrated(args, subject, source, max(args.samples))
                  for source in args.calibration.split(",")}
    with progress("groups alone") as update:
        groups = group_effects(subject.model, next(iter(statistics.values())), samples, args.steps, PRECISIONS,
                               subject.resize, update)
    with progress("calibrations") as update:
        calibrations = calibration_effects(subject.model, recipe, statistics, args.samples, samples, args.steps,
                                           subject.resize, update)
    table(f"each group alone, {args.count} observations ({args.observations}), simulated where no tensor core runs it",
          ("group", *(text for p in PRECISIONS for text in (p, "worst", "saves [MB]"))),
          [(group, *(text for p in PRECISIONS for text in
                     (f"{of[p].median:.2e}", f"{of[p].worst:.2e}", f"{of[p].saved_bytes / 1e6:.1f}")))
           for group, of in groups.items()])
    table(f"recipe {recipe.name} by calibration",
          ("source", "observations", "median", "worst", "layers with less range"),
          [(source, count, f"{one.median:.2e}", f"{one.worst:.2e}", f"{smaller:.0%}")
           for (source, count), (one, smaller) in calibrations.items()])
    return Report(ok=True, data={
        "groups": {group: {p: asdict(one) for p, one in of.items()} for group, of in groups.items()},
        "recipe": recipe.name, "observations": args.observations, "outliers": args.outliers,
        "calibration": [{"source": source, "samples": count, "median": one.median, "worst": one.worst,
                         "smaller_scales": smaller} for (source, count), (one, smaller) in calibrations.items()]})
