"""A quantised checkpoint on disk: the ordinary layout with low-precision weights, scales and quant_config.json."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pi05_ros.errors import ConfigError
from pi05_ros.model.checkpoint import Checkpoint
from pi05_ros.model.checkpoint_files import SHARD_INDEX, WEIGHTS
from pi05_ros.model.pi05 import Pi05
from pi05_ros.model.quant_config import Quantisation
from pi05_ros.model.save import save_openpi
from pi05_ros.model.stored_tensors import PREFIX
from pi05_ros.model.weights import EMBEDDING, TIED_EMBEDDING, WeightSource, expected_shapes, openpi_name
from pi05_ros.quantize.ptq import Quantised

CPU = torch.device("cpu")


def save_quantised(source: WeightSource, model: Pi05, layers: Quantised, quantisation: Quantisation,
                   directory: Path) -> Path:
    """Write `layers`, all else as `source` has it, and the files that came with a checkpoint (where there was none,
    those that `model`, of `source`, gives). Returns the file of the weights.

    Raises:
        ConfigError: the directory is that of the checkpoint itself.
    """
    directory.mkdir(parents=True, exist_ok=True)
    prefix = ""
    if isinstance(source, Checkpoint):
        if directory.resolve() == source.path.resolve():
            raise ConfigError("output", expected="another directory than the checkpoint's", received=str(directory),
                              way_out="Choose a new one.")
        prefix = PREFIX if source.naming == "prefixed" else ""
        _copy_beside(source.path, directory)
    else:
        save_openpi(model, directory, source.config)
    tensors = {f"{prefix}{name}": tensor for name, tensor in _tensors(source, layers).items()}
    tensors[prefix + TIED_EMBEDDING] = tensors.pop(prefix + EMBEDDING)
    save_file(tensors, directory / (WEIGHTS + ".part"),
              {"format": "pt", prefix + EMBEDDING: prefix + TIED_EMBEDDING})
    os.replace(directory / (WEIGHTS + ".part"), directory / WEIGHTS)
    quantisation.write(directory)
    return directory / WEIGHTS


def _tensors(source: WeightSource, layers: Quantised) -> dict[str, Tensor]:
    low = {openpi_name(f"{name}.{leaf}"): parameter for name, layer in layers.items()
           for leaf, parameter in layer.named_parameters() if leaf != "bias"}
    kept = {name: source.get(name, shape, CPU) for name, shape in expected_shapes(source.config).items()
            if name not in low}
    return {name: tensor.detach().to(CPU).contiguous() for name, tensor in (kept | low).items()}


def _copy_beside(found: Path, directory: Path) -> None:
    """Everything but the weights: settings, statistics, tokenizer, processors."""
    skipped: Mapping[str, None] = dict.fromkeys([SHARD_INDEX, WEIGHTS])
    for path in sorted(found.iterdir()):
        if path.name in skipped or path.name.startswith("model-") or path.suffix in (".pt", ".part"):
            continue
        if path.is_dir():
            if path.name == "assets":
                shutil.copytree(path, directory / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, directory / path.name)
