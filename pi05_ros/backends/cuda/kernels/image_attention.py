"""Attention of the vision tower: every patch of an image sees every patch of it.

On Hopper, for images of 256 patches and heads of 72, csrc/image_attention_wgmma.cu; elsewhere csrc/image_attention.cu.
Both read q, k, v where the merged product left them and need no scratch, unlike cuDNN's, whose counters cost a node of
the graph a layer. Floor: latency, then 14 MB of L2. Models of other shapes take PyTorch's. Checked against PyTorch's
scaled_dot_product_attention in float32.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from pi05_ros.backends.cuda.cpp import Kernel, Program
from pi05_ros.backends.cuda.tma import TensorMap

MOST_PATCHES, MOST_DIM = 256, 72  # a row of logits, and of the result, is in registers


def fits(patches: int, dim: int, device: torch.device) -> bool:
    shapes = patches % 64 == 0 and patches <= MOST_PATCHES and dim % 8 == 0 and 16 <= dim <= MOST_DIM
    return shapes and device.type == "cuda"


@functools.cache
def _kernel(patches: int, heads: int, dim: int, warps: int, device: torch.device) -> Kernel:
    pitch = dim * 2 + (0 if dim // 8 % 2 else 16)
    shared = (16 * warps + 2 * patches) * pitch
    defines = {"PATCHES": patches, "HEADS": heads, "D": dim, "WARPS": warps, "SHARED_BYTES": shared}
    return Program("image_attention", defines, device).kernel("image_attention", shared)


@functools.cache
def _wgmma_kernel(heads: int, warpgroups: int, device: torch.device) -> Kernel:
    shared = (64 * warpgroups + 2 * 256) * (128 + 32) + 32
    defines = {"HEADS": heads, "WARPGROUPS": warpgroups, "SHARED_BYTES": shared}
    return Program("image_attention_wgmma", defines, device).kernel("image_attention", shared)


def image_attention(qkv: Tensor, patches: int, heads: int, out: Tensor, portable: bool = False) -> None:
    """qkv [images * patches, 3 W] to out [images * patches, W]. `portable`: not the Hopper kernel."""
    images, dim = out.shape[0] // patches, out.shape[1] // heads
    if not fits(patches, dim, qkv.device):
        q, k, v = qkv.unflatten(1, (3, heads, -1)).unflatten(0, (images, -1)).permute(2, 0, 3, 1, 4)
        out.unflatten(1, (heads, -1)).unflatten(0, (images, -1)).copy_(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2))
        return
    scale = dim**-0.5 * 1.4426950408889634  # exp2 instead of exp
    capability = torch.cuda.get_device_capability(qkv.device)
    processors = torch.cuda.get_device_properties(qkv.device).multi_processor_count
    one_each = patches // 64 * heads * images <= processors  # of the smaller blocks
    if capability == (9, 0) and (patches, dim) == (256, 72) and not portable:
        rows, groups = qkv.unflatten(1, (3 * heads, dim)), 1 if one_each else 2
        maps = [TensorMap(rows, (high, 1, wide)) for high in (64 * groups, 128) for wide in (64, 16)]
        _wgmma_kernel(heads, groups, qkv.device).launch((4 // groups, heads, images), 128 * groups,
                                                        (*maps, out, scale), dependent=True)
        return
    warps = 4 if one_each or patches % 128 else 8
    _kernel(patches, heads, dim, warps, qkv.device).launch((patches // (16 * warps), heads, images), 32 * warps,
                                                           (qkv, out, scale), dependent=capability >= (9, 0))
