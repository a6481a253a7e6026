"""Weights to begin with: what pi0.5's published code takes from pretrained parts, we draw."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from pi05_ros.config import Pi05Config
from pi05_ros.model.gemma import AdaRMSNorm
from pi05_ros.model.pi05 import Pi05

PLACE_FREQUENCY, PLACE_SIZE = 3.0, 0.7  # likewise, over half the picture; rms of a place, against 0.4 of a patch
STATE_FREQUENCY = 6.0  # deviation of the state features' frequencies, in radians over half the state's range


def initial_model(config: Pi05Config, robot_action_dim: int, state_tokens: np.ndarray, seed: int) -> Pi05:
    """A model on the CPU that depends on its arguments alone; norms begin as the identity, gates open.

    What belongs to the padding of the actions begins at zero. As the loss leaves padding out and the padding of x_t is
    zero in training, it stays zero: later the noise there moves nothing (see flow_matching.py).
    """
    generator = torch.Generator().manual_seed(seed)
    model = Pi05(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight.normal_(0.0, module.weight[0].numel() ** -0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, module.embedding_dim**-0.5, generator=generator)
        for module in model.modules():
            if isinstance(module, AdaRMSNorm):
                module.dense.weight.zero_()
                module.dense.bias[2 * module.dense.in_features:] = 1.0  # the gate
        places = model.vision_tower.embeddings.position_embedding
        places.weight.copy_(place_rows(places.num_embeddings, places.embedding_dim, generator))
        model.language_model.embed_tokens.weight[torch.from_numpy(state_tokens)] = state_rows(
            len(state_tokens), config.prefix.width, generator)
        model.action_in_proj.weight[:, robot_action_dim:] = 0.0
        model.action_out_proj.weight[robot_action_dim:] = 0.0
    return model


def place_rows(patches: int, width: int, generator: torch.Generator) -> Tensor:
    """[patches, width]: random plane waves over the square of patches, so that neighbours begin as near vectors."""
    side = torch.linspace(-1, 1, math.isqrt(patches))
    places = torch.cartesian_prod(side, side)  # rows first, as the patches
    frequencies = torch.randn(2, width, generator=generator) * PLACE_FREQUENCY
    phases = torch.rand(width, generator=generator) * 2 * math.pi
    return 2**0.5 * PLACE_SIZE * torch.cos(places @ frequencies + phases)


def state_rows(count: int, width: int, generator: torch.Generator) -> Tensor:
    """[count, width] of about unit rows: random cosines over -1..1, so that near numbers begin as near vectors."""
    frequencies = torch.randn(width, generator=generator) * STATE_FREQUENCY
    phases = torch.rand(width, generator=generator) * 2 * math.pi
    return (2 / width) ** 0.5 * torch.cos(torch.linspace(-1, 1, count)[:, None] * frequencies + phases)
