"""Compares a quantised checkpoint with the one it was made from: the same observations, the same noise. First it proves
that they are two models: that the weights of every quantised layer differ, and that the quantised products ran.

Without QUANTIZED the recipe is applied in memory (--recipe), to random weights too: with --outliers they have the few
large channels of trained models. --episodes also counts successes on the simulated arm, the same episodes and noise
for both. Exit status 1 where a gate fails: the recipe's limits of error and cosine on the worst observation, a layer
that did not run or change, success more than --allow points lower at the low end of the 95 % interval.

The last line of output is a JSON object: recipe, runs_as, simulated, stages {stage: differences}, steps, layers,
worst_layer, runs (layers by how they ran), success, gates.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pi05_ros.benchmark.findings import Findings, Gate, Table
from pi05_ros.cli import calibration_options
from pi05_ros.cli.calibration_options import SOURCES, Subject, calibrated, observations, open_subject
from pi05_ros.cli.options import positive
from pi05_ros.cli.report import Report, console, progress, table
from pi05_ros.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from pi05_ros.model.pi05 import Pi05
    from pi05_ros.model.quant_config import Quantisation
    from pi05_ros.quantize.recipes import Recipe
    from pi05_ros.quantize.validate import Comparison

HELP = "prove and measure what quantisation changed"
FRESH = 1_000_003  # added to the seed: observations that no calibration has seen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("quantized", type=Path, nargs="?", metavar="QUANTIZED", help="output of `pi05 quantize`")
    parser.add_argument("--recipe", metavar="NAME", help="instead of QUANTIZED: apply this one in memory")
    parser.add_argument("--calibration", default="synthetic", metavar="SOURCE", help="with --recipe: " + SOURCES)
    parser.add_argument("--samples", type=positive, default=16, metavar="N", help="with --recipe: to calibrate with")
    parser.add_argument("--observations", default="synthetic", metavar="SOURCE",
                        help=f"to compare on: {SOURCES} (default: synthetic)")
    parser.add_argument("--count", type=positive, default=8, metavar="N", help="observations (default: 8)")
    parser.add_argument("--steps", type=positive, default=10, metavar="N", help="denoising steps (default: 10)")
    calibration_options.add_options(parser)
    group = parser.add_argument_group("gates")
    group.add_argument("--max-error", type=float, metavar="X", help="of the actions (default: as the recipe declares)")
    group.add_argument("--min-cosine", type=float, metavar="X", help="of the actions (default: as the recipe declares)")
    group.add_argument("--episodes", type=int, default=0, metavar="N",
                       help="held-out episodes on the simulated arm (default: 0, none)")
    group.add_argument("--workers", type=positive, default=1, metavar="N", help="processes for them (default: 1)")
    group.add_argument("--allow", type=float, default=2.0, metavar="POINTS", help="of lost success (default: 2)")


def run(args: argparse.Namespace) -> Report:
    from pi05_ros.quantize.recipes import find_recipe
    from pi05_ros.quantize.validate import compare

    if bool(args.quantized) == bool(args.recipe):
        raise ConfigError("validate-quantized", expected="QUANTIZED or --recipe", way_out="Give one of them.",
                          received="both" if args.recipe else "neither")
    if args.episodes and not (args.quantized and args.checkpoint):
        raise ConfigError("--episodes", expected="QUANTIZED, and the --checkpoint it was made from",
                          received="a model in memory", way_out="Write it with `pi05 quantize` first.")
    subject = open_subject(args)
    quantised, quantisation = _quantised(args, subject)
    recipe = find_recipe(quantisation.recipe)
    samples = observations(args, subject.source, args.observations, args.count, args.seed + FRESH)
    with progress("comparing") as update:
        found = compare(subject.model, quantised, samples, args.steps, subject.resize, update)
    success = _success(args) if args.episodes else None
    findings = report(args, recipe, quantisation, found, success)
    for one in findings.tables:
        table(one.title, one.columns, one.rows)
    for gate in findings.gates:
        console.print(("held: " if gate.ok else "FAILED: ") + str(gate), highlight=False, markup=False)
    return Report(ok=findings.ok, data=findings.as_data())


def _quantised(args: argparse.Namespace, subject: Subject) -> tuple[Pi05, Quantisation]:
    """From the directory, by the ordinary loader; or made here."""
    from pi05_ros.model.checkpoint import open_checkpoint
    from pi05_ros.model.weights import load
    from pi05_ros.quantize import ptq
    from pi05_ros.quantize.recipes import assign, find_recipe, linear_names

    if args.quantized:
        opened = open_checkpoint(args.quantized, action_horizon=subject.model.config.action_horizon)
        if opened.quantisation is None:
            raise CheckpointError(str(args.quantized), expected="a quantised checkpoint",
                                  received="no quant_config.json", way_out="Make one with `pi05 quantize`.")
        with progress("loading the quantised one") as update:
            return load(opened, subject.device, args.dtype, on_progress=update), opened.quantisation
    recipe, model = find_recipe(args.recipe), subject.model
    statistics = calibrated(args, subject, args.calibration, args.samples)
    chosen = assign(recipe, linear_names(model))
    layers = ptq.quantise(model, chosen, ptq.maxima(model, chosen, statistics))
    return ptq.with_layers(model, layers), ptq.described(recipe, layers, "in memory", statistics.made)


def report(args: argparse.Namespace, recipe: Recipe, quantisation: Quantisation, found: Comparison,
           success: dict[str, Any] | None) -> Findings:
    max_error = recipe.max_error if args.max_error is None else args.max_error
    min_cosine = recipe.min_cosine if args.min_cosine is None else args.min_cosine
    gates = [Gate("quantised layers that did not run", float(len(found.idle)), 0.0),
             Gate("quantised layers with the weights they had", float(len(found.unchanged)), 0.0),
             Gate("largest relative error of the actions", found.largest("actions"), max_error),
             Gate("largest 1 - cosine of the actions", found.largest("actions", "one_minus_cosine"), 1 - min_cosine)]
    if success:
        gates.append(Gate("success lost, points, at the low end", -100 * success["difference"][1], args.allow))
    worst = found.layers[found.worst_layer]
    ran = ", ".join(f"{count} layers {how}" for how, count in found.runs.items())
    tables = [
        Table(f"{quantisation.summary()}; ran: {ran}",
              ("stage", "mean square", "relative, median", "worst", "1 - cosine"),
              [(stage, *(f"{x:.2e}" for x in (np.median([one.mean_square for one in of]),
                                              np.median([one.relative for one in of]), found.largest(stage),
                                              found.largest(stage, "one_minus_cosine"))))
               for stage, of in found.stages.items()]),
        Table("actions after each denoising step", ("step", "mean square", "relative, median", "worst"),
              [(str(step + 1), *(f"{x:.2e}" for x in (np.median([one.mean_square for one in of]),
                                                      np.median([one.relative for one in of]),
                                                      max(one.relative for one in of))))
               for step, of in enumerate(zip(*found.steps, strict=True))]),
        Table("layers", ("worst layer", "its output", "its weight"),
              [(found.worst_layer, f"{worst.output or 0.0:.2%}", f"{worst.weight:.2%}")])]
    if success:
        tables.append(Table("simulated arm", ("", "success", "difference, 95 %"), [
            ("before", f"{success['before']:.1%}", ""),
            ("quantised", f"{success['after']:.1%}", "{:+.1%} ({:+.1%} to {:+.1%})".format(*success["difference"]))]))
    return Findings(tables, {"recipe": recipe.name, "runs_as": quantisation.summary(), **found.as_data(),
                             "observations": args.observations, "outliers": args.outliers, "success": success}, gates)


def _success(args: argparse.Namespace) -> dict[str, Any]:
    """Both checkpoints on the same held-out episodes, through `pi05 evaluate`'s code."""
    from pi05_ros.sim.closed_loop import Loop
    from pi05_ros.sim.demonstrations import seeded_task
    from pi05_ros.sim.evaluation import Evaluation, run_all
    from pi05_ros.sim.success import paired_difference
    from pi05_ros.sim.tasks import HELD_OUT_SEEDS, parse_kinds

    tasks = {seed: seeded_task(seed, parse_kinds(None)) for seed in HELD_OUT_SEEDS[:args.episodes]}
    won: list[list[bool]] = []
    for checkpoint in (args.checkpoint, args.quantized):
        evaluation = Evaluation(str(checkpoint), (Loop(args.steps, 10, 0),), device=args.device, dtype=args.dtype,
                                horizon=args.horizon)
        with progress(f"episodes of {checkpoint}") as update:
            trials, _ = run_all(evaluation, tasks, args.workers, update)
        won.append([trial.success for trial in trials[0]])
    before, after = won
    return {"episodes": len(tasks), "before": float(np.mean(before)), "after": float(np.mean(after)),
            "difference": list(paired_difference(after, before)), "trials": [list(map(int, one)) for one in won]}
