"""Stages as programs of torch.export on the disk: `<name>.pt2`, weights included, and `export.json`.

A program is read again as soon as it is written, and every weight in it compared with the model's: bit for bit, and
used by the module that it belongs to. Layers are alike but for their weights, so that a mix-up would fit everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from pi05_ros.backends.tensorrt.export import Watch, graphs_of, quiet
from pi05_ros.backends.tensorrt.names import GraphSpec, Manifest, files_hash
from pi05_ros.backends.tensorrt.programs import ExportOptions, StageProgram, stage_program
from pi05_ros.backends.torch_tensorrt.fp8 import quantize_op, round_linears
from pi05_ros.errors import BackendError
from pi05_ros.model.weights import WeightSource


def export_programs(source: WeightSource, directory: Path, stages: Iterable[str], options: ExportOptions,
                    origin: Mapping[str, str] = {},  # noqa: B006 (only read)
                    watch: Watch = lambda what, done, total: None) -> Manifest:
    """Write the programs of `stages` and the manifest; one graph's weights are in memory at a time, twice.

    Raises:
        BackendError: a program that torch.export does not write or read again as it was.
        ConfigError, CheckpointError: from options and weights.
    """
    options.check(source.config)
    names = [graph for stage in stages for graph in graphs_of(stage)]
    directory.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in dict.fromkeys(names):
        stage = stage_program(name, source, options, lambda done, total: watch(f"{name}: weights", done, total))  # noqa: B023
        watch(f"{name}: tracing", 0, 1)
        written[name] = write(stage, directory, options)
    manifest = Manifest(stages=written, config=dataclasses.asdict(source.config), source=dict(origin), opset=None,
                        versions={"torch": metadata.version("torch")})
    manifest.write(directory)
    return manifest


def write(stage: StageProgram, directory: Path, options: ExportOptions) -> GraphSpec:
    """One program, checked after it was read again."""
    file = directory / f"{stage.name}.pt2"
    rounded = round_linears(stage.module, getattr(torch, options.dtype))
    with quiet():
        program = stage.export()
        torch.export.save(program, file)
    check_weights(open_program(file), stage.module, file.name)  # what is on the disk, not what was traced
    residual = options.dtype if stage.name == "vision" else options.residual
    precision = {"dtype": options.dtype, "residual": residual, "attention": "explicit",
                 "quantisation": "fp8" if rounded else "none"}
    return GraphSpec(file.name, stage.inputs, stage.outputs, precision, None, files_hash(file),
                     len(program.graph.nodes), sum(tensor.nbytes for tensor in weights_of(program).values()),
                     options.steps if stage.name == "loop" else None)


def open_program(file: Path, precision: Mapping[str, str] = {}) -> ExportedProgram:  # noqa: B006 (only read)
    """A program as it was written; `precision` as in its `GraphSpec`.

    Raises:
        BackendError: not a program, one that is not whole, or of a PyTorch whose programs this one does not read; FP8
            without ModelOpt.
    """
    if precision.get("quantisation") == "fp8":
        quantize_op()
    try:
        with quiet():
            return torch.export.load(file)
    except Exception as error:  # torch.export has no exception of its own for a file it cannot read
        raise BackendError(f"program '{file}'", expected=f"a torch.export program that PyTorch {torch.__version__} "
                           "reads", received=f"{type(error).__name__}: {str(error)[:300]}",
                           way_out="Export again on this machine, or with this release of PyTorch.") from error


def check_weights(program: ExportedProgram, module: nn.Module, name: str) -> None:
    """Every weight in `program` is `module`'s, bit for bit, and read by its own module's operators and nobody else's.

    Raises:
        BackendError: the first one that differs or is read elsewhere.
    """
    held, again = weights_of(program), "Report this: the program cannot be trusted. Export with --format onnx."
    wanted = {**dict(module.named_parameters(remove_duplicate=False)),
              **dict(module.named_buffers(remove_duplicate=False))}
    for path, tensor in held.items():
        theirs = wanted.get(path)
        if theirs is None or not same_bits(tensor, theirs):
            raise BackendError(f"weight '{path}' of program '{name}'", expected="the model's, bit for bit",
                               received="one of its own" if theirs is None else "other numbers", way_out=again)
    for path, readers in readers_of(program).items():
        if strange := [reader for reader in readers if not owns(reader, path.rpartition(".")[0])]:
            raise BackendError(f"weight '{path}' of program '{name}'", expected="to be read by its own module",
                               received=f"read by '{strange[0]}'", way_out=again)


def owns(reader: str, owner: str) -> bool:
    """A module reads its own weights, and those of modules inside it."""
    return owner == reader or reader == "" or owner.startswith(reader + ".")


def weights_of(program: ExportedProgram) -> dict[str, Tensor]:
    """Parameters and buffers by the path of the module that was exported."""
    constants = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    return {**program.state_dict, **constants}


def readers_of(program: ExportedProgram) -> dict[str, set[str]]:
    """Path of a weight to the paths of the modules whose operators read it."""
    paths = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs
             if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None}
    return {paths[node.name]: {module_of_node(user) for user in node.users} for node in program.graph.nodes
            if node.op == "placeholder" and node.name in paths}


def module_of_node(node: torch.fx.Node) -> str:
    """The innermost module that an operator came from; "" is the whole."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(
        one.detach().contiguous().view(torch.uint8), other.detach().contiguous().view(torch.uint8))
