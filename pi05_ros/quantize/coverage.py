"""How many Linears and bytes a recipe moves to which precision, counted on a model without memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from pi05_ros.config import Pi05Config
from pi05_ros.model.low_precision import BITS
from pi05_ros.quantize.recipes import GROUPS, Recipe, assign, group_of, linear_names, skeleton

SIXTEEN = "16 bits"


@dataclass
class Group:
    """Linears and weights of a group, by precision; `bytes_before` in 16 bits. Biases stay as they are."""

    linears: Counter[str] = field(default_factory=Counter)
    weights: Counter[str] = field(default_factory=Counter)

    @property
    def bytes_before(self) -> int:
        return 2 * sum(self.weights.values())

    @property
    def bytes_after(self) -> int:
        return int(sum(count * BITS.get(precision, 16.0) / 8 for precision, count in self.weights.items()))


@dataclass(frozen=True)
class Coverage:
    """Groups of Linears; `other_bytes`: embeddings, convolution, norms and biases, in 16 bits."""

    recipe: str
    groups: dict[str, Group]
    other_bytes: int

    @property
    def linears(self) -> Counter[str]:
        return sum((group.linears for group in self.groups.values()), Counter())

    @property
    def share(self) -> float:
        """Of the Linears, by number, in less than 16 bits."""
        return 1 - self.linears[SIXTEEN] / self.linears.total()

    @property
    def bytes_before(self) -> int:
        return self.other_bytes + sum(group.bytes_before for group in self.groups.values())

    @property
    def bytes_after(self) -> int:
        return self.other_bytes + sum(group.bytes_after for group in self.groups.values())

    def as_data(self) -> dict:
        return {"recipe": self.recipe, "linears": dict(self.linears), "share": self.share,
                "bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "other_bytes": self.other_bytes,
                "groups": {name: {"linears": dict(group.linears), "weights": dict(group.weights),
                                  "bytes_before": group.bytes_before, "bytes_after": group.bytes_after}
                           for name, group in self.groups.items()}}


def coverage(recipe: Recipe, config: Pi05Config) -> Coverage:
    """Raises ConfigError for a recipe that does not fit the model."""
    model = skeleton(config)
    names = linear_names(model)
    chosen = assign(recipe, names)
    groups = {name: Group() for name in GROUPS}
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        group, precision = groups[group_of(name)], chosen.get(name, SIXTEEN)
        group.linears[precision] += 1
        group.weights[precision] += layer.weight.numel()
    weights = sum(group.weights.total() for group in groups.values())
    others = sum(p.numel() for p in model.parameters()) - weights
    return Coverage(recipe.name, {name: group for name, group in groups.items() if group.linears}, 2 * others)
