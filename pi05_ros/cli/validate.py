"""Compares an export with float32 eager of the same weights, graph by graph, on fresh random inputs of all its lengths:

    pi05 validate my_export --checkpoint my_pi05
    pi05 validate my_export --checkpoint my_pi05 --runner tensorrt     # its engines, on the machine with the GPU

Programs (`pi05 export --format torch`) are read from the disk and run by PyTorch on the CPU, in their own types; their
engines with --runner torch_tensorrt. Keys and values are compared layer by layer: a layer with another's weights shows.
Runners of engines have not been executed on real hardware yet (docs/tensorrt.md).

onnxruntime on a CPU has no bfloat16 arithmetic and no float8 worth the name: graphs of 16 bits are run as float32
copies, so that what is checked is the graph and its rounded weights. The gate is --limit, by default 1e-4 for float32,
5e-3 for float16, 3e-2 for bfloat16; an export in float8 needs it given.

JSON: runner, limit, graphs {graph: worst relative error}, cases [{graph, output, case, error, layers}].
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pi05_ros.cli.options import positive, positive_number
from pi05_ros.cli.report import Report, progress, table
from pi05_ros.errors import ConfigError

HELP = "compare an export with eager, graph by graph"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", type=Path, metavar="EXPORT", help="directory that `pi05 export --output` wrote")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="checkpoint that was exported")
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny",
                        help="without --checkpoint: size of the model with random weights (default: tiny)")
    parser.add_argument("--runner", choices=("onnxruntime", "torch", "tensorrt", "tensorrt_rtx", "torch_tensorrt"),
                        help="who runs the graphs (default: onnxruntime, or torch for programs, on this CPU)")
    parser.add_argument("--cases", type=positive, default=4, metavar="N", help="observations (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    parser.add_argument("--limit", type=positive_number, metavar="X", help="largest relative error that is no failure")


def run(args: argparse.Namespace) -> Report:
    import numpy as np
    import torch

    from pi05_ros.backends.tensorrt.names import read_manifest
    from pi05_ros.benchmark.exported import LIMITS, cases_of, compare, open_runner
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
    cases = cases_of(manifest, args.cases, np.random.default_rng(args.seed))
    found = []
    with progress("comparing") as update:
        for one in compare(manifest, source, open_runner(args.runner, args.export), cases, args.seed):
            found.append(one)
            update(1 + [str(case) for case in cases].index(one.case), len(cases))
    worst = {graph: max(one.error for one in found if one.graph == graph) for graph in {one.graph for one in found}}
    limits = {graph: args.limit or LIMITS[manifest.stages[graph].precision["dtype"]] for graph in worst}
    table(f"{args.export} by {args.runner}, against float32 eager", ("graph", "type", "worst relative error", "limit"),
          [(graph, manifest.stages[graph].precision["dtype"], f"{error:.2e}", f"{limits[graph]:.0e}")
           for graph, error in sorted(worst.items())])
    return Report(ok=all(worst[graph] <= limits[graph] for graph in worst), data={
        "export": str(args.export), "runner": args.runner, "limit": args.limit, "graphs": worst,
        "cases": [vars(one) for one in found]})
