"""Lists TensorRT engines: what each is of and for, its inputs and outputs, precision and memory.

`--check` reads every engine and compares it with what was written. `--load` loads each on this machine's GPU with the
installed TensorRT, compares its bindings, and tells why one cannot be used here. `--layers GRAPH` lists the layers that
TensorRT made of a graph with their types, where the engine was built or loaded on its GPU.

Loading has been executed with a stand-in of TensorRT, and on real hardware by release 8.6 alone, in float32 and
float16 (docs/tensorrt.md).

JSON: directory, engines [{graph, file, bytes, flavour, version, gpu, precision, bindings, products, judged, fallbacks,
memory_bytes, checked, loaded, problem}]. Exit status 0: no engine has a problem.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi05_ros.cli.report import Report, console, table
from pi05_ros.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from pi05_ros.backends.tensorrt.plan_cache import PlanEntry

HELP = "list TensorRT engines, their inputs and outputs, precision and memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, nargs="?", metavar="DIR",
                        help="where `pi05 build` kept them (default: PI05_ENGINES, else the cache directory)")
    parser.add_argument("--check", action="store_true", help="compare every engine with what was written")
    parser.add_argument("--load", action="store_true", help="load every engine on this machine's GPU")
    parser.add_argument("--device", default="cuda", help="for --load (default: cuda)")
    parser.add_argument("--layers", metavar="GRAPH", help="list the layers of this graph's engines")


def run(args: argparse.Namespace) -> Report:
    from pi05_ros.backends.tensorrt.plan_cache import read_entries
    from pi05_ros.backends.tensorrt.select import engines_directory

    directory = args.directory or engines_directory()
    entries = list(read_entries(directory)) if directory.is_dir() else []
    if not entries:
        raise ConfigError(str(directory), expected="engines of `pi05 build`", received="none",
                          way_out="Build some, or give the directory that `pi05 build --output` wrote to.")
    rows = [describe(entry) | examine(entry, args) for entry in entries]
    table(str(directory), ("engine", "precision", "built for", "MB", "memory MB", "fell back"), map(cells, rows))
    table("inputs and outputs", ("graph", "binding", "type", "shape", "min", "tuned for", "max"),
          (line for row in rows for line in row["bindings"]))
    for entry in entries:
        if entry.key.graph == args.layers:
            show_layers(entry)
    for row in rows:
        if row["problem"]:
            console.print(f"[bold red]{row['file']}[/]", highlight=False)
            console.print(row["problem"], highlight=False, markup=False, soft_wrap=True)
    return Report(ok=not any(row["problem"] for row in rows), data={"directory": str(directory), "engines": rows})


def describe(entry: PlanEntry) -> dict[str, Any]:
    key, report = entry.key, entry.report
    bindings = [[key.graph, f"{mode} {spec.name}", spec.dtype, *(_shape(s) for s in (spec.shape, spec.min, spec.opt,
                                                                                     spec.max))]
                for mode, specs in (("in", entry.inputs), ("out", entry.outputs)) for spec in specs]
    return {"graph": key.graph, "file": entry.file, "bytes": entry.bytes, "flavour": key.flavour,
            "version": key.version, "gpu": key.gpu, "precision": dict(key.precision), "bindings": bindings,
            **{name: report.get(name) for name in ("products", "judged", "inspected", "fallbacks", "memory_bytes")}}


def _shape(shape: tuple[int | str, ...]) -> str:
    return " x ".join(map(str, shape))


def examine(entry: PlanEntry, args: argparse.Namespace) -> dict[str, Any]:
    """What --check and --load find; a problem is a sentence."""
    found: dict[str, Any] = {"checked": False, "loaded": False, "problem": ""}
    try:
        if args.check:
            from pi05_ros.backends.tensorrt.plan_cache import read_plan

            read_plan(entry)
            found["checked"] = True
        if args.load:
            found["memory_bytes"] = load(entry, args.device)
            found["loaded"] = True
    except BackendError as error:
        found["problem"] = str(error)
    return found


def load(entry: PlanEntry, device: str) -> int:
    """Memory that a context takes; the layers are kept beside the engine. BackendError where it cannot be loaded."""
    import torch

    from pi05_ros.backends.base import check_device
    from pi05_ros.backends.tensorrt.api import load_api
    from pi05_ros.backends.tensorrt.load import gpu_of
    from pi05_ros.backends.tensorrt.plan_cache import write_text
    from pi05_ros.backends.tensorrt.runner import Engine

    place = check_device(device)
    if place.type != "cuda":
        raise BackendError("--load", expected="a GPU", received=f"device '{place}'", way_out="Leave --load out here.")
    with torch.cuda.device(place):
        engine = Engine(load_api(entry.key.flavour), entry, gpu_of(place))
    write_text(_layers_file(entry), engine.inspect())
    return engine.memory_bytes


def _layers_file(entry: PlanEntry) -> Path:
    return entry.directory / f"{entry.key.graph}-{entry.key.digest}.layers"


def show_layers(entry: PlanEntry) -> None:
    from pi05_ros.backends.tensorrt.precision import engine_layers

    file = _layers_file(entry)
    if not file.is_file():
        console.print(f"{entry.file}: built without its GPU, so its layers are not known; `--load` on it tells them.",
                      highlight=False)
        return
    table(f"layers of {entry.file}", ("layer", "kind", "types", "kernel"),
          ((layer.name, layer.kind, ", ".join(layer.types), layer.tactic)
           for layer in engine_layers(file.read_text())))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    precision, memory = row["precision"], row["memory_bytes"]
    words = " ".join(precision[name] for name in ("dtype", "quantisation") if precision.get(name, "none") != "none")
    return (row["graph"], words, f"{row['flavour']} {row['version']}, {row['gpu']}",
            f"{row['bytes'] / 1e6:.1f}", "-" if memory is None else f"{memory / 1e6:.1f}",
            str(len(row["fallbacks"] or ())) if row["inspected"] else "not looked")
