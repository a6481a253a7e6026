"""Quantises a checkpoint by a recipe after calibrating it, and writes it to --output: low-precision weights, their
scales, quant_config.json, the statistics of the calibration, and summary.json. Every other verb reads the result by
--checkpoint, on a machine without ModelOpt too.

The same command again goes on where an interrupted calibration stopped. --calibration activations:FILE takes the
calibration.safetensors of an earlier run, which serves every recipe.

The last line of output is a JSON object: recipe, quantiser, calibration, coverage, layers {name: relative error of
weight and output}, worst_layer, bytes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi05_ros.cli import calibration_options
from pi05_ros.cli.calibration_options import SOURCES, calibrated, observations, open_subject
from pi05_ros.cli.options import positive
from pi05_ros.cli.report import Report, console, progress, table

if TYPE_CHECKING:
    from pi05_ros.model.pi05 import Pi05
    from pi05_ros.quantize.calibration import Statistics

HELP = "quantise a checkpoint by a recipe"
ERROR_SAMPLES = 2  # observations on which the layers' errors are measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, metavar="NAME", help="see `pi05 coverage`")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of the result")
    parser.add_argument("--calibration", default="synthetic", metavar="SOURCE",
                        help=f"{SOURCES}, or activations:FILE (default: synthetic)")
    parser.add_argument("--samples", type=positive, default=64, metavar="N", help="observations (default: 64)")
    parser.add_argument("--by", choices=("modelopt", "max"), default="modelopt",
                        help="who quantises: NVIDIA's ModelOpt, or the same largest absolute values without it")
    calibration_options.add_options(parser)


def run(args: argparse.Namespace) -> Report:
    from pi05_ros.quantize import modelopt, ptq
    from pi05_ros.quantize.calibration import STATISTICS
    from pi05_ros.quantize.coverage import coverage
    from pi05_ros.quantize.layer_errors import layer_errors, worst
    from pi05_ros.quantize.recipes import assign, find_recipe, linear_names
    from pi05_ros.quantize.save import save_quantised

    recipe = find_recipe(args.recipe)
    if args.by == "modelopt":
        modelopt.library()  # before anything takes time
    subject = open_subject(args)
    model = subject.model
    chosen = assign(recipe, linear_names(model))

    def calibrate(running: Pi05) -> Statistics:
        return calibrated(args, subject, args.calibration, args.samples, running, args.output / STATISTICS)

    if args.by == "modelopt":
        found, statistics = modelopt.modelopt_maxima(model, recipe, chosen, calibrate)
        quantiser = modelopt.version()
    else:
        statistics, quantiser = calibrate(model), "largest absolute values"
        found = ptq.maxima(model, chosen, statistics)
    with progress("quantising") as update:
        layers = ptq.quantise(model, chosen, found, update)
    quantisation = ptq.described(recipe, layers, quantiser, statistics.made)
    file = save_quantised(subject.source, model, layers, quantisation, args.output)
    statistics.save(args.output / STATISTICS)
    with progress("errors of the layers"):
        wanted = "synthetic" if args.calibration.startswith("activations:") else args.calibration
        samples = observations(args, subject.source, wanted, min(ERROR_SAMPLES, args.samples), args.seed)
        errors = layer_errors(model, layers, samples, subject.resize)
    covered = coverage(recipe, model.config)
    data: dict[str, Any] = {
            "recipe": recipe.name, "experimental": recipe.experimental, "quantiser": quantiser,
            "calibration": dict(statistics.made), "coverage": covered.as_data(), "bytes": file.stat().st_size,
            "layers": {name: asdict(error) for name, error in errors.items()}, "worst_layer": worst(errors),
            "runs_as": quantisation.summary(), "output": str(args.output)}
    (args.output / "summary.json").write_text(json.dumps(data, indent=1) + "\n")
    table(f"{args.output}", ("what", "value"), [
        ("layers", f"{len(layers)} of {covered.linears.total()} Linears ({covered.share:.1%})"),
        ("runs as", quantisation.summary()), ("quantised by", quantiser),
        ("calibration", f"{statistics.samples} observations, {statistics.made['observations']}"),
        ("weights file", f"{data['bytes'] / 1e6:,.1f} MB"),
        ("worst layer", f"{data['worst_layer']}: output off by {errors[worst(errors)].output:.2%}")])
    console.print("Next: pi05 validate-quantized " + str(args.output), highlight=False)
    return Report(ok=True, data=data)
