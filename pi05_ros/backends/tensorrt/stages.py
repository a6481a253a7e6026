"""The stages of backends/base.py on TensorRT engines. Results lie in static tensors until the same stage's next call.

The graphs have no masks: they are for one observation without padding, which is what `ModelInputs.trimmed` gives
(`takes_padding`). To look into a mask here would make the host wait for the device; instead a masked position turns the
result into NaN, which nobody can take for actions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pi05_ros.backends.cuda import checks
from pi05_ros.backends.tensorrt.executions import StageEngine
from pi05_ros.config import Pi05Config
from pi05_ros.errors import BackendError
from pi05_ros.model import flow, images, schedule
from pi05_ros.model.pi05 import PrefixCache
from pi05_ros.schema import Guidance


class TensorRtStages:
    """engines: by graph (names.py); those of the stages that are used."""

    overlaps = True  # every graph has an engine, a context, memory and tensors of its own
    takes_padding = False

    def __init__(self, config: Pi05Config, engines: Mapping[str, StageEngine], device: torch.device,
                 resize: str) -> None:
        self.config, self.engines, self.device, self.resize = config, engines, device, resize
        self._num_steps = 0  # whose modulations are in the engine's tensor

    def prepare(self) -> None:
        """Graphs of the shapes that are known before the first observation: vision's."""
        if "vision" in self.engines:
            size = self.config.vision.image_size
            first, most = (spec[0] for spec in self._profile("vision", "pixels"))
            for cameras in range(first, most + 1):
                self.engines["vision"].prepare({"pixels": (cameras, 3, size, size)})

    def _profile(self, graph: str, name: str) -> tuple[Sequence[int], Sequence[int]]:
        spec = next(spec for spec in self.engines[graph].engine.entry.inputs if spec.name == name)
        return spec.min, spec.max

    def prepare_images(self, frames: Sequence[np.ndarray | None]) -> Tensor:
        """float32 [1, N, 3, 224, 224] in [-1, 1]: as the reference."""
        return images.prepare(frames, self.config.vision.image_size, self.resize, self.device)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """To image tokens [1, N*256, W]."""
        checks.check_batch("images", pixels)
        engine, cameras = self.engines["vision"], pixels.shape[1]
        engine.view("pixels", tuple(pixels.shape[1:])).copy_(pixels[0])
        engine.run({"pixels": tuple(pixels.shape[1:])})
        rows = cameras * self.config.vision.num_patches
        return engine.view("image_tokens", (rows, self.config.prefix.width))[None]

    @torch.no_grad()
    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """To the prefix KV cache: [layers, 1, kv_heads, P, head_dim] each."""
        checks.check_batch("tokens", tokens)
        engine, patches = self.engines["prefix"], self.config.vision.num_patches
        valid = torch.cat([image_mask.repeat_interleave(patches, dim=1), token_mask], dim=1)
        shapes = {"image_tokens": tuple(image_tokens.shape[1:]), "tokens": tuple(tokens.shape[1:])}
        engine.view("image_tokens", shapes["image_tokens"]).copy_(unless_padded(image_tokens[0], valid))
        engine.view("tokens", shapes["tokens"]).copy_(tokens[0])
        engine.run(shapes)
        keys, values = (engine.view(name, self._cache_shape(valid.shape[1]))[:, None] for name in ("keys", "values"))
        return PrefixCache(keys, values, valid)

    def _cache_shape(self, rows: int) -> tuple[int, int, int, int]:
        prefix = self.config.prefix
        return prefix.depth, prefix.num_kv_heads, rows, prefix.head_dim

    @torch.no_grad()
    def denoise(self, cache: PrefixCache, noise: Tensor, num_steps: int, state: Tensor | None = None,
                guidance: Guidance | None = None) -> Tensor:
        """noise float32 [1, H, 32] to actions x_0, float32 [1, H, 32]; `state` is for pi0, which is not run here."""
        checks.check_batch("noise", noise)
        if guidance:
            check_guidance(guidance)
        engine = self.engines["step" if "step" in self.engines else "loop"]
        shape = self._cache_shape(cache.keys.shape[3])
        shapes: dict[str, tuple[int, ...]] = {"keys": shape, "values": shape}
        engine.view("keys", shape).copy_(cache.keys[:, 0])
        engine.view("values", shape).copy_(cache.values[:, 0])
        start = unless_padded(noise[0], cache.pad_mask)
        if "step" in self.engines:
            return self._steps(engine, shapes, start, num_steps, guidance)[None].clone()
        self._check_loop(engine, num_steps, guidance)
        engine.view("noise").copy_(start)
        engine.run(shapes | {"noise": tuple(start.shape)})
        return engine.view("actions")[None].clone()

    def _steps(self, engine: StageEngine, shapes: dict[str, tuple[int, ...]], noise: Tensor, num_steps: int,
               guidance: Guidance | None) -> Tensor:
        table = self._modulations(num_steps)
        dt, x_t = schedule.step_size(num_steps), engine.view("x_t").copy_(noise)
        modulation, v_t = engine.view("modulation"), engine.view("v_t")
        engine.view("dt").fill_(float(dt))
        shapes = shapes | {name: tuple(engine.view(name).shape) for name in ("x_t", "modulation", "dt")}
        if guidance:
            previous = torch.from_numpy(guidance.previous[0]).to(self.device)
            weights = torch.from_numpy(flow.guidance_weights(guidance)).to(self.device)[:, None]
        for k, t in enumerate(schedule.time_grid(num_steps)):
            modulation.copy_(table[k])
            engine.run(shapes)
            if guidance:  # as flow.guided, without asking the device for t
                pull = (previous - (x_t - t * v_t)) * weights
                x_t += float(dt) * (v_t - flow.guidance_strength(t, guidance.beta) * pull)
            else:
                x_t.copy_(engine.view("x_next"))
        return x_t

    def _modulations(self, num_steps: int) -> Tensor:
        """Of every step, float32 [num_steps, 2L+1, 3E]: computed when the number of steps changes."""
        engine, depth, width = self.engines["modulation"], self.config.expert.depth, self.config.expert.width
        if num_steps != self._num_steps:
            features = torch.from_numpy(schedule.time_features(schedule.time_grid(num_steps), width))
            engine.view("time_features", tuple(features.shape)).copy_(features)
            engine.run({"time_features": tuple(features.shape)})
            self._num_steps = num_steps
        return engine.view("modulation", (num_steps, 2 * depth + 1, 3 * width))

    def _check_loop(self, engine: StageEngine, num_steps: int, guidance: Guidance | None) -> None:
        steps = engine.engine.entry.steps
        if num_steps != steps or guidance:
            raise BackendError("engine 'loop'", expected=f"{steps} steps without guidance",
                               received=f"{num_steps} steps" + (" with guidance" if guidance else ""),
                               way_out="Build the engines `modulation` and `step` (--graphs), which take any.")


def check_guidance(guidance: Guidance) -> None:
    if guidance.trained or guidance.jacobian != "identity":
        raise BackendError("guidance", expected="the identity Jacobian: engines have one flow time for all rows and no "
                           "backward pass", way_out="Use expert=eager.",
                           received="trained real-time chunking" if guidance.trained else repr(guidance.jacobian))


def unless_padded(numbers: Tensor, valid: Tensor) -> Tensor:
    """The same numbers, or NaN if any position is masked; decided on the device."""
    return torch.where(valid.all(), numbers, torch.nan)
