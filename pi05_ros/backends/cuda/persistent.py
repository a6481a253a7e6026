"""The action expert as one persistent kernel (csrc/expert.cu): which GPUs and models it fits, and its launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pi05_ros.backends.cuda.cpp import Kernel, Program
from pi05_ros.backends.cuda.layouts import CLUSTER, PackedLayers
from pi05_ros.backends.cuda.packing import ExpertWeights
from pi05_ros.backends.cuda.shapes import Buffers, padded_tokens
from pi05_ros.config import Pi05Config

THREADS, SHARED_BYTES = 320, 227 * 1024  # as csrc/expert_shapes.cuh asserts
MOST_KEYS, MOST_TOKENS = 1024, 56
FEWEST_CLUSTERS, MOST_CLUSTERS = 15, 16


@dataclass(frozen=True)
class Persistent:
    """The kernel for this GPU: `clusters` of 8 blocks, which all run at once."""

    kernel: Kernel
    clusters: int


def persistent_expert(config: Pi05Config, device: torch.device) -> Persistent | None:
    """None where the portable kernels must do: another model, a smaller GPU, or one older than Hopper."""
    e, gpu = config.expert, torch.cuda.get_device_properties(device)
    geometry = (e.width, e.mlp_dim, e.num_heads, e.num_kv_heads, e.head_dim, config.action_dim)
    shared = getattr(gpu, "shared_memory_per_block_optin")  # noqa: B009  (no stub)
    keys = config.prefix_len + config.action_horizon
    if (config.kind != "pi05" or geometry != (1024, 4096, 8, 1, 256, 32) or padded_tokens(config) > MOST_TOKENS
            or keys > MOST_KEYS or gpu.major not in (9, 10) or shared < SHARED_BYTES):
        return None
    probe = Program("probe", {}, device).kernel("probe", SHARED_BYTES)
    clusters = min(MOST_CLUSTERS, probe.max_clusters((MOST_CLUSTERS * CLUSTER,), THREADS, CLUSTER))
    if clusters < FEWEST_CLUSTERS:
        return None
    program = Program("expert", {"HORIZON": config.action_horizon, "DEPTH": e.depth, "KEY_ROWS": keys,
                                 "CLUSTERS": clusters}, device)
    return Persistent(program.kernel("denoise", SHARED_BYTES), clusters)


def denoise(persistent: Persistent, w: ExpertWeights, heads: tuple[Tensor, Tensor], b: Buffers) -> None:
    """Every step of the schedule whose tables and length the buffers hold: b.x_t from noise to actions.

    `heads`: the weights of the action projections, in and out, transposed.
    """
    layers = w.layers
    assert isinstance(layers, PackedLayers)
    persistent.kernel.launch((persistent.clusters * CLUSTER,), THREADS, (
        layers.tensors["qkv"], layers.tensors["out"], layers.tensors["gate_up"], layers.tensors["down"],
        heads[0], w.action_in_b, heads[1], b.scales, b.gates, b.qkv_bias, b.gate_up_bias, b.out_bias,
        b.previous, b.reach, b.pull, b.keys, b.values, b.expert_valid, b.cos, b.sin, b.counters, b.dt,
        b.x_t, b.act, b.act_squares, b.queries, b.attended, b.hidden, b.velocities,
    ), cluster=CLUSTER, cooperative=True)
