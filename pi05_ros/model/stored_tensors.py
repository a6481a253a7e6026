"""What a checkpoint holds, from the headers of its safetensors files alone, under openpi's names (PI05_SPEC 11)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from pi05_ros.errors import CheckpointError
from pi05_ros.model.weights import EMBEDDING, OPENPI, TIED_EMBEDDING, UNUSED

Naming = Literal["plain", "prefixed"]  # as openpi names them, or with lerobot's `model.` in front
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
LOW_DTYPES = {"F8_E4M3": "float8_e4m3", "U8": "uint8"}  # of quantised layers alone
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3": 1, "uint8": 1}
PREFIX = "model."
VISION_TOWER = OPENPI + "paligemma.model.vision_tower."
PICKLE_MAGIC = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: its key there, its dtype and shape."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * BYTES[self.dtype]


def read_headers(files: Iterable[Path], quantised: bool = False) -> list[StoredTensor]:
    """Every tensor of `files`, without its numbers; CheckpointError for a file that is not whole, or in low precision
    where it should not be."""
    names = DTYPE_NAMES | LOW_DTYPES if quantised else DTYPE_NAMES
    return [tensor for file in files for tensor in _read_header(file, names)]


def by_openpi_name(stored: Iterable[StoredTensor]) -> tuple[dict[str, StoredTensor], list[StoredTensor], Naming]:
    """Tensors the model may read by openpi's name, those that nobody reads, and how the file names them."""
    named: dict[str, StoredTensor] = {}
    naming: Naming = "plain"
    for tensor in stored:
        name = canonical_name(tensor.key)
        if "lora" in name.lower():
            raise CheckpointError(f"tensor '{tensor.key}'", expected="weights with their LoRA adapters merged",
                                  received="adapters beside them", way_out="Merge the adapters and save it again.")
        if tensor.key.startswith(PREFIX):
            naming = "prefixed"
        if name in named:
            raise CheckpointError(f"tensor '{tensor.key}'", expected="every tensor once",
                                  received=f"also as '{named[name].key}' in {named[name].file.name}",
                                  way_out="Save the checkpoint again; it is not clear which one is right.")
        named[name] = tensor
    unused = [named.pop(name) for name in UNUSED if name in named]
    if TIED_EMBEDDING in named:
        head = named.pop(TIED_EMBEDDING)
        if EMBEDDING in named:  # newer lerobot: no longer tied, and the model reads embed_tokens
            unused.append(head)
        else:
            named[EMBEDDING] = head
    return named, unused, naming


def canonical_name(key: str) -> str:
    """A file's key to openpi's name: without lerobot's prefix, with the segment newer transformers leave out."""
    name = key.removeprefix(PREFIX)
    if name.startswith(VISION_TOWER) and not name.startswith(VISION_TOWER + "vision_model."):
        name = VISION_TOWER + "vision_model." + name.removeprefix(VISION_TOWER)
    return name


def layer_indices(names: Iterable[str], stack: str) -> set[int]:
    """The layer numbers that occur under `stack`, e.g. `...language_model.`."""
    pattern = re.compile(re.escape(stack) + r"layers\.(\d{1,4})\.")
    return {int(found[1]) for found in map(pattern.match, names) if found}


def _read_header(file: Path, names: Mapping[str, str]) -> list[StoredTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}
            found = [(key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()]
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(file, error) from error
    for key, dtype, _ in found:
        if dtype not in names:
            raise CheckpointError(f"tensor '{key}' in {file}", expected="one of " + ", ".join(names.values()),
                                  received=dtype, way_out="Take the checkpoint before it was quantised, or keep the "
                                  "quant_config.json of `pi05 quantize` with it.")
    return [StoredTensor(file, key, names[dtype], shape) for key, dtype, shape in found]


def unreadable(file: Path, error: Exception) -> CheckpointError:
    """The error for a file that safetensors refused; its first bytes tell the common cases apart."""
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as broken:
        return CheckpointError(str(file), expected="a readable file", received=str(broken),
                               way_out="Check the path and its permissions.")
    expected, way_out = "a whole safetensors file", f"Copy or download it again; it is {file.stat().st_size} bytes now."
    if head.startswith(PICKLE_MAGIC) and head[8:9] != b"{":  # a cut safetensors file can begin with the same bytes
        return pickled(file)
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError(str(file), expected=expected, received="a git-lfs pointer, not the file itself",
                               way_out="Run `git lfs pull` where it was cloned.")
    return CheckpointError(str(file), expected=expected, received=str(error), way_out=way_out)


def pickled(file: Path) -> CheckpointError:
    """Unpickling runs whatever code the file brings, so it is never done here."""
    return CheckpointError(str(file), expected="model.safetensors", received="a pickle (torch.save)",
                           way_out="Convert it with safetensors.torch.save_file on a machine that may trust it.")
