"""Quantised against not: the same observations and the same noise through both, and proof that they are two models.

What is compared: each stage alone, on the reference's own input to it; the actions of the whole forward; and x_t after
every denoising step. Errors are mean square, relative (norm of the difference over norm of the reference) and 1 -
cosine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pi05_ros.errors import CheckpointError
from pi05_ros.model import flow
from pi05_ros.model.pi05 import Pi05, PrefixCache
from pi05_ros.model.quantised_linear import QuantisedLinear, quantised_linears
from pi05_ros.quantize.layer_errors import LayerError, layer_errors, relative, worst
from pi05_ros.quantize.recipes import unread_layers
from pi05_ros.quantize.samples import OnDevice, Sample

STAGES = ("vision", "keys", "values", "expert", "actions")


@dataclass(frozen=True)
class Difference:
    """Of one tensor from the reference's."""

    mean_square: float
    relative: float
    one_minus_cosine: float

    @classmethod
    def of(cls, value: Tensor, reference: Tensor) -> Difference:
        value, reference = value.double().flatten(), reference.double().flatten().to(value.device)
        cosine = torch.nn.functional.cosine_similarity(value, reference, dim=0)
        return cls(float((value - reference).square().mean()), relative(value, reference), 1 - float(cosine))


@dataclass
class Comparison:
    """Every observation's differences: by stage, and after each denoising step; the layers'; how layers ran.

    runs: of how many layers did products run how ("simulated", "tensor cores"), and how many of the reference's layers
    are quantised (must be 0).
    """

    stages: dict[str, list[Difference]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    steps: list[list[Difference]] = field(default_factory=list)
    layers: dict[str, LayerError] = field(default_factory=dict)
    runs: Counter[str] = field(default_factory=Counter)
    idle: list[str] = field(default_factory=list)  # quantised layers that should have run and did not
    unchanged: list[str] = field(default_factory=list)  # quantised layers whose weights are the reference's
    wider: list[str] = field(default_factory=list)  # layers that a backend does not multiply in FP8
    wider_share: float = 0.0  # of the quantised weights that it reads

    @property
    def worst_layer(self) -> str:
        return worst(self.layers)

    def largest(self, stage: str, what: str = "relative") -> float:
        """NaN wins: it is no small error."""
        return float(torch.tensor([getattr(one, what) for one in self.stages[stage]]).amax())

    def as_data(self) -> dict[str, Any]:
        return {"stages": {stage: [asdict(one) for one in found] for stage, found in self.stages.items()},
                "steps": [[asdict(one) for one in observation] for observation in self.steps],
                "layers": {name: asdict(one) for name, one in self.layers.items()}, "worst_layer": self.worst_layer,
                "runs": dict(self.runs), "idle": self.idle, "unchanged": self.unchanged, "wider": self.wider,
                "wider_share": self.wider_share,
                "simulated": bool(self.runs["simulated"])}


@torch.no_grad()
def compare(reference: Pi05, quantised: Pi05, samples: Sequence[Sample], num_steps: int, resize: str = "pil",
            on_progress: Callable[[int, int], None] | None = None) -> Comparison:
    """Both models on one device, in one dtype.

    Raises:
        CheckpointError: they are no pair: the reference is quantised, the other is not, or they are of other sizes.
    """
    layers, found = quantised_linears(quantised), Comparison()
    _check_pair(reference, quantised, layers)
    for layer in layers.values():
        layer.calls.clear()
    for done, sample in enumerate(samples):
        _compare_one(reference, quantised, sample, num_steps, resize, found)
        if on_progress:
            on_progress(done + 1, len(samples))
    unread = unread_layers(reference.config)
    found.idle = [name for name, layer in layers.items() if not layer.calls and name not in unread]
    found.runs = sum((Counter(dict.fromkeys(layer.calls, 1)) for layer in layers.values()), Counter())
    found.layers = layer_errors(reference, {name: one for name, one in layers.items() if name not in unread},
                                samples, resize)
    found.unchanged = [name for name, layer in layers.items()
                       if torch.equal(layer.dequantised(), reference.get_submodule(name).weight.float())]  # type: ignore
    return found


def _check_pair(reference: Pi05, quantised: Pi05, layers: Mapping[str, QuantisedLinear]) -> None:
    if not layers or quantised_linears(reference):
        raise CheckpointError("validation", expected="a quantised model and the one before quantisation",
                              received="two without quantised layers" if not layers else "a quantised reference",
                              way_out="Give the output of `pi05 quantize`, and --checkpoint what it was made from.")
    if reference.config != quantised.config:
        raise CheckpointError("validation", expected=f"two models of one size: {reference.config}",
                              received=str(quantised.config), way_out="Give what the quantised one was made from.")


def _compare_one(reference: Pi05, quantised: Pi05, sample: Sample, num_steps: int, resize: str,
                 found: Comparison) -> None:
    device = next(reference.parameters()).device
    batch = OnDevice.of([sample], device)
    pixels = reference.prepare_images(batch.frames, device, resize)
    image_tokens = {model: model.encode_images(pixels) for model in (reference, quantised)}
    right = _prefill(reference, image_tokens[reference], batch)
    alone = _prefill(quantised, image_tokens[reference], batch)
    whole = _prefill(quantised, image_tokens[quantised], batch)
    truth, actions, expert = (_trajectory(model, cache, batch, num_steps) for model, cache in
                              ((reference, right), (quantised, whole), (quantised, right)))
    pairs = ((image_tokens[quantised], image_tokens[reference]), (alone.keys, right.keys),
             (alone.values, right.values), (expert[-1], truth[-1]), (actions[-1], truth[-1]))
    for stage, (value, expected) in zip(STAGES, pairs, strict=True):
        found.stages[stage].append(Difference.of(value, expected))
    found.steps.append([Difference.of(value, expected) for value, expected in zip(actions, truth, strict=True)])


def _prefill(model: Pi05, image_tokens: Tensor, batch: OnDevice) -> PrefixCache:
    return model.prefill(image_tokens, batch.image_mask, batch.tokens, batch.token_mask)


def _trajectory(model: Pi05, cache: PrefixCache, batch: OnDevice, num_steps: int) -> list[Tensor]:
    """x_t after each step; the last is the actions."""
    entered: list[Tensor] = []

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        entered.append(x_t)
        return model.velocity(cache, x_t, t, batch.state)

    last = flow.integrate(velocity, batch.noise, num_steps)
    return [*entered[1:], last]
