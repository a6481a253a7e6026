"""The loss that makes a pi0.5: flow matching on action chunks, time 1 noise and time 0 action (PI05_SPEC section 6);
and one that teaches its prefix where the episode leads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pi05_ros.config import Pi05Config
from pi05_ros.model.pi05 import Pi05, PrefixCache

# openpi draws t from Beta(1.5, 1), which leans towards noise, on [0.001, 1].
TIME_ALPHA, TIME_MIN = 1.5, 0.001


@dataclass(frozen=True)
class Batch:
    """B samples. Cameras that the robot lacks and slots that pad every prompt are left out, which is exact.

    pixels float32 [B, N, 3, s, s] in [-1, 1]; tokens int64 [B, L], token_mask bool [B, L]; actions float32 [B, H, A],
    normalised and zero padded; goals float32 [B, A], the last action of each episode, likewise; noise float32
    [B, H, A]; time float32 [B].
    """

    pixels: Tensor
    tokens: Tensor
    token_mask: Tensor
    actions: Tensor
    goals: Tensor
    noise: Tensor
    time: Tensor


class GoalHead(nn.Module):
    """Guesses the episode's last action from what the expert reads of the prompt's last token: values of all layers.

    Thrown away after training. pi0.5 itself learnt what its expert reads from other answers than actions; here a plain
    regression tells the eyes and the language where to look long before the noisy loss of the flow does.
    """

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        stack = config.prefix
        self.out = nn.Linear(stack.depth * stack.num_kv_heads * stack.head_dim, config.action_dim)

    def forward(self, cache: PrefixCache) -> Tensor:
        """float32 [B, A]."""
        last = cache.pad_mask.shape[1] - 1 - cache.pad_mask.flip(1).to(torch.int64).argmax(dim=1)
        rows = torch.arange(len(last), device=last.device)
        values = cache.values[:, rows, :, last]  # [B, layers, kv_heads, head_dim]: the indices' axis comes first
        return self.out(values.flatten(1).float()).float()


def losses(model: Pi05, head: GoalHead, batch: Batch, robot_action_dim: int) -> tuple[Tensor, Tensor]:
    """Scalars, float32: of the flow, and of the goal (mean square of its error over the robot's dimensions).

    Flow: mean over batch, horizon and the robot's dimensions of (v_t - (noise - actions))^2, at
    x_t = t noise + (1 - t) actions. The padding of x_t is zero here, where openpi has noise and a share of the loss:
    with `initial_model` the model never reads or moves it, so its capacity goes to the robot's dimensions, and noise
    there does no harm at inference.
    """
    t = batch.time[:, None, None]
    noise = batch.noise.clone()
    noise[..., robot_action_dim:] = 0.0
    x_t = t * noise + (1 - t) * batch.actions
    image_mask = torch.ones(batch.pixels.shape[:2], dtype=torch.bool, device=x_t.device)
    cache = model.prefill(model.encode_images(batch.pixels), image_mask, batch.tokens, batch.token_mask)
    v_t = model.velocity(cache, x_t, batch.time[:, None])
    error = (v_t.float() - (noise - batch.actions))[..., :robot_action_dim]
    goal_error = (head(cache) - batch.goals)[..., :robot_action_dim]
    return error.square().mean(), goal_error.square().mean()


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """float32 [count]: Beta(1.5, 1) by its inverse distribution function u^(1/1.5), on [0.001, 1]."""
    u = torch.rand(count, generator=generator)
    return u ** (1 / TIME_ALPHA) * (1 - TIME_MIN) + TIME_MIN
