"""Makes TensorRT engines of an export, for the GPU of this machine:

    pi05 export --checkpoint my_pi05 --dtype bfloat16 --output my_export
    pi05 build my_export
    pi05 engines
    pi05 benchmark latency --checkpoint my_pi05 --backend tensorrt --device cuda --dtype bfloat16

Engines are kept under all they depend on: weights, shapes, precision, TensorRT's release, GPU. What is there already
is not built again. A full model takes minutes; measured kernels are remembered for the next build (timing cache). An
engine in which a matrix product is computed in a higher precision than the graph's, or that is much larger than the
graph's weights, is refused unless --allow-fallback.

--flavour tensorrt_rtx --gpu 8.9 builds without a GPU, for RTX desktops: that is executed in this project's tests. What
has not been executed on real hardware yet: `--flavour tensorrt` of release 9 and later, loading and running engines on
Jetson or RTX, and what the engine inspector says there (docs/tensorrt.md has the table and what to report back).

--flavour torch_tensorrt takes programs (`pi05 export --format torch`) and settings of torch_tensorrt from
config/torch_tensorrt.yaml or --settings. A stage has to become one engine: operators that would stay in PyTorch are
named and refused. Single layers that fall back to float32 are not seen, as torch_tensorrt's engines do not tell types.
Not executed on real hardware at all.

JSON: engines [{graph, file, bytes, seconds, built, products {dtype: number}, inspected, judged, fallbacks,
memory_bytes}], flavour, version, gpu, output, peak_memory_gb.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi05_ros.cli.options import positive_number
from pi05_ros.cli.report import Report, console, peak_memory_gb, progress, table
from pi05_ros.config import share_directory
from pi05_ros.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pi05_ros.backends.tensorrt.api import Api
    from pi05_ros.backends.tensorrt.build import Built
    from pi05_ros.backends.tensorrt.names import Manifest
    from pi05_ros.backends.tensorrt.plan_cache import PlanEntry

HELP = "build TensorRT engines of an export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", type=Path, metavar="EXPORT", help="directory that `pi05 export --output` wrote")
    parser.add_argument("--output", type=Path, metavar="DIR",
                        help="where engines are kept (default: PI05_ENGINES, else the cache directory)")
    parser.add_argument("--graphs", metavar="LIST", help="only these of the export, separated by commas")
    parser.add_argument("--flavour", choices=("tensorrt", "tensorrt_rtx", "torch_tensorrt"), default="tensorrt",
                        help="tensorrt: Jetson, data centre; tensorrt_rtx: RTX desktops; torch_tensorrt: as tensorrt, "
                             "from programs (default: tensorrt)")
    parser.add_argument("--settings", type=Path, metavar="FILE",
                        help="torch_tensorrt: YAML of its settings (default: config/torch_tensorrt.yaml)")
    parser.add_argument("--gpu", metavar="X.Y",
                        help="tensorrt_rtx: compute capability to build for, without one of it here (8.6, 8.9, 12.0)")
    parser.add_argument("--device", default="cuda", help="the GPU to build on (default: cuda)")
    parser.add_argument("--workspace", type=positive_number, metavar="GB",
                        help="memory a kernel may use beside its inputs (default: all of the GPU's)")
    parser.add_argument("--level", type=int, choices=range(6), metavar="0..5",
                        help="TensorRT's optimisation level; lower builds faster (default: TensorRT's own)")
    parser.add_argument("--allow-fallback", action="store_true",
                        help="keep engines in which layers fell back to a higher precision")
    parser.add_argument("--again", action="store_true", help="build also what is there already")


def run(args: argparse.Namespace) -> Report:
    from pi05_ros.backends.tensorrt.api import load_api
    from pi05_ros.backends.tensorrt.build import BuildOptions
    from pi05_ros.backends.tensorrt.build_plans import Builder
    from pi05_ros.backends.tensorrt.names import read_manifest
    from pi05_ros.backends.tensorrt.select import engines_directory

    manifest = read_manifest(args.export)
    names = graph_names(args.graphs, manifest)
    for name in names:
        manifest.stages[name].check_kind(opset=args.flavour != "torch_tensorrt")
    workspace = int(args.workspace * 1e9) if args.workspace else None
    make, settings = maker(args, workspace)
    api = load_api(args.flavour)
    gpu, target, here = place(api, args.gpu, args.device)
    options = BuildOptions(workspace, args.level, target, args.allow_fallback, settings)
    builder = Builder(api, args.export, manifest, args.output or engines_directory(), gpu, options, here, args.again,
                      make)
    console.print(f"{api.flavour} {api.version}, for {gpu}, into {builder.output}", highlight=False)
    rows = []
    for name in names:
        with progress(f"building {name}") as update:
            entry, built = builder.build(name, lambda fraction, phase: update(fraction, 1.0))  # noqa: B023
        rows.append(summary(entry, built))
        for message in entry.report["messages"] if built else ():
            console.print(f"{name}: {message}", highlight=False, markup=False)
    table(f"Engines, peak memory {peak_memory_gb():.1f} GB",
          ("graph", "MB", "build s", "products", "types seen of", "fell back", "memory MB"),
          (cells(row) for row in rows))
    if not here:
        console.print("Not loaded here, so not looked into: `pi05 engines --load` on the machine with the GPU does.")
    return Report(ok=True, data={"engines": rows, "flavour": api.flavour, "version": api.version, "gpu": gpu,
                                 "output": str(builder.output), "peak_memory_gb": peak_memory_gb()})


def maker(args: argparse.Namespace, workspace: int | None) -> tuple[Callable[..., Built], dict[str, Any]]:
    """Who makes an engine, and torch_tensorrt's settings."""
    if args.flavour != "torch_tensorrt":
        from pi05_ros.backends.tensorrt.build import build_engine

        if args.settings is not None:
            raise ConfigError("--settings", expected="--flavour torch_tensorrt with it", received=args.flavour,
                              way_out="Leave it out: --workspace and --level are for all flavours.")
        return build_engine, {}
    from pi05_ros.backends.torch_tensorrt import compile

    settings = read_settings(args.settings or share_directory() / "config" / "torch_tensorrt.yaml")
    return compile.build_engine, compile.all_settings(compile.installed(), settings, workspace, args.level)


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML file of names and values; ConfigError for any other."""
    import yaml

    from pi05_ros.backends.torch_tensorrt.settings import check_names

    try:
        stored = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(str(path), expected="a YAML file of settings", received=str(error),
                          way_out="Begin with a copy of config/torch_tensorrt.yaml.") from error
    if not isinstance(stored, dict):
        raise ConfigError(str(path), expected="names and values", received=type(stored).__name__,
                          way_out="Begin with a copy of config/torch_tensorrt.yaml.")
    check_names(stored)
    return {str(name): value for name, value in stored.items()}


def graph_names(wanted: str | None, manifest: Manifest) -> list[str]:
    names = list(manifest.stages) if wanted is None else [name.strip() for name in wanted.split(",")]
    if missing := [name for name in names if name not in manifest.stages]:
        raise ConfigError("--graphs", expected=f"graphs of the export: {', '.join(manifest.stages)}",
                          received=", ".join(missing), way_out="Export them too, or leave them out.")
    return names


def place(api: Api, target: str | None, device: str) -> tuple[str, str | None, bool]:
    """The GPU as `PlanKey` has it, the target for the builder, and whether such a GPU is here."""
    from pi05_ros.backends.base import check_device
    from pi05_ros.backends.tensorrt.load import gpu_of

    if target is not None and not api.just_in_time:
        raise ConfigError("--gpu", expected="flavour tensorrt_rtx", received=api.flavour,
                          way_out="Engines of this flavour are built on the machine that runs them.")
    if target is not None and (len(parts := target.split(".")) != 2 or not all(part.isdigit() for part in parts)):
        raise ConfigError("--gpu", expected="a compute capability such as 8.9", received=repr(target),
                          way_out="nvidia-smi --query-gpu=compute_cap --format=csv tells it.")
    here = gpu_of(check_device(device)) if target is None or _has_gpu() else ""
    if not api.just_in_time:
        return here, None, True
    capability = f"sm_{target.replace('.', '')}" if target else next(p for p in here.split(", ") if p.startswith("sm_"))
    digits = capability.removeprefix("sm_")
    return capability, f"{digits[:-1]}.{digits[-1]}", capability in here.split(", ")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def summary(entry: PlanEntry, built: bool) -> dict[str, Any]:
    keep = ("seconds", "products", "inspected", "judged", "fallbacks", "memory_bytes")
    return {"graph": entry.key.graph, "file": entry.file, "bytes": entry.bytes, "built": built,
            **{name: entry.report[name] for name in keep}}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    products, memory = row["products"], row["memory_bytes"]
    return (row["graph"], f"{row['bytes'] / 1e6:.1f}", f"{row['seconds']:.1f}" if row["built"] else "kept",
            ", ".join(f"{count} {dtype}" for dtype, count in products.items()),
            f"{row['judged']} of {sum(products.values())}" if row["inspected"] else "not looked",
            str(len(row["fallbacks"])) if row["inspected"] else "not looked",
            "-" if memory is None else f"{memory / 1e6:.1f}")
