"""The loss that makes a pi0.5: flow matching on action chunks, time 1 noise and time 0 action (PI05_SPEC section 6);
and two that teach its prefix where things are and where the episode leads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi05_ros.config import Pi05Config
from pi05_ros.model.pi05 import Pi05, PrefixCache

# openpi draws t from Beta(1.5, 1), which leans towards noise, on [0.001, 1].
TIME_ALPHA, TIME_MIN = 1.5, 0.001


@dataclass(frozen=True)
class Batch:
    """B samples. Cameras that the robot lacks and slots that pad every prompt are left out, which is exact.

    pixels float32 [B, N, 3, s, s] in [-1, 1]; tokens int64 [B, L], token_mask bool [B, L]; actions float32 [B, H, A],
    normalised and zero padded; goals float32 [B, A], the last action of each episode, and scenes float32 [B, K], as in
    the data set, both scaled (run.py: comparable); noise float32 [B, H, A]; time float32 [B].
    """

    pixels: Tensor
    tokens: Tensor
    token_mask: Tensor
    actions: Tensor
    goals: Tensor
    scenes: Tensor
    noise: Tensor
    time: Tensor


class PrefixHeads(nn.Module):
    """Guesses from what the expert reads of single prompt tokens, the values of all layers: the scene from the first
    token, the episode's last action from the last one.

    Thrown away after training. pi0.5 itself learnt what its expert reads from other answers than actions; here plain
    regressions tell the eyes and the language where to look long before the noisy loss of the flow does.
    """

    def __init__(self, config: Pi05Config, scene_dim: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        width = config.prefix.depth * config.prefix.num_kv_heads * config.prefix.head_dim
        # The last column is added. Weights of zero would pass nothing back: the eyes began to learn much later.
        self.scene_weight, self.goal_weight = (
            nn.Parameter(torch.randn(out, width + 1, generator=generator) * width**-0.5)
            for out in (scene_dim, config.action_dim))

    def forward(self, cache: PrefixCache, prompt_slots: int) -> tuple[Tensor, Tensor]:
        """Scene float32 [B, K] and goal [B, A]; the prompt has the cache's last `prompt_slots`."""
        slots = cache.pad_mask.shape[1]
        last = slots - 1 - cache.pad_mask.flip(1).to(torch.int64).argmax(dim=1)
        rows = torch.arange(len(last), device=last.device)
        at_last = cache.values[:, rows, :, last]  # [B, layers, kv_heads, head_dim]: the indices' axis comes first
        at_first = cache.values[:, :, :, slots - prompt_slots].transpose(0, 1)
        return affine(at_first, self.scene_weight), affine(at_last, self.goal_weight)


def affine(values: Tensor, weight: Tensor) -> Tensor:
    return F.linear(values.flatten(1).float(), weight[:, :-1], weight[:, -1]).float()


def losses(model: Pi05, heads: PrefixHeads, batch: Batch, robot_action_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scalars, float32: of the flow, the goal (mean square of its error over the robot's dimensions) and the scene (0
    where the data set knows nothing of it).

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
    scene, goal = heads(cache, batch.tokens.shape[1])
    goal_error = (goal - batch.goals)[..., :robot_action_dim]
    scene_error = (scene - batch.scenes).square().sum() / max(1, scene.numel())
    return error.square().mean(), goal_error.square().mean(), scene_error


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """float32 [count]: Beta(1.5, 1) by its inverse distribution function u^(1/1.5), on [0.001, 1]."""
    u = torch.rand(count, generator=generator)
    return u ** (1 / TIME_ALPHA) * (1 - TIME_MIN) + TIME_MIN
