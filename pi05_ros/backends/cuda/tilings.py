"""The tiles of every kernel that has a choice: a shipped table first, then what this machine measured before, then a
measurement. `PI05_TUNE=1` measures where the table has the GPU too; `PI05_TUNE=0` takes the first tiles that fit.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

from pi05_ros.backends.cuda import tuning
from pi05_ros.backends.cuda.kernels import pair_product, prefix_attention, residual_product, suffix_attention
from pi05_ros.backends.cuda.packing import GemmaLayerWeights, Packed
from pi05_ros.backends.cuda.shapes import Buffers
from pi05_ros.backends.cuda.tuning import Gpu, SharedBytes, Tiles
from pi05_ros.config import Pi05Config
from pi05_ros.errors import BackendError

BUDGET_S = 25.0  # for all measurements of one configure; most of it is compiling
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tilings:
    """One choice a kernel, two for `residual_product`, whose two products differ in K."""

    prefix_attention: Tiles
    qkv_product: Tiles
    suffix_attention: Tiles
    attention_out: Tiles
    glu_product: Tiles
    mlp_down: Tiles


KNOWN_GPUS = {  # measured on the full-size model
    "NVIDIA H200": Tilings(
        prefix_attention=Tiles(64, 64, warps=4, stages=3),
        qkv_product=Tiles(64, 16, 128, warps=4, stages=4),
        suffix_attention=Tiles(64, 64, split=16, warps=4, stages=2),
        attention_out=Tiles(64, 32, 128, split=4, warps=4, stages=4),
        glu_product=Tiles(64, 32, 128, warps=4, stages=4),
        mlp_down=Tiles(64, 32, 128, split=4, warps=4, stages=4)),
}


CANDIDATES = {
    "prefix_attention": prefix_attention.CANDIDATES,
    "qkv_product": pair_product.QKV_CANDIDATES,
    "suffix_attention": suffix_attention.CANDIDATES,
    "attention_out": residual_product.CANDIDATES,
    "glu_product": pair_product.GLU_CANDIDATES,
    "mlp_down": residual_product.CANDIDATES,
}


def shared_bytes(config: Pi05Config) -> dict[str, SharedBytes]:
    """At most what each kernel takes of shared memory."""
    attention = prefix_attention.shared_bytes(config.prefix.head_dim)
    pair, residual = pair_product.shared_bytes, residual_product.shared_bytes
    return {"prefix_attention": attention, "qkv_product": pair, "suffix_attention": attention,
            "attention_out": residual, "glu_product": pair, "mlp_down": residual}


def candidates(config: Pi05Config, gpu: Gpu) -> dict[str, list[Tiles]]:
    """Those of every kernel that the GPU's shared memory holds; BackendError where it holds none."""
    bounds = shared_bytes(config)
    return {name: tuning.fitting(every, bounds[name], gpu) for name, every in CANDIDATES.items()}


def first_that_fit(config: Pi05Config, gpu: Gpu) -> Tilings:
    return Tilings(**{name: fits[0] for name, fits in candidates(config, gpu).items()})


def tilings_for(config: Pi05Config, weights: Packed, buffers: Buffers, gpu: Gpu,
                seconds: Callable[[Callable[[], None]], float] = tuning.graph_seconds) -> Tilings:
    """The choices for this GPU and model. Measuring needs the weights, and leaves the buffers at zero."""
    wish = os.environ.get("PI05_TUNE", "")
    if wish not in ("", "0", "1"):
        raise BackendError("PI05_TUNE", expected="0, 1 or nothing", received=repr(wish),
                           way_out="0: do not measure; 1: measure even on a GPU with a shipped table.")
    if not wish and gpu.name in KNOWN_GPUS:
        return KNOWN_GPUS[gpu.name]
    if wish == "0":
        return first_that_fit(config, gpu)
    fits, works = candidates(config, gpu), workloads(weights, buffers, config)
    file, key = tuning.cache_file(), tuning.key(gpu, _shapes(config))
    chosen = tuning.read_choices(file, key, fits)
    missing = [name for name in works if name not in chosen]
    if missing:
        buffers.valid.fill_(1)
        buffers.expert_valid.fill_(1)
        buffers.counters.fill_(config.prefix_len)
        start = time.monotonic()
        for done, name in enumerate(missing, start=1):
            chosen[name] = tuning.fastest(fits[name], works[name], seconds,
                                          until=start + BUDGET_S * done / len(missing))
        log.info("tuning: %s measured in %.1f s, kept in %s", ", ".join(missing), time.monotonic() - start, file)
        tuning.write_choices(file, key, chosen)
        for buffer in buffers.tensors.values():
            buffer.zero_()
    return Tilings(**{field.name: chosen.get(field.name, fits[field.name][0]) for field in fields(Tilings)})


def workloads(weights: Packed, b: Buffers, config: Pi05Config) -> dict[str, Callable[[Tiles], None]]:
    """A kernel's work in one pass over all layers, so that weights come from memory as in the forward."""
    works: dict[str, Callable[[Tiles], None]] = {}
    if weights.expert and isinstance(weights.expert.layers, list):  # the persistent kernel has no choice
        works |= _expert_work(weights.expert.layers, b)
    if weights.prefix:
        works |= _prefix_work(b, config)
    return works


def _prefix_work(b: Buffers, config: Pi05Config) -> dict[str, Callable[[Tiles], None]]:
    if prefix_attention.fits_hopper(len(b.prefix_qkv), config.prefix.head_dim, b.prefix_qkv.device):
        return {}  # a kernel that has no choice runs

    def attention(tiles: Tiles) -> None:
        for keys, values in zip(b.prefix_keys[:-1], b.prefix_values[:-1], strict=True):
            prefix_attention.prefix_attention(b.prefix_x, b.prefix_qkv, b.positions, b.cos, b.sin, keys, values,
                                              b.prefix_inverse_rms, b.prefix_counters, b.valid, b.prefix_attended,
                                              config.prefix.num_heads, tiles, portable=True)

    return {"prefix_attention": attention}


def _expert_work(layers: list[GemmaLayerWeights], b: Buffers) -> dict[str, Callable[[Tiles], None]]:
    scale, gate = b.scales[0], b.gates[0]
    residual = (b.expert_x, b.expert_scaled, b.squares, b.split_sums, b.arrivals)

    def qkv(tiles: Tiles) -> None:
        for i, layer in enumerate(layers):
            pair_product.qkv_product(b.expert_scaled, layer.qkv, b.qkv_bias[0, i], b.squares, b.counters, b.cos, b.sin,
                                     b.expert_q, b.keys[i], b.values[i], tiles)

    def attention(tiles: Tiles) -> None:
        for keys, values in zip(b.keys, b.values, strict=True):
            suffix_attention.suffix_attention(b.expert_q, keys, values, b.expert_valid, b.counters, b.split_attended,
                                              b.split_stats, b.expert_attended, tiles)

    def out(tiles: Tiles) -> None:
        for layer in layers:
            assert layer.out is not None
            residual_product.residual_product(b.expert_attended, layer.out, gate[0], scale[0], *residual, tiles)

    def glu(tiles: Tiles) -> None:
        for i, layer in enumerate(layers):
            assert layer.gate_up is not None
            pair_product.glu_product(b.expert_scaled, layer.gate_up, b.gate_up_bias[0, i], b.squares, b.expert_hidden,
                                     tiles)

    def down(tiles: Tiles) -> None:
        for layer in layers:
            assert layer.down is not None
            residual_product.residual_product(b.expert_hidden, layer.down, gate[0], scale[0], *residual, tiles)

    return {"qkv_product": qkv, "attention_out": out, "glu_product": glu, "mlp_down": down,
            "suffix_attention": attention}  # the quick to compile first: what time they leave, the others have


def _shapes(config: Pi05Config) -> str:
    e = config.expert
    return (f"{e.depth} layers {e.width} to {e.mlp_dim}, {e.num_heads} heads of {e.head_dim}, "
            f"{config.prefix_len} + {config.action_horizon} rows")
