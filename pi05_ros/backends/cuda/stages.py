"""The four stages on the GPU: inputs into static buffers, a graph replayed, views of static buffers out.

What `prepare_images`, `encode_images` and `prefill` return is overwritten by their next call (the images also when
`encode_images` gets others); the actions are the caller's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pi05_ros.backends.cuda import checks, forward, forward_fp8
from pi05_ros.backends.cuda.frames import FramePreparation
from pi05_ros.backends.cuda.graphs import StageGraphs
from pi05_ros.backends.cuda.kernels import flow_step, prefix_input
from pi05_ros.backends.cuda.kernels import guidance as guiding
from pi05_ros.backends.cuda.modulation import step_tables
from pi05_ros.backends.cuda.packing import Packed
from pi05_ros.backends.cuda.packing_fp8 import Fp8PrefixWeights, Fp8ProductVision, Fp8VisionWeights
from pi05_ros.backends.cuda.persistent import Persistent, denoise
from pi05_ros.backends.cuda.shapes import MAX_STEPS, Buffers, all_buckets, bucket_rows
from pi05_ros.backends.cuda.tilings import Tilings
from pi05_ros.config import Pi05Config
from pi05_ros.errors import BackendError
from pi05_ros.model import flow
from pi05_ros.model.pi05 import PrefixCache
from pi05_ros.model.positions import rope_tables
from pi05_ros.schema import Guidance


class CudaStages:
    """Stages as in backends/base.py; batch 1, bfloat16."""

    overlaps = True  # each stage copies what it is given into buffers of its own

    def __init__(self, config: Pi05Config, weights: Packed, buffers: Buffers, tilings: Tilings, device: torch.device,
                 resize: str, expert: Persistent | None = None, runs: Mapping[str, str] | None = None) -> None:
        self.config, self.weights, self.buffers, self.device = config, weights, buffers, device
        self.tilings, self._persistent = tilings, expert  # the expert as one kernel, where asked for
        self.runs = runs or {}
        self._frames = FramePreparation(buffers.pixels, resize)
        self._num_steps = 0  # whose tables the buffers hold
        self._graphs: dict[str, StageGraphs] = {}
        cos, sin = rope_tables(torch.arange(len(buffers.cos), device=device)[None], config.prefix.head_dim,
                               getattr(torch, config.rope_inv_freq), torch.float32)
        half = config.prefix.head_dim // 2
        buffers.cos.copy_(cos[0, 0, :, :half])
        buffers.sin.copy_(sin[0, 0, :, :half])

    @torch.no_grad()
    def capture(self) -> None:
        """Every graph of every stage that has weights; nothing is captured later."""
        w, b, t, config = self.weights, self.buffers, self.tilings, self.config
        if w.vision:
            vision = (partial(forward_fp8.vision, w.vision, b, config) if isinstance(w.vision, Fp8VisionWeights)
                      else partial(forward_fp8.vision_in_products, w.vision, b, config)
                      if isinstance(w.vision, Fp8ProductVision) else partial(forward.vision, w.vision, b, config))
            counts = range(1, config.num_cameras + 1)
            self._graphs["vision"] = StageGraphs([(n, partial(vision, n)) for n in counts], self.device)
        if w.prefix:
            prefix = (partial(forward_fp8.prefix, w.prefix, b, t, config) if isinstance(w.prefix, Fp8PrefixWeights)
                      else partial(forward.prefix, w.prefix, b, t, config))
            self._graphs["prefix"] = StageGraphs([(rows, partial(prefix, rows)) for rows in all_buckets(config)],
                                                 self.device)
        if w.expert and self._persistent:
            self._heads = w.expert.action_in.T.contiguous(), w.expert.action_out.T.contiguous()
        elif w.expert:
            self._graphs["expert"] = StageGraphs(
                [(k, partial(forward.denoising_step, w.expert, b, t, k)) for k in range(MAX_STEPS)], self.device)
            self._graphs["guidance"] = StageGraphs([(k, partial(forward.guide, b, k)) for k in range(MAX_STEPS)],
                                                   self.device)

    def prepare_images(self, frames: Sequence[np.ndarray | None]) -> Tensor:
        """float32 [1, N, 3, 224, 224] in [-1, 1], in the buffer that `encode_images` reads."""
        return self._frames.prepare(frames)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """To image tokens [1, N*256, W]."""
        checks.check_batch("images", pixels)
        cameras = pixels.shape[1]
        checks.check_cameras(cameras, self.config.num_cameras)
        if pixels.data_ptr() != self.buffers.pixels.data_ptr():
            self.buffers.pixels[:cameras].copy_(pixels[0])
        self._graphs["vision"].replay(cameras)
        return self.buffers.image_tokens[None, :cameras * self.config.vision.num_patches]

    @torch.no_grad()
    def prefill(self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> PrefixCache:
        """To the prefix KV cache: [layers, 1, 1, P, head_dim] each, and the mask of valid positions."""
        checks.check_batch("tokens", tokens)
        b, patches = self.buffers, self.config.vision.num_patches
        rows = bucket_rows(self.config, image_mask.shape[1], tokens.shape[1])
        used = image_tokens.shape[1] + tokens.shape[1]
        b.prefix_images[:image_tokens.shape[1]].copy_(image_tokens[0])
        prefix_input.plan(image_mask[0], token_mask[0], tokens[0], patches, b.source[:rows], b.valid, b.positions)
        self._graphs["prefix"].replay(rows)
        keys, values = (cache[:, None, None, :used] for cache in (b.prefix_keys, b.prefix_values))
        return PrefixCache(keys, values, b.valid[None, :used].bool())

    @torch.no_grad()
    def denoise(self, cache: PrefixCache, noise: Tensor, num_steps: int, state: Tensor | None = None,
                guidance: Guidance | None = None) -> Tensor:
        """noise float32 [1, H, 32] to actions x_0, float32 [1, H, 32]; `state` is for pi0, which is not run here."""
        checks.check_batch("noise", noise)
        if guidance:
            checks.check_guidance(guidance, self.config)
        self._set_steps(num_steps)
        b, used, keys, values = self.buffers, cache.keys.shape[3], cache.keys[:, 0, 0], cache.values[:, 0, 0]
        flow_step.start(noise, cache.pad_mask[0], b.x_t, b.expert_valid, b.counters, num_steps, int(bool(guidance)))
        if guidance:
            self._set_guidance(guidance, num_steps)
        if self._persistent and self.weights.expert:
            denoise(self._persistent, self.weights.expert, self._heads, b, keys, values)
            return b.x_t[None].clone()
        b.keys[:, :used].copy_(keys)
        b.values[:, :used].copy_(values)
        for step in range(num_steps):
            self._graphs["expert"].replay(step)
            if guidance:
                self._graphs["guidance"].replay(step)
        return b.x_t[None].clone()

    def _set_steps(self, num_steps: int) -> None:
        """Tables of this schedule into the static ones: a few milliseconds, when the number of steps changes."""
        if num_steps == self._num_steps:
            return
        if not 1 <= num_steps <= MAX_STEPS or self.weights.expert is None:
            raise BackendError("num_steps", expected=f"1 to {MAX_STEPS}", received=str(num_steps),
                               way_out="Choose fewer steps, or use expert=eager.")
        step_tables(self.weights.expert, num_steps).write(self.buffers)
        self.buffers.dt.fill_(float(flow.step_size(num_steps)))
        self._num_steps = num_steps

    def _set_guidance(self, guidance: Guidance, num_steps: int) -> None:
        b, (reach, pull) = self.buffers, guiding.tables(guidance, num_steps)
        b.previous.copy_(torch.as_tensor(guidance.previous[0]))
        b.reach[:num_steps].copy_(torch.from_numpy(reach))
        b.pull[:num_steps].copy_(torch.from_numpy(pull))
        b.x_before.copy_(b.x_t)
