"""Weights on their way into the model: openpi's names, sources, dtypes.

A source yields tensors under openpi's names without prefix `model.` (PI05_SPEC section 11a); `load` puts them
into a `Pi05`, one at a time, straight to device and dtype, and raises unless every tensor fits exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from pi05_ros.config import Pi05Config
from pi05_ros.errors import CheckpointError, ConfigError
from pi05_ros.model.low_precision import FP8
from pi05_ros.model.pi05 import Pi05

if TYPE_CHECKING:
    from pi05_ros.model.quant_config import Quantisation

OPENPI = "paligemma_with_expert."
# Our module -> openpi's prefix. Modules not listed (action_in_proj, time_mlp_in, ...) have the same name.
PREFIXES = {
    "vision_tower.": OPENPI + "paligemma.model.vision_tower.vision_model.",
    "projector.": OPENPI + "paligemma.model.multi_modal_projector.linear.",
    "language_model.": OPENPI + "paligemma.model.language_model.",
    "action_expert.": OPENPI + "gemma_expert.model.",
}
EMBEDDING = OPENPI + "paligemma.model.language_model.embed_tokens.weight"
TIED_EMBEDDING = OPENPI + "paligemma.lm_head.weight"  # where files keep the embedding (tied and de-duplicated)
UNUSED = (OPENPI + "gemma_expert.lm_head.weight",)  # in every file, read by nobody
# In bfloat16 mode these stay float32 (PI05_SPEC section 7); the top-level projections and time MLPs do too.
FLOAT32_PARTS = ("patch_embedding", "position_embedding", "input_layernorm", "post_attention_layernorm",
                 "model.norm")
# For reports: part of the model -> how openpi's names of it begin; first match wins.
PARTS = {
    "vision": PREFIXES["vision_tower."],
    "projector": PREFIXES["projector."],
    "embedding": EMBEDDING,
    "prefix": PREFIXES["language_model."],
    "expert": PREFIXES["action_expert."],
    "heads": "",
}
# Which modules each stage reads, so that a hybrid of backends loads no weight twice.
STAGE_MODULES = {
    "images": (),
    "vision": ("vision_tower.", "projector."),
    "prefix": ("language_model.",),
    "expert": ("action_expert.", "action_", "time_mlp", "state_proj"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


class WeightSource(Protocol):
    """Anything that holds the weights of one model."""

    @property
    def config(self) -> Pi05Config:
        """What the weights are for."""

    @property
    def quantisation(self) -> Quantisation | None:
        """Which layers are in low precision; None: none."""

    def get(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        """The tensor of openpi's `name` on `device`, in the source's own dtype, every number finite."""


def openpi_name(name: str) -> str:
    """Our parameter name to openpi's."""
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def expected_shapes(config: Pi05Config) -> dict[str, torch.Size]:
    """openpi's name to shape, for every tensor the model reads."""
    with torch.device("meta"):
        model = Pi05(config)
    return {openpi_name(name): p.shape for name, p in model.named_parameters()}


def parameter_counts(config: Pi05Config) -> dict[str, int]:
    """Number of parameters of each of `PARTS`."""
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in expected_shapes(config).items():
        counts[next(part for part, start in PARTS.items() if name.startswith(start))] += shape.numel()
    return counts


def target_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype openpi's PyTorch gives the tensor of openpi's `name` when serving in `dtype`."""
    if not name.startswith(OPENPI) or any(part in name for part in FLOAT32_PARTS):
        return torch.float32
    return dtype


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError("dtype", expected=" or ".join(DTYPES), received=repr(dtype),
                          way_out="float16 is not offered: Gemma's activations exceed its range.")
    return DTYPES[dtype]


def load(source: WeightSource, device: torch.device | str = "cpu", dtype: str | torch.dtype = "float32",
         stages: Iterable[str] = tuple(STAGE_MODULES), on_progress: Progress | None = None) -> Pi05:
    """A `Pi05` with the source's weights for `stages`; parameters of other stages stay without memory (meta)."""
    dtype, device = parse_dtype(dtype), torch.device(device)
    with torch.device("meta"):
        model = Pi05(source.config)
        if source.quantisation:
            source.quantisation.install(model)
    modules = tuple(prefix for stage in stages for prefix in STAGE_MODULES[stage])
    wanted = {name: p for name, p in model.named_parameters() if name.startswith(modules)} if modules else {}
    total, done = sum(p.numel() for p in wanted.values()), 0
    for name, parameter in wanted.items():
        theirs, shape = openpi_name(name), parameter.shape
        tensor = source.get(theirs, shape, device)
        check_shape(theirs, tensor.shape, shape)
        own = parameter.dtype if is_quantised(model, name) else target_dtype(theirs, dtype)
        _assign(model, name, tensor.to(device=device, dtype=own))
        done += shape.numel()
        if on_progress:
            on_progress(done, total)
    return model.eval().requires_grad_(False)


def check_shape(name: str, found: Sequence[int], shape: torch.Size) -> None:
    if tuple(found) != tuple(shape):
        raise CheckpointError(f"tensor '{name}'", expected=f"shape {list(shape)}", received=str(list(found)),
                              way_out="The file belongs to a model of another size; check its config.json.")


def is_quantised(model: Pi05, name: str) -> bool:
    """The parameter's dtype is its number format, whatever the model's is."""
    path, _, leaf = name.rpartition(".")
    return leaf in getattr(model.get_submodule(path), "own_dtypes", ())


def check_tensor(name: str, tensor: Tensor, shape: torch.Size) -> None:
    """The shape is right and every number finite."""
    check_shape(name, tensor.shape, shape)
    tensor = tensor.float() if tensor.dtype == FP8 else tensor  # aminmax lacks it
    ends = torch.stack(torch.aminmax(tensor))  # NaN shows in both; no copy of the tensor, which isfinite() makes
    if not torch.isfinite(ends).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"tensor '{name}'", expected="finite numbers", received=f"{bad} NaN or infinite values",
                              way_out="The training diverged or the file is damaged; take an earlier checkpoint.")


def check_names(names: Iterable[str], expected: Mapping[str, object]) -> None:
    """Every expected name once, nothing else but the unused heads; the embedding may stand under its tied name."""
    found = set(names) - set(UNUSED)
    if EMBEDDING in found or TIED_EMBEDDING in found:
        found = (found - {TIED_EMBEDDING}) | {EMBEDDING}
    missing, extra = sorted(set(expected) - found), sorted(found - set(expected))
    if missing:
        raise CheckpointError(f"tensor '{missing[0]}'", expected=f"in the file, as {len(expected)} tensors are",
                              received=f"no such key ({len(missing)} missing in all)",
                              way_out="The file is incomplete or of another model; convert or download it again.")
    if extra:
        raise CheckpointError(f"tensor '{extra[0]}'", expected="only tensors of pi0.5 or pi0",
                              received=f"a key this model does not have ({len(extra)} in all)",
                              way_out="The checkpoint has a feature this package does not implement.")


def _assign(model: torch.nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, torch.nn.Parameter(tensor, requires_grad=False))
