"""Engines on the disk: `<graph>-<key>-<contents>.plan`, as TensorRT serialized it (trtexec reads it), and
`<graph>-<key>.json`, which says what it is and names it. The JSON is written last and atomically, so a reader sees the
old engine or the new one. What is damaged is refused, never rebuilt behind the user's back. No PyTorch; Python 3.10 on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pi05_ros.backends.tensorrt.names import TensorSpec
from pi05_ros.errors import BackendError

FORMAT = "pi05_ros engine 1"
BLOCK = 1 << 24


@dataclass(frozen=True)
class PlanKey:
    """All that makes an engine another one.

    Args:
        graph: vision, prefix, modulation, step, loop.
        weights_hash: of the ONNX graph and its weights, as the manifest of the export has it.
        profile: binding name to min, opt and max shapes of the inputs.
        precision: dtype, residual, attention, quantisation.
        flavour, version: of TensorRT, which loads only what the same release built.
        gpu: `gpu_name()` of the machine, or "sm_89" where the engine is built for a compute capability.
        workspace_bytes, level: build options.
        settings: of torch_tensorrt, with its version; empty for engines made of ONNX graphs.
    """

    graph: str
    weights_hash: str
    profile: Mapping[str, Any]
    precision: Mapping[str, str]
    flavour: str
    version: str
    gpu: str
    workspace_bytes: int | None = None
    level: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        told = {name: value for name, value in asdict(self).items() if name != "settings" or value}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PlanEntry:
    """What the JSON holds. source, config: of the model, from the manifest; sha256, bytes: of the plan's file.

    bindings: what the engine calls our tensors, where that differs.
    report: for a person and `pi05 engines`: seconds, products, layers and fallbacks, memory_bytes, messages.
    """

    key: PlanKey
    file: str
    sha256: str
    bytes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    config: Mapping[str, Any]
    source: Mapping[str, str]
    steps: int | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    bindings: Mapping[str, str] = field(default_factory=dict)
    format: str = FORMAT
    directory: Path = Path()  # where it was read; not stored

    @property
    def path(self) -> Path:
        return self.directory / self.file

    def binding(self, name: str) -> str:
        """What the engine calls our tensor `name`."""
        return self.bindings.get(name, name)


def gpu_name(name: str, capability: tuple[int, int], multiprocessors: int) -> str:
    """"NVIDIA H200, sm_90, 132 SMs": boards of one name may differ in size, as Jetson's do."""
    return f"{name}, sm_{capability[0]}{capability[1]}, {multiprocessors} SMs"


def write_plan(directory: Path, entry: PlanEntry, plan: Any) -> PlanEntry:
    """Store it; returns the entry with its file, hash and size. An older engine of the same key goes away.

    Raises:
        BackendError: the disk is full or not ours to write.
    """
    view = memoryview(plan).cast("B")
    digest = hashlib.sha256(view).hexdigest()
    stem = f"{entry.key.graph}-{entry.key.digest}"
    entry = replace(entry, file=f"{stem}-{digest[:8]}.plan", sha256=digest, bytes=len(view), directory=directory)
    stored = {name: value for name, value in asdict(entry).items() if name != "directory"}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        old = _old_files(directory, stem, entry.file)
        _write(directory / entry.file, view)
        _write(directory / f"{stem}.json", json.dumps(stored, indent=1).encode())
        for path in old:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise BackendError(f"'{directory}'", expected=f"{len(view) / 1e9:.2f} GB to be written", received=str(error),
                           way_out="Free the disk, or give another directory with --output.") from error
    return entry


def _old_files(directory: Path, stem: str, keep: str) -> list[Path]:
    return [path for path in directory.glob(f"{stem}-*.plan") if path.name != keep]


def _write(path: Path, contents: Any) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as stream:
        try:
            for start in range(0, len(contents), BLOCK):
                stream.write(contents[start:start + BLOCK])
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(stream.name, 0o644)
            os.replace(stream.name, path)
        except BaseException:  # an interrupt too leaves no half file behind; whoever asked hears of it
            with contextlib.suppress(OSError):
                os.unlink(stream.name)
            raise


def read_entries(directory: Path) -> Iterator[PlanEntry]:
    """Every engine described in `directory`; BackendError for a description that is not whole."""
    for path in sorted(directory.glob("*.json")):
        entry = read_entry(path)
        if entry is not None:
            yield entry


def read_entry(path: Path) -> PlanEntry | None:
    """One description; None for JSON that is not an engine's (an export's manifest, say)."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(stored, dict) or not str(stored.get("format", "")).startswith("pi05_ros engine"):
        return None
    if stored["format"] != FORMAT:
        raise _damaged(path, f"format '{stored['format']}', not '{FORMAT}'")
    try:
        key = PlanKey(**stored.pop("key"))
        sides: dict[str, Any] = {side: tuple(map(_spec, stored.pop(side))) for side in ("inputs", "outputs")}
        entry = PlanEntry(key=key, **sides, **stored, directory=path.parent)
        whole = bool(entry.file) and Path(entry.file).name == entry.file and isinstance(entry.bytes, int)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not whole or path.stem != f"{key.graph}-{key.digest}":
        raise _damaged(path, "a description that does not belong to its name")
    return entry


def _spec(stored: Mapping[str, Any]) -> TensorSpec:
    whole: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
    return TensorSpec(**whole)


def read_plan(entry: PlanEntry) -> bytes:
    """The serialized engine, checked against its description; BackendError for one that is missing or damaged."""
    try:
        plan = entry.path.read_bytes()
    except OSError as error:
        raise _damaged(entry.path, str(error)) from error
    if len(plan) != entry.bytes:
        raise _damaged(entry.path, f"{len(plan)} bytes instead of {entry.bytes}")
    if hashlib.sha256(plan).hexdigest() != entry.sha256:
        raise _damaged(entry.path, "other contents than were written (sha256)")
    return plan


def _damaged(path: Path, received: str) -> BackendError:
    return BackendError(f"engine '{path}'", expected="a whole file of `pi05 build`", received=received,
                        way_out=f"Delete it (rm '{path}') and run `pi05 build` again.", cause="damaged_engine")


def write_text(path: Path, text: str) -> None:
    """Beside an engine: its build log, its layers."""
    _write(path, text.encode())


def read_timing_cache(directory: Path, flavour: str, version: str, gpu: str) -> bytes:
    """What earlier builds measured; b"" where there is none. TensorRT checks it itself."""
    try:
        return _timing_file(directory, flavour, version, gpu).read_bytes()
    except OSError:
        return b""


def write_timing_cache(directory: Path, flavour: str, version: str, gpu: str, cache: Any) -> None:
    view = memoryview(cache).cast("B")
    if len(view):
        directory.mkdir(parents=True, exist_ok=True)
        _write(_timing_file(directory, flavour, version, gpu), view)


def _timing_file(directory: Path, flavour: str, version: str, gpu: str) -> Path:
    return directory / f"timing-{hashlib.sha256(f'{flavour} {version} {gpu}'.encode()).hexdigest()[:16]}.cache"
