"""The action expert as one persistent kernel (csrc/expert.cu): which GPUs and models it fits, and its launch."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from pi05_ros.backends.cuda.cpp import Kernel, Program
from pi05_ros.backends.cuda.layouts import CLUSTER, PackedLayers
from pi05_ros.backends.cuda.packing import ExpertWeights
from pi05_ros.backends.cuda.shapes import Buffers, padded_tokens
from pi05_ros.config import Pi05Config
from pi05_ros.errors import BackendError

THREADS, SHARED_BYTES = 384, 227 * 1024  # as csrc/expert_shapes.cuh asserts
MOST_KEYS, MOST_TOKENS = 128, 56  # keys of a block
FEWEST_CLUSTERS, MOST_CLUSTERS = 15, 16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Persistent:
    """The kernel for this GPU: `clusters` of 8 blocks, which all run at once. low: weights in FP8, but for `out`."""

    kernel: Kernel
    clusters: int
    low: bool = False


class Misfit(BackendError):
    """This GPU or this model is not one that the persistent kernel was made for."""


def chosen_expert(config: Pi05Config, device: torch.device, low: bool = False) -> Persistent | None:
    """The persistent kernel where GPU and model fit, else None: the portable kernels, which run everywhere. `low`: of a
    model whose layers there are in FP8.

    `PI05_EXPERT=portable` chooses those in any case, `persistent` raises BackendError where the kernel does not fit.
    """
    wish = os.environ.get("PI05_EXPERT", "auto")
    if wish not in ("auto", "portable", "persistent"):
        raise BackendError("PI05_EXPERT", expected="auto, portable or persistent", received=repr(wish),
                           way_out="auto takes one kernel for the whole loop where GPU and model fit it.")
    if wish == "portable":
        return None
    try:
        return persistent_expert(config, device, low)
    except Misfit as misfit:
        if wish == "persistent":
            raise
        log.info("The action expert runs as portable kernels. %s", misfit)
        return None


def persistent_expert(config: Pi05Config, device: torch.device, low: bool = False) -> Persistent:
    """Compiled for this GPU; raises Misfit where the GPU or the model does not fit."""
    e, gpu = config.expert, torch.cuda.get_device_properties(device)
    way_out = "Leave PI05_EXPERT out: the portable kernels run here."
    geometry = (e.width, e.mlp_dim, e.num_heads, e.num_kv_heads, e.head_dim, config.action_dim)
    keys = -(-config.prefix_len // CLUSTER) + padded_tokens(config) // CLUSTER
    if geometry != (1024, 4096, 8, 1, 256, 32) or padded_tokens(config) > MOST_TOKENS or keys > MOST_KEYS:
        raise Misfit("expert as one kernel", expected=f"pi0.5's expert, at most {MOST_TOKENS} action tokens "
                     f"and {MOST_KEYS} keys in each of {CLUSTER} parts",
                     received=f"{geometry}, {config.action_horizon} and {keys}",
                     way_out=way_out)
    clusters = 0
    if gpu.major == 9 and getattr(gpu, "shared_memory_per_block_optin") >= SHARED_BYTES:  # noqa: B009  (no stub)
        probe = Program("probe", {}, device).kernel("probe", SHARED_BYTES)
        clusters = min(MOST_CLUSTERS, probe.max_clusters((MOST_CLUSTERS * CLUSTER,), THREADS, CLUSTER))
    if clusters < FEWEST_CLUSTERS:
        raise Misfit("expert as one kernel", expected=f"a GPU that runs {FEWEST_CLUSTERS} clusters of {CLUSTER} blocks "
                     f"with {SHARED_BYTES // 1024} KiB each at once, as an H200 does",
                     received=f"{gpu.name}, {clusters} of them", way_out=way_out)
    program = Program("expert", {"HORIZON": config.action_horizon, "DEPTH": e.depth, "CLUSTERS": clusters,
                                 "PREFIX": config.prefix_len, "FP8": int(low)}, device)
    return Persistent(program.kernel("denoise", SHARED_BYTES), clusters, low)


def denoise(persistent: Persistent, w: ExpertWeights, heads: tuple[Tensor, Tensor], b: Buffers, keys: Tensor,
            values: Tensor) -> None:
    """Every step of the schedule whose tables and length the buffers hold: b.x_t from noise to actions.

    `heads`: the weights of the action projections, in and out, transposed. `keys`, `values` [layers, P,
    head_dim] of the prefix are read where they are, if the kernel can, and must stay so until it is done.
    """
    layers = w.layers
    assert isinstance(layers, PackedLayers)
    if not (readable(keys) and readable(values) and keys.stride() == values.stride()):
        keys, values = (torch.empty(t.shape, dtype=torch.bfloat16, device=t.device).copy_(t) for t in (keys, values))
    persistent.kernel.launch((persistent.clusters * CLUSTER,), THREADS, (
        layers.tensors["qkv"], layers.tensors["out"], layers.tensors["gate_up"], layers.tensors["down"],
        heads[0], w.action_in_b, heads[1], b.scales, b.gates, b.qkv_bias, b.gate_up_bias, b.out_bias,
        layers.scales,
        b.previous, b.reach, b.pull, keys, values, keys.stride(0) // keys.shape[2], b.expert_valid, b.cos, b.sin,
        b.counters, b.dt, b.x_t, b.keys, b.values, b.act, b.act_squares, b.queries, b.attended, b.hidden,
        b.velocities,
    ), cluster=CLUSTER, cooperative=True)


def readable(rows: Tensor) -> bool:
    """Whether the kernel can read [layers, P, head_dim] where it is: bfloat16, rows one after the other."""
    layer, row, number = rows.stride()
    width = rows.shape[2]
    in_order = (row, number) == (width, 1) and layer % width == 0
    return in_order and rows.dtype == torch.bfloat16 and rows.data_ptr() % 16 == 0
