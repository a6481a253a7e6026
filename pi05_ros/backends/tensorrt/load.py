"""The way in for `--backend tensorrt`: engines of this checkpoint, GPU and release, found, loaded, bound.

Nothing is built here: `pi05 export` and `pi05 build` make engines, in minutes. `PI05_ENGINES` is their directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from pi05_ros.backends.tensorrt.api import Api, load_api
from pi05_ros.backends.tensorrt.executions import StageEngine, graphs_wanted
from pi05_ros.backends.tensorrt.names import STAGE_GRAPHS
from pi05_ros.backends.tensorrt.plan_cache import PlanEntry, gpu_name
from pi05_ros.backends.tensorrt.runner import Engine
from pi05_ros.backends.tensorrt.select import Wanted, engines_directory, select
from pi05_ros.backends.tensorrt.stages import TensorRtStages
from pi05_ros.config import Pi05Config
from pi05_ros.errors import BackendError
from pi05_ros.model.fingerprint import fingerprint
from pi05_ros.model.weights import Progress, WeightSource


def build(stages: Sequence[str], source: WeightSource, device: torch.device, dtype: str, resize: str,
          on_progress: Progress | None, flavour: str = "tensorrt") -> TensorRtStages:
    """Raises BackendError where the device, the library or an engine is not there or not fit."""
    if device.type != "cuda":
        raise BackendError(f"backend '{flavour}'", expected="a CUDA device", received=f"device '{device}'",
                           way_out="Use device 'cuda' on a machine with an NVIDIA GPU, or backend 'eager'.")
    check_model(flavour, source.config, stages)
    api, gpu = load_api(flavour), gpu_of(device)
    wanted = Wanted(flavour, api.version, gpu, dtype, fingerprint(source), asdict(source.config))
    entries = entries_for(stages, wanted)
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # there is a context from here on, which TensorRT takes
        engines = {}
        for done, (graph, entry) in enumerate(entries.items(), 1):
            engines[graph] = load(api, entry, gpu, device, graphs_wanted())
            if on_progress:
                on_progress(done, len(entries))
        built = TensorRtStages(source.config, engines, device, resize)
        built.prepare()
    return built


def load(api: Api, entry: PlanEntry, gpu: str, device: torch.device, capture: bool) -> StageEngine:
    """One engine on the device; BackendError where its weights do not fit."""
    free = torch.cuda.mem_get_info(device)[0]
    if free < entry.bytes:
        raise BackendError(f"engine '{entry.path}'", expected=f"{entry.bytes / 1e9:.2f} GB of free GPU memory",
                           received=f"{free / 1e9:.2f} GB", cause="out_of_memory",
                           way_out="Close other programs on the GPU, or run some stages elsewhere (vision=...).")
    return StageEngine(Engine(api, entry, gpu), device, capture)


def entries_for(stages: Sequence[str], wanted: Wanted) -> dict[str, PlanEntry]:
    """Graph to engine. The expert runs step by step where such engines are there, else as one loop."""
    directory = engines_directory()
    found: dict[str, PlanEntry] = {}
    for stage in stages:
        try:
            found |= select(directory, STAGE_GRAPHS.get(stage, ()), wanted)
        except BackendError as error:
            if stage != "expert" or error.cause != "engine_missing":
                raise
            try:
                found |= select(directory, STAGE_GRAPHS["loop"], wanted)
            except BackendError:
                raise error from None
    return found


def check_model(flavour: str, config: Pi05Config, stages: Sequence[str]) -> None:
    if "expert" in stages and config.kind != "pi05":
        raise BackendError(f"backend '{flavour}', stage 'expert'", expected="a pi0.5 model", received=config.kind,
                           way_out=f"Use vision={flavour},prefix={flavour},expert=eager for pi0.")


def gpu_of(device: torch.device) -> str:
    found = torch.cuda.get_device_properties(device)
    return gpu_name(found.name, (found.major, found.minor), found.multi_processor_count)
