"""Which of the engines on the disk is the one asked for; the others with the reason why not. Python 3.10 on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi05_ros.backends.cuda.cache import cache_directory
from pi05_ros.backends.tensorrt.plan_cache import PlanEntry, read_entries
from pi05_ros.errors import BackendError

SHOWN = 6


def engines_directory() -> Path:
    """$PI05_ENGINES, else `engines` in the cache directory."""
    ours = os.environ.get("PI05_ENGINES")
    return Path(ours) if ours else cache_directory() / "engines"


@dataclass(frozen=True)
class Wanted:
    """What an engine must be: config is `dataclasses.asdict` of the model's, fingerprint that of its weights
    (model/fingerprint.py), gpu the machine's (`plan_cache.gpu_name`)."""

    flavour: str
    version: str
    gpu: str
    dtype: str
    fingerprint: str
    config: Mapping[str, Any]

    def against(self, entry: PlanEntry) -> list[str]:
        """Why `entry` is not it; empty: it is."""
        key, found = entry.key, []
        if key.flavour != self.flavour:
            found.append(f"for backend '{key.flavour}'")
        elif key.version != self.version:
            found.append(f"built by {key.flavour} {key.version}, installed is {self.version}")
        if not same_gpu(key.gpu, self.gpu):
            found.append(f"for {key.gpu}, this is {self.gpu}")
        if key.precision.get("dtype") != self.dtype:
            found.append(f"of dtype {key.precision.get('dtype')}, asked for is {self.dtype}")
        if entry.source.get("fingerprint") != self.fingerprint:
            found.append(f"of other weights ({entry.source.get('checkpoint', 'origin not told')})")
        if others := sorted(name for name, value in self.config.items() if entry.config.get(name) != value):
            found.append(f"of another model: {', '.join(others)} differ")
        return found


def same_gpu(built_for: str, gpu: str) -> bool:
    """`built_for` is a board ("NVIDIA H200, sm_90, 132 SMs") or a compute capability ("sm_89")."""
    return built_for == gpu or built_for in [part.strip() for part in gpu.split(",")]


def select(directory: Path, graphs: Iterable[str], wanted: Wanted) -> dict[str, PlanEntry]:
    """Graph to its engine.

    Raises:
        BackendError: none that fits, with the reason of each that is there; several, which only a user can choose from.
    """
    entries = list(read_entries(directory)) if directory.is_dir() else []
    return {graph: _one(directory, graph, [e for e in entries if e.key.graph == graph], wanted) for graph in graphs}


def _one(directory: Path, graph: str, entries: list[PlanEntry], wanted: Wanted) -> PlanEntry:
    reasons = {entry.file: wanted.against(entry) for entry in entries}
    fitting = [entry for entry in entries if not reasons[entry.file]]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = "; ".join(f"{entry.file} ({_precision(entry)})" for entry in fitting)
        raise BackendError(f"engine '{graph}' in {directory}", expected="one that fits", received=f"{len(fitting)}: "
                           f"{names}", way_out="Remove all but one, or keep them in different directories and set "
                           "PI05_ENGINES.", cause="engine_ambiguous")
    listed = "; ".join(f"{name} is {' and '.join(why)}" for name, why in list(reasons.items())[:SHOWN])
    raise BackendError(f"engine '{graph}' in {directory}", received=listed or "none",
                       expected=f"one for {wanted.gpu}, {wanted.flavour} {wanted.version}, {wanted.dtype}",
                       way_out="Run `pi05 export` and `pi05 build` for this checkpoint on this machine, or set "
                       "PI05_ENGINES to the directory of its engines.", cause="engine_missing")


def _precision(entry: PlanEntry) -> str:
    return ", ".join(f"{name} {value}" for name, value in entry.key.precision.items())
