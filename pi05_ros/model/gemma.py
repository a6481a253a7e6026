"""Gemma, plain (prefix) and with adaRMS (action expert), in the cached form of PI05_SPEC section 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi05_ros.config import GemmaConfig
from pi05_ros.model.positions import rotate

RMS_EPS = 1e-6
KeysValues = tuple[Tensor, Tensor]  # two [B, kv_heads, T, head_dim], after RoPE


def rms_normalise(x: Tensor) -> Tensor:
    """x / rms(x) over the last axis, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + RMS_EPS)


class RMSNorm(nn.Module):
    """Plain RMSNorm with (1 + weight); has no gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, cond: None = None) -> tuple[Tensor, None]:
        return (rms_normalise(x) * (1.0 + self.weight.float())).to(x.dtype), None


class AdaRMSNorm(nn.Module):
    """RMSNorm modulated by the flow time: chunks of Linear(cond) are scale, shift, gate, in this order.

    cond is float32 [B, 1, width] (one flow time) or [B, T, width] (one a token).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        return modulate(x, self.dense(cond.to(self.dense.weight.dtype)))


def modulate(x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise x, then scale and shift it; modulation [..., 3*width] also holds the gate of what comes after."""
    scale, shift, gate = modulation.chunk(3, dim=-1)
    y = rms_normalise(x) * (1.0 + scale.float()) + shift.float()
    return y.to(x.dtype), gate.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_heads // config.num_kv_heads
        self.q_proj = nn.Linear(config.width, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.width, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, heads*head_dim] to [B, heads, T, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_values(self, x: Tensor, rope: KeysValues) -> KeysValues:
        return rotate(self.heads(self.k_proj(x)), rope), self.heads(self.v_proj(x))

    def forward(self, x: Tensor, rope: KeysValues, mask: Tensor | None,
                past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """`mask` None: every query sees every key."""
        q = rotate(self.heads(self.q_proj(x)), rope)
        new = keys, values = self.keys_values(x, rope)
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        keys, values = (t.repeat_interleave(self.groups, dim=1) for t in (keys, values))
        logits = torch.matmul(q, keys.transpose(2, 3)) * self.head_dim**-0.5
        if mask is not None:
            logits = logits + mask
        weights = logits.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        return self.o_proj(torch.matmul(weights, values).transpose(1, 2).flatten(2)), new


class Mlp(nn.Module):
    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaLayer(nn.Module):
    def __init__(self, config: GemmaConfig, norm: type[RMSNorm] | type[AdaRMSNorm]) -> None:
        super().__init__()
        self.input_layernorm = norm(config.width)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = norm(config.width)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, rope: KeysValues, mask: Tensor | None, cond: Tensor | None = None,
                past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        n, gate = self.input_layernorm(x, cond)
        attended, new = self.self_attn(n, rope, mask, past)
        x = gated_residual(x, attended, gate)
        n, gate = self.post_attention_layernorm(x, cond)
        return gated_residual(x, self.mlp(n), gate), new

    def keys_values(self, x: Tensor, rope: KeysValues) -> KeysValues:
        """K and V alone: all that anybody reads of the last prefix layer."""
        return self.self_attn.keys_values(self.input_layernorm(x)[0], rope)


class Gemma(nn.Module):
    """The weights of one stack: `embed_tokens` only where the configuration has a vocabulary."""

    def __init__(self, config: GemmaConfig, norm: type[RMSNorm] | type[AdaRMSNorm]) -> None:
        super().__init__()
        if config.vocab_size:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(GemmaLayer(config, norm) for _ in range(config.depth))
        self.norm = norm(config.width)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + y if gate is None else x + y * gate
