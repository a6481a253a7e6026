"""A checkpoint of openpi or lerobot, opened: checked whole from its headers, its tensors read when asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pi05_ros.config import Pi05Config
from pi05_ros.errors import CheckpointError
from pi05_ros.model.checkpoint_config import Kind, Trainer, no_horizon, read_config
from pi05_ros.model.checkpoint_files import find_tokenizer, locate
from pi05_ros.model.checkpoint_sizes import model_kind, model_sizes
from pi05_ros.model.json_fields import JsonFields
from pi05_ros.model.lerobot_processors import PREPROCESSOR, read_processors
from pi05_ros.model.norm_stats import openpi_processing
from pi05_ros.model.quant_config import Quantisation, read_quantisation
from pi05_ros.model.stored_tensors import Naming, StoredTensor, by_openpi_name, read_headers
from pi05_ros.model.weights import check_names, check_shape, check_tensor, expected_shapes
from pi05_ros.schema import Conventions, NormStats

CONFIG = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A `WeightSource`, and all that came with the weights.

    Args:
        path: the directory.
        config: sizes from the tensors, horizon and prompt length from config.json or the options.
        conventions: what the trainer did to its data.
        stats: normalisation statistics, read from `stats_path`; None if the checkpoint has none.
        tokenizer_path: the SentencePiece model, or None.
        camera_keys: lerobot's camera names in the order the model sees them; () for openpi.
        robot_action_dim, n_action_steps: lerobot's output width and executed actions, or None.
        missing: what is not there: `config.json`, `statistics`, `tokenizer`, `cameras`.
        notes: what the files cannot tell and the user must know.
        tensors: openpi's name to the tensor in the file, for all that the model reads; `unused`: the others.
        rtc_training_max_delay: most rows it saw given as clean actions in training (lerobot); 0: none.
        quantisation: what quant_config.json says; None: no layer is in low precision.
    """

    path: Path
    config: Pi05Config
    conventions: Conventions
    stats: NormStats | None
    stats_path: Path | None
    tokenizer_path: Path | None
    camera_keys: tuple[str, ...]
    robot_action_dim: int | None
    n_action_steps: int | None
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    unused: tuple[StoredTensor, ...] = field(repr=False)
    rtc_training_max_delay: int = 0
    naming: Naming = "plain"
    quantisation: Quantisation | None = None
    _files: dict[tuple[Path, str], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def kind(self) -> Kind:
        return self.config.kind

    @property
    def layout(self) -> str:
        """`openpi`, `lerobot`, or `lerobot prefixed` (every key begins with `model.`)."""
        return self.conventions.trainer + (" prefixed" if self.naming == "prefixed" else "")

    @property
    def stored_dtypes(self) -> Counter[str]:
        """Number of tensors in the files by dtype."""
        return Counter(tensor.dtype for tensor in (*self.tensors.values(), *self.unused))

    def get(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        """Read the tensor of openpi's `name` from the mapped file straight to `device`, in its stored dtype.

        Raises:
            CheckpointError: no such tensor, another shape, NaN or infinity, a file that changed since it was opened.
        """
        if name not in self.tensors:
            raise CheckpointError(f"tensor '{name}'", expected="a name of weights.expected_shapes",
                                  received="one the model does not have", way_out="Correct the caller.")
        stored = self.tensors[name]
        try:
            if (stored.file, str(device)) not in self._files:
                self._files[stored.file, str(device)] = safe_open(stored.file, framework="pt", device=str(device))
            tensor = self._files[stored.file, str(device)].get_tensor(stored.key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor '{stored.key}' in {stored.file}", expected="to be read",
                                  received=str(error), way_out="Did the file change? Open it again.") from error
        check_tensor(stored.key, tensor, shape)
        if self.quantisation:
            self.quantisation.check_scale(name, tensor)
        return tensor


def open_checkpoint(path: str | Path, *, action_horizon: int | None = None, max_token_len: int | None = None,
                    asset_id: str = "", tokenizer: str | Path | None = None,
                    rope_inv_freq: str = "float32") -> Checkpoint:
    """Open a directory or a .safetensors file, and check every name, shape and setting before reading a number.

    Args:
        action_horizon, max_token_len: override config.json; the horizon is needed where config.json has none.
        asset_id: folder of openpi's statistics under assets/; needed where there are several.
        tokenizer: SentencePiece model; by default the one in the directory.
        rope_inv_freq: `bfloat16` reproduces the reference's bfloat16 mode (PI05_SPEC trap T1).

    Raises:
        CheckpointError: broken, incomplete, of another model or unsupported; says what was found and the way out.
        ConfigError: an option out of range.
    """
    directory, files = locate(path)
    quantisation = read_quantisation(directory)
    tensors, unused, naming = by_openpi_name(read_headers(files, quantisation is not None))
    full_size = quantisation.full_size(tensors) if quantisation else tensors
    kind = model_kind(full_size)
    settings = JsonFields.read(directory / CONFIG) if (directory / CONFIG).exists() else JsonFields(directory / CONFIG)
    trainer = _trainer(directory, naming, settings)
    described = read_config(settings, trainer, kind)
    sizes = model_sizes(full_size, kind, settings)
    _check_tensors(full_size, sizes)
    horizon = described.action_horizon if action_horizon is None else action_horizon
    if horizon is None:
        raise no_horizon(settings)
    config = replace(sizes, action_horizon=horizon, rope_inv_freq=rope_inv_freq,  # type: ignore[arg-type]
                     max_token_len=described.max_token_len if max_token_len is None else max_token_len)
    if trainer == "openpi":
        processing = openpi_processing(directory, asset_id, described, kind)
    else:
        processing = read_processors(directory, settings, kind, described.robot_action_dim)
    tokenizer_path = find_tokenizer(directory, tokenizer)
    present = {CONFIG: (directory / CONFIG).exists(), "statistics": processing.stats, "tokenizer": tokenizer_path,
               "cameras": described.camera_keys or trainer == "openpi"}
    return Checkpoint(
        path=directory, config=config, conventions=processing.conventions, stats=processing.stats,
        stats_path=processing.source, tokenizer_path=tokenizer_path, camera_keys=described.camera_keys,
        robot_action_dim=described.robot_action_dim, n_action_steps=described.n_action_steps,
        missing=tuple(name for name, there in present.items() if not there), notes=processing.notes,
        tensors=tensors, unused=tuple(unused), naming=naming, rtc_training_max_delay=described.rtc_training_max_delay,
        quantisation=quantisation)


def _trainer(directory: Path, naming: Naming, settings: JsonFields) -> Trainer:
    """lerobot prefixes its keys, writes pipelines beside config.json, and has keys of its own there."""
    own_keys = not settings.values.keys().isdisjoint(("type", "chunk_size"))
    return "lerobot" if naming == "prefixed" or own_keys or (directory / PREPROCESSOR).exists() else "openpi"


def _check_tensors(tensors: Mapping[str, StoredTensor], sizes: Pi05Config) -> None:
    """Every tensor the model reads is there with its shape, and no other is."""
    shapes = expected_shapes(sizes)
    check_names(tensors, shapes)
    for name, shape in shapes.items():
        check_shape(tensors[name].key, tensors[name].shape, shape)
