"""Which way of cutting its work suits a kernel on this GPU: candidates timed on the device, the choice kept on disk.

The file holds, per key (GPU, shapes, versions, kernel sources), a choice per kernel. Once there it is what is used,
so that runs repeat. `PI05_CACHE_DIR` moves it; otherwise it lies in XDG_CACHE_HOME or ~/.cache, under pi05_ros.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pi05_ros.backends.cuda.cache import cache_directory
from pi05_ros.errors import BackendError

FORMAT = "pi05_ros tuning 1"
REPLAYS = 3
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work: output rows and columns (attention: keys) a program, `inner` of K at a time.

    split: programs that share one tile, each a part of K (attention: of the keys). stages: Triton's pipeline depth.
    """

    rows: int
    columns: int
    inner: int = 0
    split: int = 1
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Gpu:
    """shared_bytes: the most shared memory one block may have."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        found = torch.cuda.get_device_properties(device)
        shared = getattr(found, "shared_memory_per_block_optin")  # noqa: B009  (torch's stub lacks it)
        return cls(found.name, (found.major, found.minor), found.multi_processor_count, shared)

    @property
    def asynchronous(self) -> bool:
        """Its matrix products read shared memory on their own: wgmma of Hopper, tcgen05 of Blackwell's data centres."""
        return 9 <= self.capability[0] <= 11

    def buffers(self, stages: int) -> int:
        """Tiles in shared memory at once in a pipeline of `stages`; without asynchronous products a tile is in
        registers before the last one arrives."""
        return stages if self.asynchronous else max(1, stages - 1)


SharedBytes = Callable[[Tiles, Gpu], int]  # at most what the kernel takes with these tiles


def fitting(candidates: Sequence[Tiles], shared_bytes: SharedBytes, gpu: Gpu) -> list[Tiles]:
    """Those that the GPU's shared memory holds, in order; BackendError if there is none."""
    fits = [tiles for tiles in candidates if shared_bytes(tiles, gpu) <= gpu.shared_bytes]
    if not fits:
        least = min(shared_bytes(tiles, gpu) for tiles in candidates)
        raise BackendError("backend 'cuda'", expected=f"{least // 1024} KiB of shared memory a block",
                           received=f"{gpu.shared_bytes // 1024} KiB", way_out="Use backend 'eager' on this GPU.")
    return fits


def fastest(candidates: Sequence[Tiles], run: Callable[[Tiles], None], seconds: Callable[[Callable[[], None]], float],
            until: float, clock: Callable[[], float] = time.monotonic) -> Tiles:
    """The candidate whose `run` takes the fewest `seconds`; what does not compile or launch is skipped.

    The first is always timed, the others until the clock says `until`.
    """
    times: dict[Tiles, float] = {}
    for tiles in candidates:
        if times and clock() >= until:
            log.info("tuning: out of time after %d of %d candidates", len(times), len(candidates))
            break
        try:
            times[tiles] = seconds(lambda tiles=tiles: run(tiles))  # type: ignore[misc]
        except Exception as error:  # Triton has a dozen ways to refuse a kernel  # noqa: BLE001
            log.info("tuning: skipped %s: %s", tiles, error)
    if not times:
        raise BackendError("backend 'cuda'", expected="a kernel that this GPU runs", received=f"none of {candidates}",
                           way_out="Use backend 'eager' on this GPU, and report the log.")
    return min(times, key=lambda tiles: times[tiles])


def graph_seconds(work: Callable[[], None]) -> float:
    """Shortest of a few replays of `work` as a CUDA graph; the first call compiles."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            work()
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        for end in ends:  # the first replay is not counted
            graph.replay()
            end.record(stream)
    stream.synchronize()
    return min(a.elapsed_time(b) for a, b in zip(ends, ends[1:], strict=False)) / 1e3


def key(gpu: Gpu, shapes: str) -> str:
    """All that a choice depends on."""
    kernels = hashlib.sha256(b"".join(p.read_bytes() for p in sorted((Path(__file__).parent / "kernels").glob("*.py"))))
    return (f"{gpu.name}, {gpu.capability[0]}.{gpu.capability[1]}, {gpu.multiprocessors} SMs; {shapes}; triton "
            f"{importlib.metadata.version('triton')}, torch {torch.__version__}, CUDA {torch.version.cuda}, kernels "
            f"{kernels.hexdigest()[:12]}")


def cache_file() -> Path:
    return cache_directory() / "tuning.json"


def read_choices(file: Path, key: str, allowed: Mapping[str, Sequence[Tiles]]) -> dict[str, Tiles]:
    """The choices kept under `key`, each one of the kernel's `allowed` candidates."""
    kept = _read(file).get(key, {})
    choices = {name: tiles for name, fits in allowed.items() for tiles in fits if asdict(tiles) == kept.get(name)}
    if choices.keys() != kept.keys():
        log.warning("tuning: %s holds choices for %s that are no candidates; they are measured again", file,
                    ", ".join(sorted(kept.keys() - choices.keys())))
    return choices


def write_choices(file: Path, key: str, choices: Mapping[str, Tiles]) -> None:
    """Add them to the file, atomically: a reader sees the old one or the new one."""
    entries = _read(file) | {key: {name: asdict(tiles) for name, tiles in choices.items()}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            new = Path(scratch) / file.name
            new.write_text(json.dumps({"format": FORMAT, "entries": entries}, indent=1, sort_keys=True) + "\n")
            os.replace(new, file)
    except OSError as error:
        log.warning("tuning: the choices could not be kept in %s: %s", file, error)


def _read(file: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Entries of the file, {} if there is none or it is not ours."""
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT or not all(isinstance(e, dict) for e in content["entries"].values()):
            raise ValueError(f"not of format '{FORMAT}'")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("tuning: %s is damaged or not ours and will be written anew (%s)", file, error)
        return {}
    return dict(content["entries"])
