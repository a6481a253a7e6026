"""All adaRMS modulations of a schedule, computed once: they depend on the flow time and on nothing else.

y = x/rms(x) (1 + scale) + shift, then y W^T. So with the rows of a table read by the denoising step:
(1 + scale) rides on the activation, 1/rms(x) on the product, and shift W^T is a bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pi05_ros.backends.cuda.packing import ExpertWeights
from pi05_ros.backends.cuda.shapes import Buffers
from pi05_ros.model import flow
from pi05_ros.model.time_embedding import time_embedding


@dataclass(frozen=True)
class StepTables:
    """float32, first axis the denoising step; names and further axes as in the shape table."""

    scales: Tensor
    gates: Tensor
    qkv_bias: Tensor
    gate_up_bias: Tensor
    out_bias: Tensor

    def write(self, buffers: Buffers) -> None:
        for name, table in vars(self).items():
            getattr(buffers, name)[:len(table)].copy_(table)


def step_tables(weights: ExpertWeights, num_steps: int) -> StepTables:
    """The whole schedule in float32; a few milliseconds, only when `num_steps` changes."""
    times = torch.tensor(flow.time_grid(num_steps), dtype=torch.float32, device=weights.time_in.device)
    hidden = F.silu(F.linear(time_embedding(times, weights.time_in.shape[1]), weights.time_in, weights.time_in_b))
    cond = F.silu(F.linear(hidden, weights.time_out, weights.time_out_b))
    modulation = torch.stack([F.linear(cond, dense.float(), dense_b.float())  # raised to float32 one at a time
                              for dense, dense_b in zip(weights.dense, weights.dense_b, strict=True)], dim=1)
    scale, shift, gate = modulation.chunk(3, dim=-1)  # [steps, norms, E] each

    def bias(norm: int, weight: Tensor) -> Tensor:
        return F.linear(shift[:, norm], weight.float())

    depth = len(weights.dense) // 2
    return StepTables(
        scales=1.0 + scale, gates=gate[:, :-1].contiguous(),
        qkv_bias=torch.stack([bias(2 * i, weights.rows("qkv", i)) for i in range(depth)], dim=1),
        gate_up_bias=torch.stack([bias(2 * i + 1, weights.rows("gate_up", i)) for i in range(depth)], dim=1),
        out_bias=bias(-1, weights.action_out) + weights.action_out_b)
