"""Stages as ONNX files: PyTorch's exporter, then the passes, then weights beside the graph and `export.json`."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pi05_ros.backends.tensorrt.names import STAGE_GRAPHS, GraphSpec, Manifest, files_hash
from pi05_ros.backends.tensorrt.programs import ExportOptions, StageProgram, stage_program
from pi05_ros.errors import BackendError, ConfigError
from pi05_ros.model.weights import WeightSource

if TYPE_CHECKING:
    import onnx_ir as ir

    from pi05_ros.backends.tensorrt.fp8 import Scales

ATTENTIONS = ("explicit", "fused")
# 17 is the last opset that TensorRT 8.6 reads. TensorRT 10 reads 20, which has Gelu as one operator; bfloat16 and
# float8 need a TensorRT that late anyway.
OPSETS = {"float32": 17, "float16": 17, "bfloat16": 20}
FP8_OPSET = 20
TRACED_OPSET = 18  # the exporter's own; onnx_passes.py goes down to 17
IN_GRAPH = 1024  # bytes; smaller constants (sizes, axes) stay in the graph, where shape inference reads them
Watch = Callable[[str, int, int], None]  # (what is done, done, in all)


@dataclass(frozen=True)
class OnnxOptions:
    """attention: `explicit` has every softmax in float32, `fused` in the graph's type, which TensorRT can fuse.
    scales: of the Linears that go through float8, by module name (fp8.py)."""

    attention: str = "explicit"
    scales: Mapping[str, Scales] = field(default_factory=dict)

    def check(self) -> None:
        if self.attention not in ATTENTIONS:
            raise ConfigError("--attention", expected=" or ".join(ATTENTIONS), received=self.attention,
                              way_out="Choose one.")


def export_stages(source: WeightSource, directory: Path, stages: Iterable[str], options: ExportOptions,
                  onnx: OnnxOptions = OnnxOptions(), origin: Mapping[str, str] = {},  # noqa: B006, B008 (both frozen)
                  watch: Watch = lambda what, done, total: None) -> Manifest:
    """Write the graphs of `stages` and the manifest; one graph's weights are in memory at a time.

    Raises:
        BackendError: onnx or onnxscript are not installed; an operator that TensorRT would not read.
        ConfigError, CheckpointError: from options and weights.
    """
    onnx.check()
    options.check(source.config)
    names = [graph for stage in stages for graph in graphs_of(stage)]
    directory.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in dict.fromkeys(names):
        program = stage_program(name, source, options, lambda done, total: watch(f"{name}: weights", done, total))  # noqa: B023
        watch(f"{name}: tracing", 0, 1)
        model = onnx_model(program, options, onnx)
        written[name] = write(model, program, directory, options, onnx, watch)
        for parameter in program.module.parameters():  # onnxscript's rules keep the last graph that they saw
            parameter.data = parameter.data.new_empty(0)
    manifest = Manifest(stages=written, config=dataclasses.asdict(source.config), source=dict(origin),
                        opset=max(spec.opset or 0 for spec in written.values()), versions=versions())
    manifest.write(directory)
    return manifest


def graphs_of(stage: str) -> Sequence[str]:
    if stage not in STAGE_GRAPHS:
        raise ConfigError("--stages", expected=", ".join(STAGE_GRAPHS), received=f"'{stage}'",
                          way_out="Write for example vision,prefix,expert.")
    return STAGE_GRAPHS[stage]


def onnx_model(program: StageProgram, options: ExportOptions, onnx: OnnxOptions) -> ir.Model:
    """The graph with readable names, still without a file."""
    passes, names, fp8, operators = _libraries()
    opset = FP8_OPSET if onnx.scales else OPSETS[options.dtype]
    aten = torch.ops.aten
    translations: dict[Any, Any] = {aten.scaled_dot_product_attention.default: operators.attention}
    if opset <= TRACED_OPSET:
        translations[aten.gelu.default] = operators.gelu
    with quiet():
        exported = torch.onnx.export(
            program.export(), (), dynamo=True, optimize=False, verbose=False, opset_version=max(opset, TRACED_OPSET),
            input_names=[spec.name for spec in program.inputs], output_names=[spec.name for spec in program.outputs],
            custom_translation_table=translations)
        assert exported is not None
        model = exported.model
        passes.optimise(model)
    if model.opset_imports[""] == TRACED_OPSET and opset < TRACED_OPSET:
        passes.lower_to_opset_17(model)
    passes.plain_reshapes(model)
    passes.whole_shapes(model)
    passes.softmax_in_float32(model)
    if onnx.attention == "fused":
        passes.softmax_in_graph_dtype(model)
    passes.transpose_weights(model)
    fp8.quantise(model, onnx.scales)
    names.rename(model, program.name)
    for value, spec in zip((*model.graph.inputs, *model.graph.outputs), (*program.inputs, *program.outputs),
                           strict=True):
        value.shape = passes.ir.Shape(spec.shape)
    model.graph.name = program.name
    return model


def write(model: ir.Model, program: StageProgram, directory: Path, options: ExportOptions, onnx: OnnxOptions,
          watch: Watch) -> GraphSpec:
    """The graph to <name>.onnx and its weights to <name>.onnx.data."""
    import onnx_ir as ir

    file = directory / f"{program.name}.onnx"
    data = file.with_name(file.name + ".data")
    for node in model.graph:  # where a node came from in Python is of no use to anybody else
        node.metadata_props.clear()
    ir.save(model, file, external_data=data.name, size_threshold_bytes=IN_GRAPH,
            callback=lambda tensor, info: watch(f"{program.name}: writing", info.index, info.total))
    return GraphSpec(file.name, program.inputs, program.outputs, precision(options, onnx, program.name),
                     model.opset_imports[""], files_hash(file, data), len(model.graph), data.stat().st_size,
                     options.steps if program.name == "loop" else None)


def precision(options: ExportOptions, onnx: OnnxOptions, graph: str) -> dict[str, str]:
    residual = options.dtype if graph == "vision" else options.residual
    return {"dtype": options.dtype, "residual": residual, "attention": onnx.attention,
            "quantisation": "fp8" if onnx.scales else "none"}


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "onnx", "onnxscript", "onnx-ir")}


@contextmanager
def quiet():
    """Without the exporter's remarks on what is not ours: torchvision missing, opsets, deprecations inside PyTorch."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _libraries() -> Any:
    """Our passes, which need onnx and onnxscript."""
    try:
        from pi05_ros.backends.tensorrt import fp8, onnx_names, onnx_operators, onnx_passes
    except ImportError as error:
        raise BackendError("export", expected="onnx and onnxscript", received=f"{error}",
                           way_out="Install them: pip install 'pi05_ros[export]'.") from error
    return onnx_passes, onnx_names, fp8, onnx_operators
