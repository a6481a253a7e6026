"""One run of training: AdamW with warm-up and cosine, clipping, averaged weights; saved and resumed exactly."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pi05_ros.errors import CheckpointError, ConfigError
from pi05_ros.model.pi05 import Pi05
from pi05_ros.train.flow_matching import PrefixHeads, losses
from pi05_ros.train.presets import TrainSettings
from pi05_ros.train.samples import Samples, draw_batch

BETAS = (0.9, 0.95)


class Trainer:
    """The model being trained, on the device of `samples`, and all that the next step depends on.

    Args:
        model: from `initial_model`; moved to the device.
        identity: of the data; a state saved under another one is refused.
        compiled: the losses by torch.compile: a minute to begin with, then fewer and fuller kernels. The numbers differ
            in their last digits, so compare runs of one kind; a run may be resumed either way.
    """

    def __init__(self, model: Pi05, samples: Samples, settings: TrainSettings, robot_action_dim: int,
                 identity: str, compiled: bool = False) -> None:
        self.samples, self.settings, self.identity = samples, settings, identity
        self.robot_action_dim = robot_action_dim
        self.device = samples.tokens.device
        self.model = model.to(self.device).train()
        self._losses = torch.compile(losses, dynamic=False) if compiled else losses
        self.heads = PrefixHeads(model.config, samples.scenes.shape[1], settings.seed).to(self.device)
        self.step = 0
        self.learnt: list[Tensor] = [*self.model.parameters(), *self.heads.parameters()]
        self.average = [parameter.detach().clone() for parameter in self.learnt]
        matrices = [p for p in self.learnt if p.ndim > 1]
        vectors = [p for p in self.learnt if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.learning_rate, betas=BETAS, fused=self.device.type == "cuda")

    def advance(self) -> Tensor:
        """One optimiser step; its losses of flow, goal and scene, [3] on the device."""
        settings = self.settings
        batch = draw_batch(self.samples, settings.batch, settings.seed, self.step, settings.augment)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, settings)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            flow, goal, scene = self._losses(self.model, self.heads, batch, self.robot_action_dim)
        (flow + settings.goal_weight * goal + settings.scene_weight * scene).backward()
        nn.utils.clip_grad_norm_(self.learnt, settings.clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list[Tensor](self.learnt), 1 - ema_decay_at(self.step, settings))
        self.step += 1
        return torch.stack([flow.detach(), goal.detach(), scene.detach()])

    def autocast(self) -> Any:
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def averaged(self) -> tuple[Pi05, PrefixHeads]:
        """A model of the averaged weights, float32, for inference, and its heads."""
        model = Pi05(self.model.config).to(self.device)
        heads = PrefixHeads(self.model.config, self.samples.scenes.shape[1]).to(self.device)
        with torch.no_grad():
            for parameter, average in zip([*model.parameters(), *heads.parameters()], self.average, strict=True):
                parameter.copy_(average)
        return model.eval().requires_grad_(False), heads.requires_grad_(False)

    def save(self, file: Path) -> None:
        """Replace `file` by the state of now."""
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {"step": self.step, "settings": asdict(self.settings), "identity": self.identity,
                 "model": self.model.state_dict(), "heads": self.heads.state_dict(),
                 "average": self.average, "optimizer": self.optimizer.state_dict()}
        part = file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, file)

    def resume(self, file: Path) -> None:
        """Go on from the state in `file`.

        Raises:
            ConfigError: it was saved under other settings or from other data.
            CheckpointError: the file is damaged.
        """
        try:
            state = torch.load(file, map_location=self.device, weights_only=True)
        except Exception as error:  # zip, pickle and torch errors
            raise CheckpointError(str(file), expected="the state of a run", received=str(error).splitlines()[0],
                                  way_out="Delete it to begin anew, or choose another --output.") from error
        mine = {**asdict(self.settings), "data": self.identity}
        saved = {**state["settings"], "data": state["identity"]}
        for key, value in mine.items():
            if saved.get(key) != value:
                raise ConfigError(f"{key} of the run in {file}", expected=str(saved.get(key)), received=str(value),
                                  way_out="Resume with what the run began with, or choose another --output.")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])


def learning_rate_at(step: int, settings: TrainSettings) -> float:
    """Linear up over `warmup` steps, then a cosine that would reach 0 at `steps`."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def ema_decay_at(step: int, settings: TrainSettings) -> float:
    """The decay of the average, smaller in the first steps, so that the first weights are soon forgotten."""
    return min(settings.ema, (1 + step) / (10 + step))
