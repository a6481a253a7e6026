"""What the CUDA backend refuses, and the way out."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor

from pi05_ros.backends.cuda.shapes import table_bytes
from pi05_ros.config import Pi05Config
from pi05_ros.errors import BackendError
from pi05_ros.model.weights import STAGE_MODULES, expected_shapes, openpi_name
from pi05_ros.schema import Guidance

SHARED_BYTES = 227 * 2**10  # the full-size prefix attention's tiles, with their pipeline
WORKSPACE_BYTES = 300 * 2**20  # cuBLAS workspaces, graphs, one layer in the source's dtype


def check_request(config: Pi05Config, stages: list[str], device: torch.device, dtype: str) -> None:
    """Device, precision and kind of model."""
    if device.type != "cuda":
        raise BackendError("backend 'cuda'", expected="a CUDA device", received=f"device '{device}'",
                           way_out="Use device 'cuda' on a machine with an NVIDIA GPU, or backend 'eager'.")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise BackendError("backend 'cuda'", expected="compute capability 8.0 (Ampere) or later",
                           received=".".join(map(str, capability)), way_out="Use backend 'eager' on this GPU.")
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin")  # noqa: B009  (no stub)
    if config.prefix.head_dim >= 256 and shared < SHARED_BYTES:
        raise BackendError("backend 'cuda'", expected=f"{SHARED_BYTES // 1024} KiB of shared memory a block, as Hopper "
                           "and Blackwell's data centre GPUs have", received=f"{shared // 1024} KiB",
                           way_out="This version's attention tiles do not fit this GPU; use backend 'eager'.")
    if dtype != "bfloat16":
        raise BackendError("backend 'cuda'", expected="dtype bfloat16", received=str(dtype),
                           way_out="Use dtype bfloat16, or backend 'eager' for float32.")
    check_model(config, stages)


def check_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise BackendError("backend 'cuda'", expected="the Python package triton", received="none installed",
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


def bytes_needed(config: Pi05Config, stages: list[str]) -> int:
    """Weights of the stages (adaRMS and the small heads in float32), static buffers, workspace."""
    starts = tuple(openpi_name(m) for stage in stages for m in STAGE_MODULES[stage])
    weights = sum(shape.numel() * (4 if ".dense." in name else 2) for name, shape in expected_shapes(config).items()
                  if starts and name.startswith(starts))
    return weights + table_bytes(config) + WORKSPACE_BYTES


def check_memory(config: Pi05Config, stages: list[str], device: torch.device) -> None:
    needed = bytes_needed(config, stages)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if free < needed:
        raise BackendError("GPU memory", expected=f"{needed / 1e9:.1f} GB free", received=f"{free / 1e9:.1f} GB",
                           way_out="Close other programs on the GPU, or run some stages elsewhere (vision=...).")


def check_cameras(cameras: int, most: int) -> None:
    if not 1 <= cameras <= most:
        raise BackendError("cameras", expected=f"1 to {most}", received=str(cameras),
                           way_out="Drop masked cameras, or load a model with more camera slots.")


def check_batch(name: str, tensor: Tensor | np.ndarray) -> None:
    if tensor.shape[0] != 1:
        raise BackendError(f"batch of {name}", expected="1", received=str(tensor.shape[0]),
                           way_out="Call once an observation, or use backend 'eager', which is batched.")


def check_guidance(guidance: Guidance | None) -> None:
    if guidance is not None:
        raise BackendError("guidance", expected="none with backend 'cuda' in this version",
                           received=f"guidance with the {guidance.jacobian} Jacobian",
                           way_out="Use expert=eager for guided chunks, or leave guidance out.")
