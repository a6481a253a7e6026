"""Camera frames resized into their letterbox, padded and scaled to [-1, 1]: every camera and both ways in one launch.

One program makes one row of one camera's image: source rows across, rounded as Pillow rounds between its two passes,
then their weighted sum down. Each source row is read by the few output rows that need it, from cache.
`levels` [256] is the reference's uint8 to [0, 1], so no division can differ from it. What a frame needs is in `plan`
(frames.py), so that no size compiles a kernel of its own.
Floor: each frame read once, images written once: 2.8 + 1.8 MB for three of 640x480, 1 us. Its 36 taps a pixel,
loaded from cache, are what `pil` takes: 17 us on an H200; `bilinear` has 4, and takes 5. Checked against
model/images.py on the GPU: `pil` bit for bit, `bilinear` within 5e-7.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# int32 of a camera's plan: height, width, first byte; top, left, height, width of the box; tables and taps down, across
FIELDS = 16


@triton.jit
def _resample(raw_ptr, plan_ptr, levels_ptr, pixels_ptr, FIELDS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
              FIXED: tl.constexpr, BITS: tl.constexpr):
    row, plan = tl.program_id(0), plan_ptr + tl.program_id(1) * FIELDS
    height, width = tl.load(plan), tl.load(plan + 1)
    raw = raw_ptr + tl.load(plan + 2).to(tl.int64)
    y, x = row - tl.load(plan + 3), tl.arange(0, BLOCK)[:, None] - tl.load(plan + 4)
    box_height, box_width = tl.load(plan + 5), tl.load(plan + 6)
    y_table, x_table = plan + tl.load(plan + 7), plan + tl.load(plan + 8)
    channel = tl.arange(0, 4)[None, :]  # three of them
    drawn = (y >= 0) & (y < box_height)
    across = (x >= 0) & (x < box_width)
    inside = across & drawn & (channel < 3)
    y_first, x_first = tl.load(y_table + y, mask=drawn, other=0), tl.load(x_table + x, mask=across, other=0)
    total = tl.zeros((BLOCK, 4), tl.int32 if FIXED else tl.float32)
    for j in range(tl.where(drawn, tl.load(plan + 9), 0)):
        line = raw + tl.minimum(y_first + j, height - 1) * width * 3
        y_weight = tl.load(y_table + (j + 1) * box_height + y)
        inner = tl.zeros((BLOCK, 4), tl.int32 if FIXED else tl.float32)
        for i in range(tl.load(plan + 10)):
            x_weight = tl.load(x_table + (i + 1) * box_width + x, mask=across, other=0)
            pixel = tl.load(line + tl.minimum(x_first + i, width - 1) * 3 + channel, mask=inside, other=0)
            if FIXED:
                inner += pixel.to(tl.int32) * x_weight
            else:
                inner += tl.load(levels_ptr + pixel) * x_weight.to(tl.float32, bitcast=True)
        if FIXED:
            total += ((inner + (1 << BITS - 1)) >> BITS) * y_weight
        else:
            total += inner * y_weight.to(tl.float32, bitcast=True)
    if FIXED:
        total = tl.load(levels_ptr + ((total + (1 << BITS - 1)) >> BITS))
    unit = tl.minimum(total, 1.0) * 2.0 - 1.0
    column = tl.arange(0, BLOCK)[:, None]
    out = pixels_ptr + ((tl.program_id(1) * 3 + channel) * SIZE + row) * SIZE + column
    tl.store(out, unit, mask=(column < SIZE) & (channel < 3))


def resample(raw: Tensor, plan: Tensor, levels: Tensor, pixels: Tensor, fixed_bits: int | None) -> None:
    """uint8 frames in `raw`, one behind the other, to `pixels` float32 [N, 3, S, S] in [-1, 1].

    plan int32: FIELDS a camera, then the tables; a camera without a box is black. fixed_bits: of the weights' fraction
    and of the rounding between the passes; None where weights are float32.
    """
    cameras, _, _, size = pixels.shape
    _resample[(size, cameras)](raw, plan, levels, pixels, FIELDS, size, triton.next_power_of_2(size),
                               fixed_bits is not None, fixed_bits or 0, num_warps=4)
