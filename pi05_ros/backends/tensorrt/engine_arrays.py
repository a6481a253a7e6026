"""An export's engines called with arrays, for comparisons: the twin of `onnx_cpu.OnnxRunner` on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from pi05_ros.backends.base import check_device
from pi05_ros.backends.tensorrt.api import Api, load_api
from pi05_ros.backends.tensorrt.executions import StageEngine
from pi05_ros.backends.tensorrt.load import gpu_of, load
from pi05_ros.backends.tensorrt.names import read_manifest
from pi05_ros.backends.tensorrt.plan_cache import PlanEntry, read_entries
from pi05_ros.backends.tensorrt.select import engines_directory, same_gpu
from pi05_ros.errors import BackendError


class EngineRunner:
    """Runs one graph after the other; only the last one used is on the device.

    Raises:
        BackendError: no such device, library, or engine of this export.
    """

    def __init__(self, directory: Path, flavour: str = "tensorrt", device: str = "cuda") -> None:
        self.manifest, self.device = read_manifest(directory), check_device(device)
        if self.device.type != "cuda":
            raise BackendError(f"engines of '{flavour}'", expected="a GPU", received=f"device '{self.device}'",
                               way_out="Run this on the machine with the GPU.")
        self.api, self.gpu = load_api(flavour), gpu_of(self.device)
        self._loaded: tuple[str, StageEngine] | None = None

    def __call__(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs float32 or int32 by name to outputs float32 by name."""
        if self._loaded is None or self._loaded[0] != graph:
            self._loaded = None
            entry = entry_of(self.manifest.stages[graph].weights_hash, graph, self.api, self.gpu, engines_directory())
            self._loaded = graph, load(self.api, entry, self.gpu, self.device, capture=False)
        return call(self._loaded[1], inputs)


def call(engine: StageEngine, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One run of an engine, with arrays of any of its shapes."""
    shapes = {name: array.shape for name, array in inputs.items()}
    for name, array in inputs.items():
        engine.view(name, array.shape).copy_(torch.from_numpy(np.ascontiguousarray(array)))
    engine.run(shapes)
    return {spec.name: engine.output(spec.name).float().cpu().numpy() for spec in engine.engine.entry.outputs}


def entry_of(weights_hash: str, graph: str, api: Api, gpu: str, directory: Path) -> PlanEntry:
    """The engine of exactly this graph and its weights; BackendError where there is none, or several."""
    found = [entry for entry in (read_entries(directory) if directory.is_dir() else ())
             if (entry.key.graph, entry.key.weights_hash) == (graph, weights_hash)
             and (entry.key.flavour, entry.key.version) == (api.flavour, api.version) and same_gpu(entry.key.gpu, gpu)]
    if len(found) != 1:
        raise BackendError(f"engine of '{graph}' in {directory}", received=str(len(found)), expected="one of this "
                           f"export, for {api.flavour} {api.version} and {gpu}",
                           way_out="Run `pi05 build` on this export." if not found else "Remove all but one.")
    return found[0]
