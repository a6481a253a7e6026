"""Compares a quantised checkpoint with the one it was made from: the same observations, the same noise. First it proves
that they are two models: that the weights of every quantised layer differ, and that the quantised products ran.

With --backend the quantised model is run by that backend, and compared stage by stage; how its layers ran is the
backend's own word, on a GPU beside a profile of its kernels. A layer that it does not multiply in FP8 fails (unless
such layers are at most --allow-wider of the quantised weights), and so do actions that are further off than 1.5 times
those of eager.

Without QUANTIZED the recipe is applied in memory (--recipe), to random weights too: with --outliers they have the few
large channels of trained models. --episodes also counts successes on the simulated arm, the same episodes and noise
for both. Exit status 1 where a gate fails: the recipe's limits of error and cosine on the worst observation, a layer
that did not run or change, success more than --allow points lower at the low end of the 95 % interval.

The last line of output is a JSON object: recipe, backend, runs_as, simulated, stages {stage: differences}, steps,
layers, worst_layer, runs (layers by how they ran), wider (layers), wider_share (of weights), kernels, success, gates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
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
    from pi05_ros.model.weights import WeightSource
    from pi05_ros.quantize.recipes import Recipe
    from pi05_ros.quantize.samples import Sample
    from pi05_ros.quantize.validate import Comparison

HELP = "prove and measure what quantisation changed"
OVER_EAGER = 1.5  # times the worst error of eager's own quantised run
SHOWN = 12  # kernels of the table; the JSON has all
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
    parser.add_argument("--backend", default="eager", metavar="NAME",
                        help="that runs the quantised model; 'cuda' wants --dtype bfloat16 (default: eager)")
    calibration_options.add_options(parser)
    group = parser.add_argument_group("gates")
    group.add_argument("--max-error", type=float, metavar="X", help="of the actions (default: as the recipe declares)")
    group.add_argument("--min-cosine", type=float, metavar="X", help="of the actions (default: as the recipe declares)")
    group.add_argument("--allow-wider", type=float, default=0.0, metavar="SHARE", help="of the quantised weights that "
                       "--backend says it multiplies in another form than FP8 (default: 0)")
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
    quantised, source = _quantised(args, subject)
    quantisation = source.quantisation
    assert quantisation is not None
    recipe = find_recipe(quantisation.recipe)
    samples = observations(args, subject.source, args.observations, args.count, args.seed + FRESH)
    with progress("comparing") as update:
        found = compare(subject.model, quantised, samples, args.steps, subject.resize, update)
    backend = _backend(args, subject, source, samples, found) if args.backend != "eager" else None
    success = _success(args) if args.episodes else None
    findings = report(args, recipe, quantisation, found, success, backend)
    for one in findings.tables:
        table(one.title, one.columns, one.rows)
    for gate in findings.gates:
        console.print(("held: " if gate.ok else "FAILED: ") + str(gate), highlight=False, markup=False)
    return Report(ok=findings.ok, data=findings.as_data())


@dataclass(frozen=True)
class OfBackend:
    """What a backend made of the quantised model; kernels: those of one vision and prefix on a GPU, as `pi05 benchmark
    profile` has them."""

    name: str
    found: Comparison
    kernels: list[dict[str, Any]]


def _backend(args: argparse.Namespace, subject: Subject, source: WeightSource, samples: Sequence[Sample],
             eager: Comparison) -> OfBackend:
    import torch

    from pi05_ros.backends import base
    from pi05_ros.benchmark.profile import by_name, record
    from pi05_ros.quantize.samples import OnDevice
    from pi05_ros.quantize.validate_backend import compare_backend

    with progress(f"loading {args.backend}") as update:
        built = base.build(args.backend, source, subject.device, args.dtype, subject.resize, update)
    with progress(f"comparing {args.backend}") as update:
        found = compare_backend(subject.model, built, samples, args.steps, eager, subject.resize, update)
    if subject.device.type != "cuda":
        return OfBackend(args.backend, found, [])
    batch = OnDevice.of(samples[:1], subject.device)
    with torch.no_grad():
        pixels = subject.model.prepare_images(batch.frames, subject.device, subject.resize)

    def work() -> None:
        built.prefix.prefill(built.vision.encode_images(pixels), batch.image_mask, batch.tokens, batch.token_mask)

    return OfBackend(args.backend, found, by_name(record(work, subject.device, 1), 1))


def _quantised(args: argparse.Namespace, subject: Subject) -> tuple[Pi05, WeightSource]:
    """From the directory, by the ordinary loader; or made here."""
    from pi05_ros.model.checkpoint import open_checkpoint
    from pi05_ros.model.weights import load
    from pi05_ros.quantize import ptq
    from pi05_ros.quantize.recipes import assign, find_recipe, linear_names
    from pi05_ros.quantize.source import QuantisedSource

    if args.quantized:
        opened = open_checkpoint(args.quantized, action_horizon=subject.model.config.action_horizon)
        if opened.quantisation is None:
            raise CheckpointError(str(args.quantized), expected="a quantised checkpoint",
                                  received="no quant_config.json", way_out="Make one with `pi05 quantize`.")
        with progress("loading the quantised one") as update:
            return load(opened, subject.device, args.dtype, on_progress=update), opened
    recipe, model = find_recipe(args.recipe), subject.model
    statistics = calibrated(args, subject, args.calibration, args.samples)
    chosen = assign(recipe, linear_names(model))
    layers = ptq.quantise(model, chosen, ptq.maxima(model, chosen, statistics))
    described = ptq.described(recipe, layers, "in memory", statistics.made)
    return ptq.with_layers(model, layers), QuantisedSource.of(subject.source, layers, described)


def report(args: argparse.Namespace, recipe: Recipe, quantisation: Quantisation, eager: Comparison,
           success: dict[str, Any] | None, backend: OfBackend | None) -> Findings:
    found = backend.found if backend else eager
    max_error = recipe.max_error if args.max_error is None else args.max_error
    min_cosine = recipe.min_cosine if args.min_cosine is None else args.min_cosine
    gates = [Gate("quantised layers that did not run", float(len(found.idle)), 0.0),
             Gate("quantised layers with the weights they had", float(len(found.unchanged)), 0.0),
             Gate("largest relative error of the actions", found.largest("actions"), max_error),
             Gate("largest 1 - cosine of the actions", found.largest("actions", "one_minus_cosine"), 1 - min_cosine)]
    if backend:
        gates += [Gate("share of the quantised weights not multiplied in FP8", found.wider_share, args.allow_wider),
                  Gate("largest relative error of the actions over eager's",
                       found.largest("actions") / eager.largest("actions"), OVER_EAGER)]
    if success:
        gates.append(Gate("success lost, points, at the low end", -100 * success["difference"][1], args.allow))
    worst = found.layers[found.worst_layer]
    ran = ", ".join(f"{count} layers {how}" for how, count in found.runs.items())
    tables = [
        _stages(f"{quantisation.summary()}; ran: {ran}", found),
        *([_stages("the same by eager", eager)] if backend else []),
        Table("actions after each denoising step, by eager", ("step", "mean square", "relative, median", "worst"),
              [(str(step + 1), *(f"{x:.2e}" for x in (np.median([one.mean_square for one in of]),
                                                      np.median([one.relative for one in of]),
                                                      max(one.relative for one in of))))
               for step, of in enumerate(zip(*eager.steps, strict=True))]),
        Table("layers", ("worst layer", "its output", "its weight"),
              [(found.worst_layer, f"{worst.output or 0.0:.2%}", f"{worst.weight:.2%}")])]
    if backend and backend.kernels:
        tables.append(Table(f"kernels of {backend.name}: one vision and prefix", ("kernel", "calls", "us"), [
            (one["name"][:90], f"{one['calls']:.0f}", f"{one['us']:.1f}") for one in backend.kernels[:SHOWN]]))
    if success:
        tables.append(Table("simulated arm", ("", "success", "difference, 95 %"), [
            ("before", f"{success['before']:.1%}", ""),
            ("quantised", f"{success['after']:.1%}", "{:+.1%} ({:+.1%} to {:+.1%})".format(*success["difference"]))]))
    return Findings(tables, {"recipe": recipe.name, "backend": args.backend, "runs_as": quantisation.summary(),
                             **found.as_data(), "kernels": backend.kernels if backend else [],
                             "observations": args.observations, "outliers": args.outliers, "success": success}, gates)


def _stages(title: str, found: Comparison) -> Table:
    return Table(title, ("stage", "mean square", "relative, median", "worst", "1 - cosine"),
                 [(stage, *(f"{x:.2e}" for x in (np.median([one.mean_square for one in of]),
                                                 np.median([one.relative for one in of]), found.largest(stage),
                                                 found.largest(stage, "one_minus_cosine"))))
                  for stage, of in found.stages.items()])


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
