"""Outlier channels put into a model without changing what it computes.

Random weights give activations without the few channels, tens of times larger than the rest, that trained transformers
have, and so flatter quantisation. Here a few channels of every norm's output and of every gated MLP's hidden layer are
made larger by a factor, and the weights that read them smaller by the same: a power of two, so that the actions stay
the same but for rounding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from pi05_ros.config import Pi05Config
from pi05_ros.errors import ConfigError
from pi05_ros.model.quant_config import Quantisation
from pi05_ros.model.weights import OPENPI, WeightSource

LAYER = re.compile(r"^(?P<layer>.+\.layers\.\d+)\.(?P<rest>.+)$")
# Norms and the site they write, Linears and the site they read.
GIVEN = {"input_layernorm": "attention", "layer_norm1": "attention", "post_attention_layernorm": "mlp",
         "layer_norm2": "mlp"}
READS = {"self_attn.q_proj": "attention", "self_attn.k_proj": "attention", "self_attn.v_proj": "attention",
         "mlp.gate_proj": "mlp", "mlp.up_proj": "mlp", "mlp.fc1": "mlp", "mlp.down_proj": "hidden"}


@dataclass(frozen=True)
class OutlierSource:
    """A `WeightSource`: another one's weights with `share` of the channels `factor` times larger (a power of two)."""

    source: WeightSource
    factor: float = 32.0
    share: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.factor >= 1 or np.log2(self.factor) % 1:
            raise ConfigError("outliers", expected="a power of two from 1 on", received=str(self.factor),
                              way_out="32 is near what trained transformers have.")

    @property
    def config(self) -> Pi05Config:
        return self.source.config

    @property
    def quantisation(self) -> Quantisation | None:
        return self.source.quantisation

    def get(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        tensor = self.source.get(name, shape, device)
        found = LAYER.match(name)
        if not found or not name.startswith(OPENPI):
            return tensor
        layer, (module, _, leaf) = found["layer"], found["rest"].rpartition(".")
        if module in READS and leaf == "weight":
            tensor = tensor / self._channels(layer, READS[module], shape[1], device)
        if module == "mlp.up_proj":
            tensor = tensor * self._channels(layer, "hidden", shape[0], device)[:, None]
        if module in GIVEN:
            return self._larger(tensor, self._channels(layer, GIVEN[module], len(tensor), device),
                                plus_one="layer_norm" not in module)
        if module.endswith(".dense"):
            return self._modulated(tensor, leaf, self._channels(layer, GIVEN[module.removesuffix(".dense")],
                                                                len(tensor) // 3, device))
        return tensor

    def _channels(self, layer: str, site: str, width: int, device: torch.device) -> Tensor:
        """float32 [width]: the factor at the outliers of this site, 1 elsewhere; at least one outlier."""
        digest = sha256(f"{self.seed}/{layer}/{site}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        scale = np.ones(width, np.float32)
        scale[rng.choice(width, max(1, round(self.share * width)), replace=False)] = self.factor
        return torch.from_numpy(scale).to(device)

    @staticmethod
    def _larger(tensor: Tensor, channels: Tensor, plus_one: bool) -> Tensor:
        """The weight or bias of a norm; RMSNorm multiplies with 1 + weight, LayerNorm with weight. In float32: scaled
        weights near -1 would lose what they say in 16 bits."""
        tensor = tensor.float()
        return (1 + tensor) * channels - 1 if plus_one else tensor * channels

    @staticmethod
    def _modulated(tensor: Tensor, leaf: str, channels: Tensor) -> Tensor:
        """adaRMS: 1 + scale and shift grow, the gate stays."""
        tensor = tensor.float().clone()
        scale, shift, _ = tensor.chunk(3)
        by = channels if leaf == "bias" else channels[:, None]
        scale.mul_(by)
        shift.mul_(by)
        if leaf == "bias":
            scale.add_(channels - 1)
        return tensor
