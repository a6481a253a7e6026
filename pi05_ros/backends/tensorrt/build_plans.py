"""An export's graphs to engines on the disk, each built once for all that it depends on (plan_cache.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi05_ros.backends.tensorrt.api import Api
from pi05_ros.backends.tensorrt.build import BuildOptions, Built, build_engine
from pi05_ros.backends.tensorrt.build_log import Progress
from pi05_ros.backends.tensorrt.names import GraphSpec, Manifest, files_hash
from pi05_ros.backends.tensorrt.plan_cache import (
    PlanEntry,
    PlanKey,
    read_entry,
    read_plan,
    read_timing_cache,
    write_plan,
    write_text,
    write_timing_cache,
)
from pi05_ros.errors import BackendError


@dataclass(frozen=True)
class Builder:
    """export: directory of the manifest. output: where engines are kept. gpu: of `PlanKey`. inspect: this machine has
    the GPU that is built for, so engines can be loaded and looked into. again: also what is there already. make: how
    one engine is made, with the arguments of `build_engine`."""

    api: Api
    export: Path
    manifest: Manifest
    output: Path
    gpu: str
    options: BuildOptions
    inspect: bool
    again: bool = False
    make: Callable[..., Built] = build_engine

    def key(self, name: str) -> PlanKey:
        graph = self.manifest.stages[name]
        profile = {spec.name: [list(spec.min), list(spec.opt), list(spec.max)] for spec in graph.inputs}
        return PlanKey(name, graph.weights_hash, profile, dict(graph.precision), self.api.flavour, self.api.version,
                       self.gpu, self.options.workspace_bytes, self.options.level, dict(self.options.settings))

    def build(self, name: str, progress: Progress) -> tuple[PlanEntry, bool]:
        """The engine of graph `name`, and whether it was built now.

        Raises:
            BackendError: as `build_engine`; an engine that is there is damaged; the graph changed after its export.
        """
        key, graph = self.key(name), self.manifest.stages[name]
        described = self.output / f"{key.graph}-{key.digest}.json"
        if described.is_file() and not self.again:
            entry = read_entry(described)
            if entry is not None:
                read_plan(entry)
                check_fallbacks(entry, self.options.allow_fallback)
                return entry, False
        file = self.export / graph.file
        if files_hash(*(self.export / part for part in graph.files)) != graph.weights_hash:
            raise BackendError(f"'{file}'", expected="the files that export.json describes (sha256)",
                               received="other contents", way_out="Copy the export whole, or export again.")
        timing = read_timing_cache(self.output, self.api.flavour, self.api.version, self.gpu)
        built = self.make(self.api, file, graph, self.options, timing, self.inspect, progress)
        write_timing_cache(self.output, self.api.flavour, self.api.version, self.gpu, built.timing_cache)
        entry = PlanEntry(key, "", "", 0, built.inputs, built.outputs, dict(self.manifest.config),
                          dict(self.manifest.source), graph.steps, report(built), dict(built.bindings))
        entry = write_plan(self.output, entry, built.plan)
        write_text(self.output / f"{described.stem}.log", build_log(graph, built))
        if built.inspected:
            write_text(self.output / f"{described.stem}.layers", built.inspected)
        return entry, True


def check_fallbacks(entry: PlanEntry, allowed: bool) -> None:
    """An engine that was built with --allow-fallback is not what somebody without it asks for."""
    fallbacks = entry.report.get("fallbacks", [])
    if fallbacks and not allowed:
        raise BackendError(f"engine '{entry.path}'", expected="the precision of the graph in every product",
                           received=f"{len(fallbacks)} of higher precision: " + "; ".join(fallbacks[:5]),
                           way_out="Give --allow-fallback to keep it, or --again with a newer TensorRT.")


def report(built: Built) -> dict[str, Any]:
    """What a person and `pi05 engines` want to know later."""
    return {"seconds": round(built.seconds, 1), "products": dict(Counter(built.products.values())),
            "inspected": bool(built.inspected), "layers": len(built.layers), "judged": built.judged,
            "fallbacks": [str(each) for each in built.fallbacks], "memory_bytes": built.memory_bytes,
            "messages": list(built.messages)}


def build_log(graph: GraphSpec, built: Built) -> str:
    """Warnings, then every matrix product with the type that the graph gives it, then what fell back."""
    lines = [f"{graph.file}: {built.seconds:.1f} s", *built.messages, "", "matrix products, as the graph has them:"]
    lines += [f"  {dtype:9} {name}" for name, dtype in built.products.items()]
    if not built.inspected:
        lines += ["", "The engine was not loaded here, so its layers were not looked into."]
        return "\n".join(lines) + "\n"
    lines += ["", f"layers of the engine: {len(built.layers)}; of {len(built.products)} products, types were told of "
              f"{built.judged}"]
    lines += [f"  {layer.kind or '-':22} {','.join(layer.types) or '-':22} {layer.name}" for layer in built.layers]
    lines += ["", f"computed in a higher precision: {len(built.fallbacks)}"]
    return "\n".join([*lines, *(f"  {fallback}" for fallback in built.fallbacks)]) + "\n"

