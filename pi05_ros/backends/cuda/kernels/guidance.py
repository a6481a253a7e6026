"""Real-time chunking by guidance with the identity Jacobian, after a denoising step: x' is pulled to the last chunk.

With x before the step, x' = x + dt v after it, and t the step's flow time,

    x_1 = x - t v = x + (t / -dt) (x' - x)            the step drawn out to time 0
    x'' = x' + (-dt) g(t) w (previous - x_1)          = x + dt (v - g(t) w (previous - x_1))

g(t) and w [H] as in model/flow.py. `reach` [steps] is t / -dt, `pull` [steps, H] is -dt g(t) w. x'' becomes x_t and
the x of the next step. The step itself is the unguided one. Floor: latency; 26 KB. Checked against model/flow.py.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from pi05_ros.model import flow
from pi05_ros.schema import Guidance


@triton.jit
def _guide(x_t_ptr, before_ptr, previous_ptr, reach_ptr, pull_ptr, numel, A: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    before = tl.load(before_ptr + i, mask=inside, other=0.0)
    after = tl.load(x_t_ptr + i, mask=inside, other=0.0)
    ahead = before + tl.load(reach_ptr) * (after - before)
    pull = tl.load(pull_ptr + i // A, mask=inside, other=0.0)
    after += pull * (tl.load(previous_ptr + i, mask=inside, other=0.0) - ahead)
    tl.store(x_t_ptr + i, after, mask=inside)
    tl.store(before_ptr + i, after, mask=inside)


def tables(guidance: Guidance, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """reach [steps] and pull [steps, H], float32."""
    size, times = -float(flow.step_size(num_steps)), flow.time_grid(num_steps)
    strengths = np.array([flow.guidance_strength(t, guidance.beta) for t in times])
    pull = size * strengths[:, None] * flow.guidance_weights(guidance)[None]
    return (np.array(times) / size).astype(np.float32), pull.astype(np.float32)


def guide(x_t: Tensor, before: Tensor, previous: Tensor, reach: Tensor, pull: Tensor) -> None:
    """x_t [H, A], a step after `before`, to x'', also in `before`; previous [H, A], reach [1], pull [H]."""
    _guide[(triton.cdiv(x_t.numel(), 256),)](x_t, before, previous, reach, pull, x_t.numel(), x_t.shape[1], 256,
                                             num_warps=4)
