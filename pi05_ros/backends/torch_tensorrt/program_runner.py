"""An export's programs run by PyTorch on the CPU, as they were read back from the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from pi05_ros.backends.tensorrt.names import read_manifest
from pi05_ros.backends.torch_tensorrt.program_files import open_program
from pi05_ros.errors import BackendError


class ProgramRunner:
    """Programs by graph, each read when it is first asked for. All arithmetic is in its own types."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.manifest = directory, read_manifest(directory)
        for spec in self.manifest.stages.values():
            spec.check_kind(opset=False)
        self._opened: dict[str, torch.nn.Module] = {}

    def __call__(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs float32 or int32 by name to outputs float32 by name.

        Raises:
            BackendError: a shape that the program was not exported for.
        """
        spec = self.manifest.stages[graph]
        if graph not in self._opened:
            self._opened[graph] = open_program(self.directory / spec.file, spec.precision).module()
        given = [torch.from_numpy(np.ascontiguousarray(inputs[each.name])).to(getattr(torch, each.dtype))
                 for each in spec.inputs]
        try:
            with torch.no_grad():
                made = self._opened[graph](*given)
        except (AssertionError, RuntimeError) as error:  # the guards of torch.export
            ranges = ", ".join(f"{each.name} {list(each.min)} to {list(each.max)}" for each in spec.inputs)
            raise BackendError(f"program '{spec.file}'", expected=ranges, way_out="Export with --cameras and --tokens "
                               "as they are here.", received=f"{[list(each.shape) for each in given]}: "
                               f"{str(error)[:200]}") from error
        outputs = made if isinstance(made, tuple) else (made,)
        return {each.name: tensor.float().numpy() for each, tensor in zip(spec.outputs, outputs, strict=True)}
