"""The flow-matching sampler: time 1 is noise, time 0 is action (PI05_SPEC sections 6 and 12)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pi05_ros.errors import ConfigError
from pi05_ros.model.schedule import step_size as step_size
from pi05_ros.model.schedule import time_grid as time_grid
from pi05_ros.schema import Guidance

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, H, A], t float32 scalar or [B, H]) -> v_t [B, H, A]


def integrate(velocity: Velocity, noise: Tensor, num_steps: int, guidance: Guidance | None = None) -> Tensor:
    """Euler from x_1 = noise to x_0, in float32: x <- x + dt * v(x, t); with guidance of either kind."""
    if guidance is not None and guidance.trained:
        return integrate_clamped(velocity, noise, num_steps, guidance)
    if guidance is not None:
        velocity = guided(velocity, guidance)
    x, dt = noise, float(step_size(num_steps))
    for t in time_grid(num_steps):
        x = x + dt * velocity(x, torch.tensor(t, dtype=torch.float32, device=x.device))
    return x


def integrate_clamped(velocity: Velocity, noise: Tensor, num_steps: int, guidance: Guidance) -> Tensor:
    """Trained real-time chunking: the first `delay` rows are the previous chunk's before and after each step, with a
    flow time of their own, 0; `velocity` gets t [B, H]."""
    previous = torch.as_tensor(guidance.previous, dtype=noise.dtype, device=noise.device)
    given = (torch.arange(noise.shape[1], device=noise.device) < guidance.delay)[None, :, None]
    x, dt = torch.where(given, previous, noise), float(step_size(num_steps))
    for t in time_grid(num_steps):
        times = torch.where(given[..., 0], 0.0, t).to(torch.float32).expand(noise.shape[:2])
        x = torch.where(given, previous, x + dt * velocity(x, times))
    return x


def guided(velocity: Velocity, guidance: Guidance) -> Velocity:
    """Wrap a velocity with real-time-chunking guidance: v' = v - g(t) * J."""
    weights = guidance_weights(guidance)
    if guidance.jacobian not in ("identity", "vjp"):
        raise ConfigError("guidance jacobian", expected="'identity' or 'vjp'", received=repr(guidance.jacobian),
                          way_out="Choose one of them.")

    def wrapped(x: Tensor, t: Tensor) -> Tensor:
        previous = torch.as_tensor(guidance.previous, dtype=x.dtype, device=x.device)
        w = torch.as_tensor(weights, dtype=x.dtype, device=x.device)[None, :, None]
        if guidance.jacobian == "identity":
            v = velocity(x, t)
            pull = (previous - (x - t * v)) * w
        else:
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                v = velocity(x, t)
                x_1 = x - t * v
                (pull,) = torch.autograd.grad(x_1, x, grad_outputs=((previous - x_1) * w).detach())
            v, x = v.detach(), x.detach()
        return v - guidance_strength(float(t), guidance.beta) * pull

    return wrapped


def guidance_strength(t: float, beta: float) -> float:
    """g = min(beta, (t^2 + (1-t)^2) / (t (1-t))); beta where the fraction has no value."""
    return beta if t >= 1.0 or t <= 0.0 else min(beta, (t * t + (1 - t) ** 2) / (t * (1 - t)))


def guidance_weights(guidance: Guidance) -> np.ndarray:
    """float32 [H]: 1 before the delay, 0 from `end`, in between by the schedule (PI05_SPEC section 12)."""
    rows, end = np.arange(guidance.previous.shape[-2]), guidance.end
    start = min(guidance.delay, end)
    u = np.clip((end - rows) / (end - start + 1), 0.0, 1.0)
    between = {
        "linear": u,
        "exp": u * np.expm1(u) / np.expm1(1.0),
        "ones": np.ones_like(u),
        "zeros": np.zeros_like(u),
    }
    if guidance.schedule not in between:
        raise ConfigError("guidance schedule", expected=" or ".join(between), received=repr(guidance.schedule),
                          way_out="Choose one of them.")
    weights = np.where(rows < start, 1.0, between[guidance.schedule])
    return np.where(rows >= end, 0.0, weights).astype(np.float32)
