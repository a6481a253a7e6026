"""Compares an export with float32 eager of the same weights, graph by graph, on observations of all its lengths:

    pi05 validate my_export --checkpoint my_pi05
    pi05 validate my_export --checkpoint my_pi05 --observations bag:my_bag --robot arm6       # what the robot saw
    pi05 validate my_export --checkpoint my_pi05 --runner tensorrt     # its engines, on the machine with the GPU

Eager runs first and stage by stage, then the graphs one by one: in memory is one stage, or one graph, at a time.
What eager gave is kept in --reference DIR, so that other exports of the same weights, and engines on other machines,
are judged without it.

Programs (`pi05 export --format torch`) are read from the disk and run by PyTorch on the CPU, in their own types; their
engines with --runner torch_tensorrt. Keys and values are compared layer by layer: a layer with another's weights shows.
Runners of engines have been executed on real hardware by TensorRT 8.6, in float32 and float16, and by no other release
(docs/tensorrt.md).

onnxruntime on a CPU has no bfloat16 arithmetic and no float8 worth the name: graphs of 16 bits are run as float32
copies, so that what is checked is the graph and its rounded weights (--native: float16 as it is). The gate is --limit,
by default 1e-4 for float32, 5e-3 for float16, 3e-2 for bfloat16; an export in float8 needs it given. With --scales the
Linears of eager round to float8 too: what is left is the graph's own error.

JSON: runner, limit, graphs {graph: worst relative error}, cases [{graph, output, case, error, layers}],
peak_memory_gb.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pi05_ros.cli.options import count_list, positive, positive_number
from pi05_ros.cli.report import Report, peak_memory_gb, progress, table
from pi05_ros.errors import ConfigError

if TYPE_CHECKING:
    from pi05_ros.backends.tensorrt.names import Manifest
    from pi05_ros.benchmark.reference import Given
    from pi05_ros.model.weights import WeightSource

HELP = "compare an export with eager, graph by graph"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", type=Path, metavar="EXPORT", help="directory that `pi05 export --output` wrote")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="checkpoint that was exported")
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny",
                        help="without --checkpoint: size of the model with random weights (default: tiny)")
    parser.add_argument("--runner", choices=("onnxruntime", "torch", "tensorrt", "tensorrt_rtx", "torch_tensorrt"),
                        help="who runs the graphs (default: onnxruntime, or torch for programs, on this CPU)")
    parser.add_argument("--native", action="store_true", help="onnxruntime: run float16 graphs in float16")
    parser.add_argument("--limit", type=positive_number, metavar="X", help="largest relative error that is no failure")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="keep there what eager gave, or read it")
    parser.add_argument("--scales", type=Path, metavar="FILE", help="as for `pi05 export`: eager rounds to float8 too")
    group = parser.add_argument_group("observations")
    group.add_argument("--observations", default="random", metavar="WHAT",
                       help="random (default), dataset:DIR, bag:DIR (of `pi05 record`)")
    group.add_argument("--cases", type=positive, default=4, metavar="N", help="how many (default: 4)")
    group.add_argument("--shapes", type=shape_list, metavar="NxL,...", help="random ones of exactly these numbers of "
                       "cameras and prompt tokens (default: the largest, the smallest, then any)")
    group.add_argument("--steps", type=count_list, metavar="LIST",
                       help="denoising steps (default: 1,10 and those of `loop`)")
    group.add_argument("--seed", type=int, default=0, help="of the observations (default: 0)")
    group.add_argument("--robot", metavar="NAME", help="robot of a bag or data set (default: as the data set says)")
    group.add_argument("--topics", type=Path, metavar="FILE", help="YAML map of a bag's topics, if remapped")
    group.add_argument("--node", default="/pi05_policy", help="of a bag: full name of the node (default: /pi05_policy)")


def shape_list(text: str) -> list[tuple[int, int]]:
    """`3x200,1x7`: cameras and tokens, for argparse."""
    pairs = [tuple(map(positive, part.split("x"))) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"expected cameras x tokens such as 3x200,1x7, received {text}")
    return [(cameras, tokens) for cameras, tokens in pairs]


def run(args: argparse.Namespace) -> Report:
    import torch

    from pi05_ros.backends.tensorrt.names import read_manifest
    from pi05_ros.benchmark.exported import LIMITS, check, compare, open_runner
    from pi05_ros.benchmark.reference import last_stage, make
    from pi05_ros.cli.export import read_scales
    from pi05_ros.cli.options import weight_source

    manifest = read_manifest(args.export)
    args.runner = args.runner or ("torch" if manifest.opset is None else "onnxruntime")
    precisions = [spec.precision for spec in manifest.stages.values()]
    if args.limit is None and any(precision["quantisation"] != "none" for precision in precisions):
        raise ConfigError("--limit", expected="a number, because the export is in float8", received="none",
                          way_out="0.1 is much; `pi05 validate-quantized` compares the quantised model itself.")
    args.backend = "tensorrt"  # whose random weights are the recipe's, on every machine
    args.horizon = manifest.config["action_horizon"]
    source = weight_source(args, torch.device("cpu"))
    observations = _observations(args, manifest, source)
    check(manifest, source, observations)
    scales = read_scales(args.scales, precisions[0]["dtype"])
    found = []
    with progress("comparing") as update:
        references = make(source, observations, last_stage(manifest.stages), args.reference, scales,
                          lambda what, done, total: update(done, total))
        run = open_runner(args.runner, args.export, "native" if args.native else "copy")
        for one in compare(manifest, references, run):
            found.append(one)
            update(len(found), None)
    worst = {graph: max(one.error for one in found if one.graph == graph) for graph in {one.graph for one in found}}
    limits = {graph: args.limit or LIMITS[manifest.stages[graph].precision["dtype"]] for graph in worst}
    table(f"{args.export} by {args.runner}, against float32 eager", ("observation", "graph", "output", "error"),
          [(one.case, one.graph, one.output, f"{one.error:.2e}") for one in found])
    table(f"Peak memory {peak_memory_gb():.1f} GB", ("graph", "type", "worst relative error", "limit"),
          [(graph, manifest.stages[graph].precision["dtype"], f"{error:.2e}", f"{limits[graph]:.0e}")
           for graph, error in sorted(worst.items())])
    return Report(ok=all(worst[graph] <= limits[graph] for graph in worst), data={
        "export": str(args.export), "runner": args.runner, "limit": args.limit, "graphs": worst,
        "cases": [vars(one) for one in found], "peak_memory_gb": peak_memory_gb()})


def _observations(args: argparse.Namespace, manifest: Manifest, source: WeightSource) -> list[Given]:
    import numpy as np

    from pi05_ros.benchmark.exported import draw_shapes
    from pi05_ros.benchmark.reference import random_observation, recorded_observation
    from pi05_ros.cli.calibration_options import observations
    from pi05_ros.model.checkpoint import Checkpoint

    loop = manifest.stages["loop"].steps if "loop" in manifest.stages else None
    steps = args.steps or tuple(sorted({1, 10, loop or 1}))
    if args.observations == "random":
        random = np.random.default_rng(args.seed)
        shapes = args.shapes or draw_shapes(manifest, args.cases, random)
        return [random_observation(source.config, cameras, tokens, steps, random) for cameras, tokens in shapes]
    resize = source.conventions.resize if isinstance(source, Checkpoint) else "pil"
    samples = observations(args, source, args.observations, args.cases, args.seed)
    return [recorded_observation(f"{args.observations} {k}", sample.inputs, sample.noise, steps, source.config, resize)
            for k, sample in enumerate(samples)]
