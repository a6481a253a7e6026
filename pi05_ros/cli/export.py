"""Writes a model's stages as ONNX graphs, for `pi05 build` (TensorRT) or any other reader of ONNX, or, with --format
torch, as programs of torch.export, for torch_tensorrt:

    pi05 export --checkpoint my_pi05 --dtype bfloat16 --output my_export
    pi05 validate my_export --checkpoint my_pi05

Each graph is one .onnx file with its weights beside it (.onnx.data); export.json tells shapes, types and where the
weights are from. float32 and float16 graphs use opset 17, which TensorRT 8.6 reads; bfloat16 and float8 need
TensorRT 10. Lengths are dynamic up to --cameras and --tokens, or fixed with --static. `expert` gives two graphs:
`modulation`, once a schedule, and `step`; `loop` is all --steps of them in one. One graph's weights are in memory at a
time; of --size full and float32 the prefix is the largest with 10 GB, half of that in 16 bits.

A program (.pt2) holds its weights, is read again as soon as it is written, and has every weight of the model bit for
bit, read by the module it belongs to; PyTorch reads programs of its own release. --attention and --scales are for ONNX.

JSON: output, weights_hash, opset, graphs [{graph, file, bytes, nodes, opset, dtype, quantisation}], peak_memory_gb.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi05_ros.cli.options import positive
from pi05_ros.cli.report import Report, peak_memory_gb, progress, table
from pi05_ros.errors import ConfigError

if TYPE_CHECKING:
    from pi05_ros.backends.tensorrt.export import Watch
    from pi05_ros.backends.tensorrt.names import Manifest
    from pi05_ros.backends.tensorrt.programs import ExportOptions
    from pi05_ros.model.weights import WeightSource

HELP = "write a model's stages as ONNX graphs or torch.export programs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx",
                        help="onnx: for TensorRT; torch: torch.export programs, for torch_tensorrt (default: onnx)")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="checkpoint directory or file")
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny",
                        help="without --checkpoint: size of the model with random weights (default: tiny)")
    parser.add_argument("--horizon", type=positive, metavar="H", help="actions in a chunk (default: as the model says)")
    parser.add_argument("--stages", default="vision,prefix,expert", metavar="LIST",
                        help="among vision, prefix, expert, loop (default: vision,prefix,expert)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
                        help="of products and of what crosses stages (default: float32)")
    parser.add_argument("--cameras", type=positive, default=3, metavar="N", help="at most (default: 3)")
    parser.add_argument("--tokens", type=positive, metavar="L", help="prompt tokens at most (default: all slots)")
    parser.add_argument("--static", action="store_true", help="exactly so many cameras and tokens")
    parser.add_argument("--steps", type=positive, default=10, metavar="N", help="of `loop` (default: 10)")
    parser.add_argument("--attention", choices=("explicit", "fused"), default="explicit",
                        help="softmax in float32, or in the graph's type, which TensorRT can fuse (default: explicit)")
    parser.add_argument("--scales", type=Path, metavar="FILE",
                        help="safetensors with <module>.weight_scale and <module>.input_scale: those Linears in float8")


def run(args: argparse.Namespace) -> Report:
    import torch

    from pi05_ros.backends.tensorrt.programs import ExportOptions
    from pi05_ros.cli.options import weight_source
    from pi05_ros.model.fingerprint import fingerprint

    args.backend = "tensorrt"  # whose random weights are the recipe's, on every machine
    source = weight_source(args, torch.device("cpu"))
    tokens = args.tokens or source.config.max_token_len
    options = ExportOptions(args.dtype, args.cameras, tokens, args.static, args.steps)
    origin = {"checkpoint": str(args.checkpoint or args.size), "fingerprint": fingerprint(source)}
    with progress("exporting") as update:
        manifest = _export(args, source, options, origin, lambda what, done, total: update(done, total))
    rows: list[dict[str, Any]] = [
        {"graph": name, "file": spec.file, "bytes": spec.bytes, "nodes": spec.nodes, "opset": spec.opset,
         "dtype": spec.precision["dtype"], "quantisation": spec.precision["quantisation"]}
        for name, spec in manifest.stages.items()]
    table(f"Written to {args.output}, peak memory {peak_memory_gb():.1f} GB",
          ("graph", "file", "MB", "nodes", "opset", "type", "quantised"),
          [(row["graph"], row["file"], f"{row['bytes'] / 1e6:.1f}", row["nodes"], row["opset"] or "-",
            row["dtype"], row["quantisation"]) for row in rows])
    return Report(ok=True, data={"output": str(args.output), "weights_hash": manifest.weights_hash,
                                 "opset": manifest.opset, "graphs": rows,
                                 "peak_memory_gb": peak_memory_gb()})


def _export(args: argparse.Namespace, source: WeightSource, options: ExportOptions, origin: dict[str, str],
            watch: Watch) -> Manifest:
    stages = args.stages.split(",")
    if args.format == "onnx":
        from pi05_ros.backends.tensorrt.export import OnnxOptions, export_stages

        onnx = OnnxOptions(args.attention, read_scales(args.scales))
        return export_stages(source, args.output, stages, options, onnx, origin, watch)
    from pi05_ros.backends.torch_tensorrt.program_files import export_programs

    if args.scales is not None or args.attention != "explicit":
        raise ConfigError("--format torch", expected="neither --scales nor --attention fused", received="one of them",
                          way_out="Leave it out, or export ONNX.")
    return export_programs(source, args.output, stages, options, origin, watch)


def read_scales(path: Path | None, dtype: str = "float32") -> Any:
    """Module name to scales, as a graph of `dtype` holds them; none without a file."""
    if path is None:
        return {}
    from pi05_ros.errors import BackendError

    try:
        from pi05_ros.backends.tensorrt import fp8
    except ImportError as error:
        raise BackendError("export", expected="onnx and onnxscript", received=str(error),
                           way_out="Install them: pip install 'pi05_ros[export]'.") from error
    return fp8.as_stored(fp8.read_scales(path), dtype)
