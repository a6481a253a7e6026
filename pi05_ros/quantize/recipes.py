"""Recipes: which layer goes into which precision, as name patterns over the Linears of model/pi05.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from pi05_ros.config import Pi05Config
from pi05_ros.errors import ConfigError
from pi05_ros.model.low_precision import Precision
from pi05_ros.model.pi05 import Pi05

VISION, PREFIX, EXPERT = "vision_tower.encoder.layers.*", "language_model.layers.*", "action_expert.layers.*"
# Every Linear is in exactly one group.
GROUPS: dict[str, tuple[str, ...]] = {
    "vision attention": (f"{VISION}.self_attn.*_proj",),
    "vision MLP": (f"{VISION}.mlp.fc?",),
    "prefix attention": (f"{PREFIX}.self_attn.?_proj",),
    "prefix MLP": (f"{PREFIX}.mlp.*_proj",),
    "expert attention": (f"{EXPERT}.self_attn.?_proj",),
    "expert MLP": (f"{EXPERT}.mlp.*_proj",),
    "norms": ("action_expert.*norm.dense",),
    "projector": ("projector",),
    "heads": ("action_in_proj", "action_out_proj", "time_mlp_*", "state_proj", "action_time_mlp_*"),
}
# Small, and all that is said passes through them; norms and embeddings besides, which are no Linears.
PRESERVED = ("norms", "projector", "heads")
LARGE = tuple(group for group in GROUPS if group not in PRESERVED)


@dataclass(frozen=True)
class Recipe:
    """`layers`: pattern of layer names (as fnmatch) -> precision; where two match, the later holds.

    Gates of validation: `max_error` of the actions (norm of the difference over the norm) on the worst observation, and
    `min_cosine` between them.
    """

    name: str
    summary: str
    layers: Mapping[str, Precision]
    max_error: float
    min_cosine: float
    experimental: bool = False


def _in(precision: Precision, *groups: str) -> dict[str, Precision]:
    return {pattern: precision for group in groups for pattern in GROUPS[group]}


MLPS, ATTENTIONS = LARGE[1::2], LARGE[0::2]
RECIPES = {recipe.name: recipe for recipe in (
    Recipe("fp8_mlp", "the prefix's MLPs in FP8: the safest", _in("fp8", "prefix MLP"), 0.03, 0.999),
    Recipe("fp8", "every large Linear in FP8, vision too", _in("fp8", *LARGE), 0.10, 0.995),
    Recipe("fp8_token", "as fp8, with a scale a token and an output channel", _in("fp8_token", *LARGE), 0.10, 0.995),
    Recipe("balanced", "MLPs in NVFP4, attention in FP8, the rest in 16 bits",
           _in("nvfp4", *MLPS) | _in("fp8", *ATTENTIONS), 0.25, 0.97),
    Recipe("nvfp4", "every large Linear in NVFP4", _in("nvfp4", *LARGE), 0.35, 0.94, experimental=True),
)}


def find_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ConfigError("recipe", expected="one of " + ", ".join(RECIPES), received=repr(name),
                          way_out="Choose one of them; `pi05 coverage` shows what each does.")
    return RECIPES[name]


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def skeleton(config: Pi05Config) -> Pi05:
    """The model without memory."""
    with torch.device("meta"):
        return Pi05(config)


def group_of(name: str) -> str:
    return next(group for group, patterns in GROUPS.items() if any(fnmatchcase(name, one) for one in patterns))


def assign(recipe: Recipe, names: Iterable[str]) -> dict[str, Precision]:
    """Layer -> precision, for the layers that leave 16 bits, in the order of `names`.

    Raises:
        ConfigError: a pattern matches nothing, or a layer that is always preserved.
    """
    names, chosen = list(names), dict[str, Precision]()
    for pattern, precision in recipe.layers.items():
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(f"recipe '{recipe.name}'", expected="patterns that match Linears of the model",
                              received=f"'{pattern}', which matches none of {len(names)}",
                              way_out=f"Write it for names such as '{names[0]}'.")
        if preserved := [name for name in matched if group_of(name) in PRESERVED]:
            raise ConfigError(f"recipe '{recipe.name}'", expected=f"{', '.join(PRESERVED)} in 16 bits",
                              received=f"'{pattern}', which matches '{preserved[0]}'", way_out="Narrow the pattern.")
        chosen |= dict.fromkeys(matched, precision)
    return {name: chosen[name] for name in names if name in chosen}


def unread_layers(config: Pi05Config) -> frozenset[str]:
    """Linears whose output nobody reads: the last prefix layer stops after K and V."""
    last = f"language_model.layers.{config.prefix.depth - 1}"
    return frozenset([f"{last}.self_attn.q_proj", f"{last}.self_attn.o_proj",
                      *(f"{last}.mlp.{name}_proj" for name in ("gate", "up", "down"))])
