"""An export run by onnxruntime on the CPU: an implementation of ONNX that is not ours, to check the graphs with."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pi05_ros.backends.tensorrt.names import GraphSpec, Manifest, read_manifest
from pi05_ros.errors import BackendError


class OnnxRunner:
    """Runs one graph after the other; only the last one used is in memory.

    bfloat16 and float16 graphs run as float32 copies (onnx_float32.py), which are written to a temporary directory;
    `float16="native"` runs float16 as it is.
    """

    def __init__(self, directory: Path, float16: str = "copy", threads: int = 0) -> None:
        self.directory, self.manifest = directory, read_manifest(directory)
        self.float16, self.threads = float16, threads
        self._session: tuple[str, object, object] | None = None

    def __call__(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs float32 or int32 by name to outputs float32 by name."""
        spec = graph_of(self.manifest, graph)
        spec.check_kind(opset=True)
        session = self._open(graph, spec)
        native = self._native(spec)
        types = {t.name: t.dtype for t in spec.inputs}
        feeds = {name: array.astype(types[name] if native or types[name] == "int32" else "float32")
                 for name, array in inputs.items()}
        names = [tensor.name for tensor in spec.outputs]
        return {name: np.asarray(value, np.float32)
                for name, value in zip(names, session.run(names, feeds), strict=True)}  # type: ignore[attr-defined]

    def _native(self, spec: GraphSpec) -> bool:
        kind = spec.precision["dtype"]
        return kind == "float32" or (kind == "float16" and self.float16 == "native")

    def _open(self, graph: str, spec: GraphSpec):
        if self._session is not None and self._session[0] == graph:
            return self._session[1]
        self._session = None
        try:
            import onnxruntime

            from pi05_ros.backends.tensorrt import onnx_float32
        except ImportError as error:
            raise BackendError("validation of ONNX", expected="onnx and onnxruntime", received=str(error),
                               way_out="Install them: pip install 'pi05_ros[export]'.") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        path, copy = self.directory / spec.file, None
        if not self._native(spec):
            copy = tempfile.TemporaryDirectory(prefix="pi05_float32_")
            model = onnx_float32.in_float32(onnx_float32.ir.load(path))
            path = Path(copy.name) / spec.file
            onnx_float32.ir.save(model, path, external_data=path.name + ".data", size_threshold_bytes=1024)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._session = graph, session, copy
        return session


def graph_of(manifest: Manifest, graph: str) -> GraphSpec:
    if graph not in manifest.stages:
        raise BackendError(f"graph '{graph}'", expected="one of " + ", ".join(manifest.stages), received="none",
                           way_out="Export its stage too: pi05 export --stages.")
    return manifest.stages[graph]
