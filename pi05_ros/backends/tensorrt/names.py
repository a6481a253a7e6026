"""What an export holds: graphs, their bindings, and `export.json`. Standard library only, for Python 3.10 on.

Shapes, for one observation without padding: N cameras, I = N*256 image tokens, T prompt tokens, P = I + T, S flow
times, H horizon, W and E widths of prefix and expert, L layers, G kv_heads; D is the graph's own type, the others are
float32:

| graph      | inputs                                                   | outputs                              |
|------------|----------------------------------------------------------|--------------------------------------|
| vision     | pixels [N, 3, 224, 224] in [-1, 1]                       | image_tokens D [I, W]                |
| prefix     | image_tokens D [I, W], tokens int32 [T]                  | keys, values D [L, G, P, head_dim]   |
| modulation | time_features [S, E], of `model/schedule.py`             | modulation [S, 2L+1, 3E]             |
| step       | keys, values, x_t [H, 32], modulation [2L+1, 3E], dt [1] | x_next = x_t + dt*v_t and v_t [H, 32] |
| loop       | keys, values, noise [H, 32]                              | actions [H, 32]                      |

The modulations depend on the flow time alone: once a schedule, then row k for step k; `loop` holds its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pi05_ros.errors import ConfigError

FORMAT = 1
MANIFEST = "export.json"
# What a user asks for -> the graphs it takes.
STAGE_GRAPHS = {"vision": ("vision",), "prefix": ("prefix",), "expert": ("modulation", "step"), "loop": ("loop",)}
GRAPHS = tuple(graph for graphs in STAGE_GRAPHS.values() for graph in graphs)
DTYPES = ("float32", "float16", "bfloat16")
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}


@dataclass(frozen=True)
class TensorSpec:
    """A binding: `shape` holds numbers and names of dynamic axes; `min`, `opt`, `max` are the profile."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One graph: `<name>.onnx` with its weights beside it, or `<name>.pt2`, a program of torch.export, which has no
    opset. precision: dtype, residual, attention and quantisation of the graph; bytes: of its weights."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: Mapping[str, str]
    opset: int | None
    weights_hash: str
    nodes: int = 0
    bytes: int = 0
    steps: int | None = None  # of `loop`

    @property
    def files(self) -> tuple[str, ...]:
        return (self.file,) if self.opset is None else (self.file, self.file + ".data")

    def check_kind(self, opset: bool) -> None:
        """ConfigError unless it is an ONNX graph (`opset`), or a program of torch.export."""
        if (self.opset is not None) != opset:
            kinds = "a torch.export program", "an ONNX graph"
            raise ConfigError(f"'{self.file}'", expected=kinds[opset], received=kinds[not opset],
                              way_out=f"Export with --format {'onnx' if opset else 'torch'}, or take the --flavour or "
                              "--runner for this one.")


@dataclass(frozen=True)
class Manifest:
    """`export.json`: config is the model's (see config.py), source the checkpoint or the size of random weights."""

    stages: Mapping[str, GraphSpec]
    config: Mapping[str, Any]
    source: Mapping[str, str]
    opset: int | None
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def weights_hash(self) -> str:
        """Of all graphs."""
        return hashlib.sha256("".join(self.stages[name].weights_hash for name in sorted(self.stages)).encode()
                              ).hexdigest()

    def write(self, directory: Path) -> Path:
        path = directory / MANIFEST
        path.write_text(json.dumps({**asdict(self), "weights_hash": self.weights_hash}, indent=1) + "\n")
        return path


def read_manifest(directory: str | Path) -> Manifest:
    """`export.json` of an export.

    Raises:
        ConfigError: none there, of another format, not whole, or a graph's file is missing.
    """
    path = Path(directory) / MANIFEST
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), expected="the manifest of `pi05 export`", received=str(error),
                          way_out="Give the directory that `pi05 export --output` wrote, or export again.") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise ConfigError(str(path), expected=f"format {FORMAT}", way_out="Export again with this version.",
                          received=repr(stored.get("format") if isinstance(stored, dict) else stored))
    try:
        stored.pop("weights_hash")
        stages = {name: _graph(spec) for name, spec in stored.pop("stages").items()}
        manifest = Manifest(stages=stages, **stored)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(str(path), expected="a whole manifest", received=f"{type(error).__name__}: {error}",
                          way_out="Export again with this version.") from error
    for graph in stages.values():
        for file in graph.files:
            if not (path.parent / file).is_file():
                raise ConfigError(str(path.parent / file), expected="a file of the export", received="none",
                                  way_out="Copy the whole directory: an .onnx has an .onnx.data beside it.")
    return manifest


def _graph(stored: Mapping[str, Any]) -> GraphSpec:
    specs = {side: tuple(_tensor(tensor) for tensor in stored[side]) for side in ("inputs", "outputs")}
    return GraphSpec(**{**stored, **specs})


def _tensor(stored: Mapping[str, Any]) -> TensorSpec:
    sizes = {key: tuple(stored[key]) for key in ("shape", "min", "opt", "max")}
    return TensorSpec(stored["name"], stored["dtype"], **sizes)


def files_hash(*paths: Path) -> str:
    """sha256 of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
