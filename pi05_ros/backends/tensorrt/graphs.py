"""The stages as modules of plain tensors, for one observation without padding: what is exported (see names.py).

They are thin: the arithmetic is `model/pi05.py`. All positions are valid, so there are no masks, and positions follow
from lengths. What depends on the flow time alone is `modulation`, which a schedule needs once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from pi05_ros.errors import BackendError
from pi05_ros.model import schedule
from pi05_ros.model.gemma import AdaRMSNorm, GemmaLayer, modulate
from pi05_ros.model.pi05 import Pi05


class VisionGraph(nn.Module):
    """pixels float32 [N, 3, 224, 224] to image tokens [N*256, W]."""

    def __init__(self, model: Pi05) -> None:
        super().__init__()
        self.vision_tower, self.projector = model.vision_tower, model.projector

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projector(self.vision_tower(pixels)).flatten(0, 1)


class PrefixGraph(nn.Module):
    """Image tokens [I, W] and prompt tokens int32 [T] to keys and values [layers, kv_heads, I + T, head_dim]."""

    def __init__(self, model: Pi05, residual: torch.dtype) -> None:
        super().__init__()
        self.model, self.residual = model, residual

    def forward(self, image_tokens: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.model.embed_prefix(image_tokens[None], tokens[None])
        rope = self.model.rope(torch.arange(x.shape[1], device=x.device)[None], x.dtype)
        keys, values = self.model.prefix_layers(x.to(self.residual), rope, None)
        return keys.squeeze(1), values.squeeze(1)


class ModulationGraph(nn.Module):
    """Features of S flow times, float32 [S, E], to the modulations of every norm, float32 [S, 2*layers + 1, 3*E]."""

    def __init__(self, model: Pi05) -> None:
        super().__init__()
        self.model = model

    def forward(self, time_features: Tensor) -> Tensor:
        cond = self.model.condition(time_features)
        return torch.stack([norm.dense(cond) for norm in adaptive_norms(self.model)], dim=1).float()


class StepGraph(nn.Module):
    """One Euler step: x_t float32 [H, 32], modulation float32 [2*layers + 1, 3*E], dt float32 [1] to x_next and v_t."""

    def __init__(self, model: Pi05, residual: torch.dtype) -> None:
        super().__init__()
        give_modulation(model)
        self.model, self.residual = model, residual

    def forward(self, keys: Tensor, values: Tensor, x_t: Tensor, modulation: Tensor,
                dt: Tensor) -> tuple[Tensor, Tensor]:
        v_t = self.velocity(keys, values, x_t, modulation)
        return x_t + dt * v_t, v_t

    def velocity(self, keys: Tensor, values: Tensor, x_t: Tensor, modulation: Tensor) -> Tensor:
        model, horizon = self.model, x_t.shape[0]
        x = model.action_in_proj(x_t)[None].to(self.residual)
        positions = keys.shape[2] + torch.arange(horizon, device=x_t.device)
        rope = model.rope(positions[None], keys.dtype)
        out = model.expert_layers((keys[:, None], values[:, None]), x, modulation, rope, None)
        return model.action_out_proj(out[0].float())


class LoopGraph(nn.Module):
    """All denoising steps: noise float32 [H, 32] to actions; the schedule's modulations are constants."""

    modulation: Tensor

    def __init__(self, model: Pi05, residual: torch.dtype, num_steps: int) -> None:
        super().__init__()
        features = torch.from_numpy(schedule.time_features(schedule.time_grid(num_steps), model.config.expert.width))
        with torch.no_grad():
            modulation = ModulationGraph(model)(features.to(model.action_in_proj.weight.device))
        self.register_buffer("modulation", modulation)
        self.step, self.dt = StepGraph(model, residual), float(schedule.step_size(num_steps))

    def forward(self, keys: Tensor, values: Tensor, noise: Tensor) -> Tensor:
        x = noise
        for modulation in self.modulation:
            x = x + self.dt * self.step.velocity(keys, values, x, modulation)
        return x


class GivenModulation(nn.Module):
    """Stands for an `AdaRMSNorm` whose Linear was computed before: its row of all modulations."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        return modulate(x, cond[self.row])


def adaptive_norms(model: Pi05) -> list[AdaRMSNorm]:
    """In the order of the rows of `modulation`: two a layer, then the final one."""
    check_kind(model)
    layers = [cast(GemmaLayer, layer) for layer in model.action_expert.layers]
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    return [cast(AdaRMSNorm, norm) for norm in (*norms, model.action_expert.norm)]


def give_modulation(model: Pi05) -> None:
    """Replace the expert's adaptive norms by those that are given their modulation as `cond` [rows, 3*E]."""
    check_kind(model)
    for index, each in enumerate(model.action_expert.layers):
        layer = cast(Any, each)
        layer.input_layernorm = GivenModulation(2 * index)
        layer.post_attention_layernorm = GivenModulation(2 * index + 1)
    cast(Any, model.action_expert).norm = GivenModulation(2 * len(model.action_expert.layers))


def check_kind(model: Pi05) -> None:
    if model.config.kind != "pi05":
        raise BackendError("export of the action expert", expected="a pi0.5 model", received=model.config.kind,
                           way_out="Run pi0's expert with backend 'eager'; its vision and prefix can be exported.")


def cast_linear_inputs(stack: nn.Module) -> None:
    """Let every Linear of `stack` take its input in another type than its weights: products in theirs."""
    for module in stack.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_in_dtype_of_weights)


def _in_dtype_of_weights(linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(cast(nn.Linear, linear).weight.dtype),)
