"""What the CUDA backend refuses, and the way out."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from pi05_ros.backends.cuda.quantised import IN_FP8
from pi05_ros.backends.cuda.shapes import table_bytes
from pi05_ros.config import Pi05Config
from pi05_ros.errors import BackendError
from pi05_ros.model.weights import EMBEDDING, STAGE_MODULES, expected_shapes, openpi_name, target_dtype
from pi05_ros.schema import Guidance

# Beside weights and tables: cuBLAS workspaces, graphs, the kernels' code, temporaries of the modulation tables, the
# allocator's slack. 0.53 GB on an H200 after 50 steps, 0.34 of it in PyTorch's hands; the CUDA context is there before.
WORKSPACE_BYTES = 550 * 10**6
FP8_WORKSPACE_BYTES = 100 * 10**6  # more, for the library's FP8 products and what they return; not yet measured
UNQUANTISED: Mapping[str, str] = MappingProxyType({})
log = logging.getLogger(__name__)


def check_request(config: Pi05Config, stages: list[str], device: torch.device, dtype: str) -> None:
    """Device, precision and kind of model."""
    if device.type != "cuda":
        raise BackendError("backend 'cuda'", expected="a CUDA device", received=f"device '{device}'",
                           way_out="Use device 'cuda' on a machine with an NVIDIA GPU, or backend 'eager'.")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise BackendError("backend 'cuda'", expected="compute capability 8.0 (Ampere) or later",
                           received=".".join(map(str, capability)), way_out="Use backend 'eager' on this GPU.")
    if dtype != "bfloat16":
        raise BackendError("backend 'cuda'", expected="dtype bfloat16", received=str(dtype),
                           way_out="Use dtype bfloat16, or backend 'eager' for float32.")
    check_model(config, stages)


def check_libraries() -> None:
    """Before anything is loaded: what compiles the kernels."""
    for module, package in (("triton", "triton"), ("cuda", "cuda-bindings")):
        if importlib.util.find_spec(module) is None:
            raise BackendError("backend 'cuda'", expected=f"the Python package {package}", received="none installed",
                               way_out="Install PyTorch's CUDA build, which brings it, or use backend 'eager'.")


def check_model(config: Pi05Config, stages: list[str]) -> None:
    if "expert" in stages and config.kind != "pi05":
        raise BackendError("backend 'cuda', stage 'expert'", expected="a pi0.5 model", received=config.kind,
                           way_out="Use vision=cuda,prefix=cuda,expert=eager for pi0.")
    if config.prefix.num_kv_heads != 1:
        raise BackendError("backend 'cuda'", expected="1 key and value head", received=str(config.prefix.num_kv_heads),
                           way_out="Use backend 'eager' for this model.")
    dim = config.prefix.head_dim
    if dim & (dim - 1) or dim < 32:
        raise BackendError("backend 'cuda'", expected="a head_dim that is a power of two, 32 or more",
                           received=str(dim), way_out="Use backend 'eager' for this model.")


def bytes_needed(config: Pi05Config, stages: list[str], runs: Mapping[str, str] = UNQUANTISED,
                 host_embedding: bool = False) -> int:
    """Weights of the stages, static buffers, workspace. `runs`: how quantised layers run (quantised.py)."""
    workspace = WORKSPACE_BYTES + FP8_WORKSPACE_BYTES * (IN_FP8 in runs.values())
    return weight_bytes(config, stages, runs, host_embedding) + table_bytes(config) + workspace


def weight_bytes(config: Pi05Config, stages: list[str], runs: Mapping[str, str] = UNQUANTISED,
                 host_embedding: bool = False) -> int:
    """At most: adaRMS layers count as float32, though a checkpoint that has them in bfloat16 keeps them so."""
    low = {openpi_name(layer) for layer, how in runs.items() if how == IN_FP8}
    starts = tuple(openpi_name(module) for stage in stages for module in STAGE_MODULES[stage])
    last = openpi_name(f"language_model.layers.{config.prefix.depth - 1}.")
    vision = tuple(openpi_name(module) for module in STAGE_MODULES["vision"])

    beside = any(name.startswith(vision) and name.endswith("out_proj") for name in low)  # Fp8Linear.norm

    def size(name: str) -> int:  # bytes a number; of the vision stage's norms the scales (packing.Affine)
        if name.removesuffix(".weight") in low:
            return 1
        if name == EMBEDDING and host_embedding:
            return 0
        if name.startswith(vision) and "patch_embedding" in name:
            return 8 if name.endswith(".bias") else 2  # it is in the positions; what it counts for are zeros behind
        if beside and ".layers." in name:
            return 4 if "norm" in name else 2
        if not name.startswith(vision) or "position_embedding" in name:
            return target_dtype(name, torch.bfloat16).itemsize
        if "norm" in name:
            return 0 if beside or name.endswith(".bias") else 4
        return 2 + 8 * name.endswith(".bias")

    def scales(name: str, shape: torch.Size) -> int:  # float32, of merged layers one an output
        return 4 * (shape[0] + 4) if name.removesuffix(".weight") in low else 0

    return sum(shape.numel() * size(name) + scales(name, shape) for name, shape in expected_shapes(config).items()
               if name.startswith(starts) and (not name.startswith(last) or "k_proj" in name or "v_proj" in name))


def check_memory(config: Pi05Config, stages: list[str], device: torch.device, runs: Mapping[str, str]) -> bool:
    """Whether the token embedding is to stay on the host: for a quantised model, which is there to be small, and where
    the GPU would have no room for it. Raises BackendError where there is no room even so."""
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return embedding_on_host(config, stages, runs, free)


def embedding_on_host(config: Pi05Config, stages: list[str], runs: Mapping[str, str], free: int) -> bool:
    """`free`: bytes of the GPU's memory."""
    on_host = bool(runs) or free < bytes_needed(config, stages, runs)
    needed = bytes_needed(config, stages, runs, on_host)
    if free < needed:
        raise BackendError("GPU memory", expected=f"{needed / 1e9:.1f} GB free", received=f"{free / 1e9:.1f} GB",
                           way_out="Close other programs on the GPU, or run some stages elsewhere (vision=...).")
    if on_host and "prefix" in stages:
        log.info("the token embedding stays in pinned host memory: %.2f GB less on the GPU",
                 (bytes_needed(config, stages, runs) - needed) / 1e9)
    return on_host


def check_cameras(cameras: int, most: int) -> None:
    if not 1 <= cameras <= most:
        raise BackendError("cameras", expected=f"1 to {most}", received=str(cameras),
                           way_out="Drop masked cameras, or load a model with more camera slots.")


def check_batch(name: str, tensor: Tensor | np.ndarray) -> None:
    if tensor.shape[0] != 1:
        raise BackendError(f"batch of {name}", expected="1", received=str(tensor.shape[0]),
                           way_out="Call once an observation, or use backend 'eager', which is batched.")


def check_guidance(guidance: Guidance, config: Pi05Config) -> None:
    if guidance.trained:
        raise BackendError("guidance", expected="no action prefix with backend 'cuda', whose flow time is one for all "
                           "rows", received="trained real-time chunking", way_out="Use expert=eager.")
    if guidance.jacobian != "identity":
        raise BackendError("guidance", expected="the identity Jacobian with backend 'cuda'",
                           received=repr(guidance.jacobian),
                           way_out="Use expert=eager for the true one, which needs a backward pass.")
    shape = (1, config.action_horizon, config.action_dim)
    if guidance.previous.shape != shape:
        raise BackendError("previous chunk of the guidance", expected=f"shape {list(shape)}",
                           received=str(list(guidance.previous.shape)),
                           way_out="Pad the unexecuted tail with zeros to the whole horizon.")
