"""Which shapes the CUDA backend prepares, and the one table of its static buffers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pi05_ros.config import Pi05Config
from pi05_ros.errors import BackendError

MAX_STEPS = 50  # rows of the modulation tables
TOKEN_BUCKETS = (16, 32, 48, 64, 80, 96, 112, 128, 160)  # and the model's own maximum
TILE = 32  # columns a program of the expert's residual kernels owns, where the width allows it
SPLIT_K = 8  # at most this many programs share one output tile of the expert
NORM_PARTS = 64  # at most, of a row's sums in the vision tower
SPLITS = 16  # parts of the keys in the expert's attention


def token_buckets(config: Pi05Config) -> list[int]:
    return sorted({t for t in TOKEN_BUCKETS if t < config.max_token_len} | {config.max_token_len})


def bucket_rows(config: Pi05Config, cameras: int, tokens: int) -> int:
    """Prefix rows computed for `tokens` prompt slots: the next bucket; what it adds is masked in attention."""
    fits = [t for t in token_buckets(config) if t >= tokens]
    if not fits or not 1 <= cameras <= config.num_cameras:
        raise BackendError("prefix", expected=f"1-{config.num_cameras} cameras and 1-{config.max_token_len} tokens",
                           received=f"{cameras} and {tokens}", way_out="Trim the inputs, or load a larger model.")
    return cameras * config.vision.num_patches + fits[0]


def all_buckets(config: Pi05Config) -> list[int]:
    return sorted({bucket_rows(config, n, t) for n in range(1, config.num_cameras + 1) for t in token_buckets(config)})


def tile(extent: int, most: int) -> int:
    """The largest power of two that divides `extent`, at most `most`; the kernels need 16."""
    size = math.gcd(extent, most)
    if size < 16:
        raise BackendError("model size", expected="multiples of 16 in the action expert and in head_dim / 2",
                           received=str(extent), way_out="Use backend 'eager' for this model.")
    return size


def row_tile(rows: int) -> int:
    """Rows of the gated product's larger tiles: of as few as can be of at most 256, nearly equal, a multiple of 8."""
    tiles = -(-rows // 256)
    return -(-rows // (8 * tiles)) * 8


def fewer_rows(tile: int) -> int:
    """Rows of its smaller tiles; both together hold any number of rows, at most 7 too many."""
    return max(tile - 8, 8)


def padded_tokens(config: Pi05Config) -> int:
    """Action tokens as the persistent expert pads them."""
    return -(-config.action_horizon // 8) * 8


Shape = tuple[tuple[int, ...], torch.dtype]


def shape_table(config: Pi05Config, persistent: bool = False) -> dict[str, Shape]:
    """Every static tensor: name to shape and dtype; the expert's own ones for one kernel or for many."""
    v, p, e = config.vision, config.prefix, config.expert
    image_rows, rows, horizon = config.num_cameras * v.num_patches, config.prefix_len, config.action_horizon
    half, qkv = p.head_dim // 2, (p.num_heads + 2) * p.head_dim
    bf16, f32, i32 = torch.bfloat16, torch.float32, torch.int32
    return {
        # vision
        "pixels": ((config.num_cameras, 3, v.image_size, v.image_size), f32),
        "patches": ((image_rows, -(-3 * v.patch_size**2 // 8) * 8), bf16),  # zeros behind
        "vision_x": ((image_rows, v.width), f32),
        "vision_delta": ((image_rows, v.width), bf16),
        "vision_normed": ((image_rows, v.width), bf16),
        "vision_qkv": ((image_rows, 3 * v.width), bf16),
        "vision_attended": ((image_rows, v.width), bf16),
        "vision_hidden": ((image_rows, -(-v.mlp_dim // 64) * 64), bf16),  # whole cache lines
        "vision_sums": ((NORM_PARTS, image_rows, 2), f32),
        "vision_sums_before": ((NORM_PARTS, image_rows, 2), f32),  # in FP8
        "image_tokens": ((image_rows, p.width), bf16),
        # prefix
        "source": ((rows,), i32),
        "valid": ((rows + horizon,), torch.uint8),
        "positions": ((rows,), i32),
        "cos": ((rows + horizon, half), f32),
        "sin": ((rows + horizon, half), f32),
        "prefix_images": ((image_rows, p.width), bf16),
        "prefix_x": ((rows, p.width), bf16),
        "prefix_normed": ((rows, p.width), bf16),  # where layers are in FP8 (forward_fp8.py)
        "prefix_inverse_rms": ((rows + 256,), f32),  # beyond the rows, too: the gated product reads whole tiles
        "prefix_counters": ((3,), i32),  # of rows that blocks norm together (csrc/shared_rows.cuh)
        "prefix_qkv": ((rows, qkv), bf16),
        "prefix_attended": ((rows, p.num_heads * p.head_dim), bf16),
        "prefix_gate_up": ((rows, 2 * p.mlp_dim), bf16),
        "prefix_hidden": ((rows, p.mlp_dim), bf16),
        "prefix_keys": ((p.depth, rows, p.head_dim), bf16),
        "prefix_values": ((p.depth, rows, p.head_dim), bf16),
        # expert
        "expert_valid": ((rows + horizon,), torch.uint8),
        "counters": ((5,), i32),  # prefix rows, first position of the suffix, arrivals, steps, guided
        "dt": ((1,), f32),
        "x_t": ((horizon, config.action_dim), f32),
        **(persistent_table(config) if persistent else portable_table(config)),
        # guidance, where a chunk has it (kernels/guidance.py)
        "x_before": ((horizon, config.action_dim), f32),
        "previous": ((horizon, config.action_dim), f32),
        "reach": ((MAX_STEPS,), f32),
        "pull": ((MAX_STEPS, horizon), f32),
        # modulation tables, one row a denoising step (modulation.py)
        "scales": ((MAX_STEPS, 2 * e.depth + 1, e.width), f32),
        "gates": ((MAX_STEPS, 2 * e.depth, e.width), f32),
        "qkv_bias": ((MAX_STEPS, e.depth, qkv), f32),
        "gate_up_bias": ((MAX_STEPS, e.depth, 2 * e.mlp_dim), f32),
        "out_bias": ((MAX_STEPS, config.action_dim), f32),
    }


def portable_table(config: Pi05Config) -> dict[str, Shape]:
    """What the kernels of a denoising step leave for each other; keys and values behind a copy of the prefix's."""
    e, horizon, bf16, f32 = config.expert, config.action_horizon, torch.bfloat16, torch.float32
    keys = (e.depth, config.prefix_len + horizon, e.head_dim)
    return {
        "keys": (keys, bf16),
        "values": (keys, bf16),
        "expert_x": ((horizon, e.width), f32),
        "expert_scaled": ((horizon, e.width), bf16),
        "squares": ((e.width // tile(e.width, TILE), horizon), f32),
        "expert_q": ((horizon, e.num_heads * e.head_dim), bf16),
        "expert_attended": ((horizon, e.num_heads * e.head_dim), bf16),
        "expert_hidden": ((horizon, e.mlp_dim), bf16),
        "split_sums": ((SPLIT_K, horizon + 64, e.width), f32),
        "split_attended": ((SPLITS, horizon * e.num_heads, e.head_dim), bf16),
        "split_stats": ((SPLITS, 2, horizon * e.num_heads), f32),
        "arrivals": ((-(-horizon // 16) * (e.width // 16),), torch.int32),
    }


def persistent_table(config: Pi05Config) -> dict[str, Shape]:
    """What the blocks of the persistent expert leave for each other (csrc/expert.cu)."""
    e, tokens, bf16, f32 = config.expert, padded_tokens(config), torch.bfloat16, torch.float32
    return {
        "keys": ((e.depth, config.action_horizon, e.head_dim), bf16),
        "values": ((e.depth, config.action_horizon, e.head_dim), bf16),
        "act": ((e.width // 8, tokens, 8), bf16),
        "act_squares": ((2, 16, tokens), f32),
        "queries": ((16, e.head_dim // 32, 32, 32), bf16),
        "attended": ((e.num_heads * e.head_dim // 8, tokens, 8), bf16),
        "hidden": ((e.mlp_dim // 8, tokens, 8), bf16),
        "velocities": ((16, tokens, config.action_dim), f32),
    }


@dataclass(frozen=True)
class Buffers:
    """The allocated table; frozen, because graphs hold the addresses."""

    tensors: dict[str, Tensor]

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise AttributeError(name) from None


def allocate(config: Pi05Config, device: torch.device, persistent: bool = False) -> Buffers:
    """Zeros: pad rows must hold finite numbers, arrival counters must start at 0."""
    return Buffers({name: torch.zeros(shape, dtype=dtype, device=device)
                    for name, (shape, dtype) in shape_table(config, persistent).items()})


def table_bytes(config: Pi05Config) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shape_table(config).values())
