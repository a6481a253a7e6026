"""pi0.5, the whole forward: frames -> images -> image tokens -> prefix KV cache -> actions (PI05_SPEC sections 2-7).

The stages below are the contract: every backend has the same four, with the same shapes (see `Pi05`).
pi0 is the same code; it differs in the suffix (a state token, the flow time joined to the actions) and in plain norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi05_ros.config import Pi05Config
from pi05_ros.model import flow, images, positions
from pi05_ros.model.gemma import AdaRMSNorm, Gemma, GemmaLayer, KeysValues, RMSNorm
from pi05_ros.model.siglip import SiglipVision
from pi05_ros.model.time_embedding import time_embedding
from pi05_ros.schema import Guidance


@dataclass(frozen=True)
class PrefixCache:
    """keys, values: [layers, B, kv_heads, P, head_dim], keys after RoPE; pad_mask: bool [B, P], True where valid."""

    keys: Tensor
    values: Tensor
    pad_mask: Tensor


class Pi05(nn.Module):
    """B batch, N cameras, L prompt slots, P = N*256 + L, H horizon, A = 32, W prefix width, E expert width."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.config = config
        width = config.expert.width
        self.vision_tower = SiglipVision(config.vision)
        self.projector = nn.Linear(config.vision.width, config.prefix.width)
        self.language_model = Gemma(config.prefix, RMSNorm)
        self.action_expert = Gemma(config.expert, AdaRMSNorm if config.kind == "pi05" else RMSNorm)
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        if config.kind == "pi05":
            self.time_mlp_in, self.time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(config.action_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)

    def prepare_images(self, frames: Sequence[np.ndarray | None], device: torch.device | str = "cpu",
                       resize: str = "pil") -> Tensor:
        """Stage 0: N frames, uint8 [B, h, w, 3] RGB of any size or None, to float32 [B, N, 3, 224, 224] in [-1, 1]."""
        return images.prepare(frames, self.config.vision.image_size, resize, torch.device(device))

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Stage 1, vision: [B, N, 3, 224, 224] to image tokens [B, N*256, W]."""
        batch = pixels.shape[0]
        tokens = self.projector(self.vision_tower(pixels.flatten(0, 1)))
        return tokens.unflatten(0, (batch, -1)).flatten(1, 2)

    def embed_prefix(self, image_tokens: Tensor, tokens: Tensor) -> Tensor:
        """Image tokens (not scaled), then prompt tokens times sqrt(W): [B, P, W]."""
        text = self.language_model.embed_tokens(tokens) * self.config.prefix.width**0.5
        return torch.cat([image_tokens, text.to(image_tokens.dtype)], dim=1)

    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """Stage 2, prefix: image tokens, image_mask [B, N], tokens and token_mask [B, L] to the KV cache."""
        pad_mask = positions.prefix_pad_mask(image_mask, token_mask, self.config.vision.num_patches)
        mask = positions.prefix_attention_mask(pad_mask)
        x = self.embed_prefix(image_tokens, tokens)
        rope = self.rope(positions.prefix_positions(pad_mask), x.dtype)
        return PrefixCache(*self.prefix_layers(x, rope, mask), pad_mask)

    def prefix_layers(self, x: Tensor, rope: KeysValues, mask: Tensor | None) -> KeysValues:
        """Embedded prefix [B, P, W] to keys and values [layers, B, kv_heads, P, head_dim]; mask None: all valid."""
        cache = []
        for layer in self.language_model.layers[:-1]:
            x, keys_values = layer(x, rope, mask)
            cache.append(keys_values)
        last = cast(GemmaLayer, self.language_model.layers[-1])
        cache.append(last.keys_values(x, rope))  # nobody reads more of it
        return torch.stack([k for k, _ in cache]), torch.stack([v for _, v in cache])

    def denoise(self, cache: PrefixCache, noise: Tensor, num_steps: int, state: Tensor | None = None,
                guidance: Guidance | None = None) -> Tensor:
        """Stage 3, action expert: noise float32 [B, H, A] to actions x_0; `state` [B, A] is read by pi0 only."""

        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            return self.velocity(cache, x_t, t, state)

        return flow.integrate(velocity, noise, num_steps, guidance)

    def velocity(self, cache: PrefixCache, x_t: Tensor, t: Tensor, state: Tensor | None = None) -> Tensor:
        """v_t, float32 [B, H, A], at flow time t: a scalar, [B, 1], or [B, H] for one time a token."""
        suffix, cond, block_starts = self.embed_suffix(x_t, t, state)
        out = self.run_expert(cache, suffix, cond, block_starts)
        return self.action_out_proj(out[:, -x_t.shape[1]:].float())

    def embed_suffix(self, x_t: Tensor, t: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Suffix tokens [B, S, E], the adaRMS condition [B, 1 or H, E] (None for pi0), block flags bool [S]."""
        width, (batch, horizon) = self.config.expert.width, x_t.shape[:2]
        actions = self.action_in_proj(x_t)
        time = time_embedding(t, width).expand(batch, 1 if t.ndim == 0 else t.shape[1], width)
        first = torch.arange(horizon, device=x_t.device) == 0
        if self.config.kind == "pi05":
            return actions, self.condition(time), first
        assert state is not None, "pi0 reads the state"
        joined = torch.cat([actions, time.expand_as(actions)], dim=-1)
        actions = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(joined)))
        return torch.cat([self.state_proj(state)[:, None], actions], dim=1), None, F.pad(first, (1, 0), value=True)

    def condition(self, time: Tensor) -> Tensor:
        """The flow time's features [..., E] to the adaRMS condition (pi0.5)."""
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time))))

    def run_expert(self, cache: PrefixCache, suffix: Tensor, cond: Tensor | None, block_starts: Tensor) -> Tensor:
        """One pass of the action expert over the suffix: [B, S, E], after the final norm."""
        x = suffix.to(cache.keys.dtype)
        mask = positions.suffix_attention_mask(cache.pad_mask, block_starts)
        rope = self.rope(positions.suffix_positions(cache.pad_mask, x.shape[1]), x.dtype)
        return self.expert_layers((cache.keys, cache.values), x, cond, rope, mask)

    def expert_layers(self, cache: KeysValues, x: Tensor, cond: Tensor | None, rope: KeysValues,
                      mask: Tensor | None) -> Tensor:
        """The layers and the final norm on x [B, S, E]; mask None: every token sees the prefix and every other."""
        for layer, past in zip(self.action_expert.layers, zip(*cache, strict=True), strict=True):
            x, _ = layer(x, rope, mask, cond, past)
        return self.action_expert.norm(x, cond)[0]

    def rope(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        inv_freq_dtype = getattr(torch, self.config.rope_inv_freq)
        return positions.rope_tables(position_ids, self.config.prefix.head_dim, inv_freq_dtype, dtype)
