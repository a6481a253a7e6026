"""One graph with its weights, bindings and profile: what the ONNX exporter and torch_tensorrt both start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from pi05_ros.backends.tensorrt import graphs
from pi05_ros.backends.tensorrt.names import DTYPES, GRAPHS, TensorSpec
from pi05_ros.config import Pi05Config
from pi05_ros.errors import ConfigError
from pi05_ros.model import weights
from pi05_ros.model.pi05 import Pi05

MAX_STEPS = 50  # denoising steps that one call of `modulation` takes
MODULES = {"vision": "vision", "prefix": "prefix", "modulation": "expert", "step": "expert", "loop": "expert"}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportOptions:
    """dtype: of products and of what crosses stages. cameras, tokens: the most there will be, and what is tuned for;
    `static`: exactly these. steps: of `loop`."""

    dtype: str = "float32"
    cameras: int = 3
    tokens: int = 200
    static: bool = False
    steps: int = 10

    @property
    def residual(self) -> str:
        """Gemma's activations exceed float16 (PI05_SPEC trap T2), so there the residual stream is float32."""
        return "float32" if self.dtype == "float16" else self.dtype

    def check(self, config: Pi05Config) -> None:
        """Raises ConfigError for what the model has no slots for."""
        for subject, value, most in (("--cameras", self.cameras, config.num_cameras),
                                     ("--tokens", self.tokens, config.max_token_len)):
            if not 1 <= value <= most:
                raise ConfigError(subject, expected=f"1 to {most}", received=str(value),
                                  way_out="The model has no more slots.")
        if self.dtype not in DTYPES:
            raise ConfigError("--dtype", expected=" or ".join(DTYPES), received=self.dtype, way_out="Choose one.")


@dataclass(frozen=True)
class StageProgram:
    """A module of plain tensors, examples of its inputs in order, and what it binds."""

    name: str
    module: nn.Module
    examples: tuple[Tensor, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def export(self) -> ExportedProgram:
        """The traced program with the weights that it reads; dynamic axes keep their names."""
        axes = {(name, low, high): torch.export.Dim(name, min=low, max=high)
                for spec in self.inputs for name, low, high in zip(spec.shape, spec.min, spec.max, strict=True)
                if isinstance(name, str)}
        dynamic = {spec.name: {i: axes[axis] for i, axis in enumerate(zip(spec.shape, spec.min, spec.max, strict=True))
                               if axis in axes} for spec in self.inputs}
        with torch.no_grad():
            return without_unread(torch.export.export(self.module, self.examples, dynamic_shapes=dynamic))


def stage_program(name: str, source: weights.WeightSource, options: ExportOptions,
                  on_progress: Progress | None = None) -> StageProgram:
    """Load the weights of graph `name` on the CPU and wrap them.

    Raises:
        BackendError: the action expert of pi0.
        CheckpointError, ConfigError: from the weights and the options.
    """
    options.check(source.config)
    model = weights.load(source, "cpu", getattr(torch, options.dtype), [MODULES[name]], on_progress)
    inputs, outputs = bindings(source.config, options)[name]
    return StageProgram(name, module_of(name, model, options), tuple(map(example, inputs)), inputs, outputs)


def without_unread(program: ExportedProgram) -> ExportedProgram:
    """Take out the weights that no operator reads: those of other stages, which were loaded without memory, and of the
    layers that the graph leaves out."""
    specs = program.graph_signature.input_specs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    unread = [spec for spec in specs if spec.kind == InputKind.PARAMETER and not nodes[spec.arg.name].users]
    for spec in unread:
        program.graph.erase_node(nodes[spec.arg.name])
        specs.remove(spec)
        program.state_dict.pop(cast(str, spec.target))
    program.graph_module.recompile()
    return program


def module_of(name: str, model: Pi05, options: ExportOptions) -> nn.Module:
    """The module of graph `name`; it takes the model over."""
    residual = getattr(torch, options.residual)
    if options.residual != options.dtype:
        for stack in (model.language_model, model.action_expert):
            graphs.cast_linear_inputs(stack)
    made = {
        "vision": lambda: graphs.VisionGraph(model),
        "prefix": lambda: graphs.PrefixGraph(model, residual),
        "modulation": lambda: graphs.ModulationGraph(model),
        "step": lambda: graphs.StepGraph(model, residual),
        "loop": lambda: graphs.LoopGraph(model, residual, options.steps),
    }
    if name not in made:
        raise ConfigError("graph", expected=" or ".join(GRAPHS), received=name, way_out="Choose one of them.")
    return made[name]().eval()


def bindings(config: Pi05Config, options: ExportOptions) -> dict[str, tuple[tuple[TensorSpec, ...], ...]]:
    """Inputs and outputs of every graph, as in names.py."""
    patches, cameras, tokens = config.vision.num_patches, options.cameras, options.tokens
    fewest, shortest = (cameras, tokens) if options.static else (1, 1)
    axes = {  # min and max; what a profile is tuned for is the max, but for the steps
        "cameras": (fewest, cameras),
        "image_rows": (fewest * patches, cameras * patches),
        "text_rows": (shortest, tokens),
        "prefix_rows": (fewest * patches + shortest, cameras * patches + tokens),
        "steps": (1, MAX_STEPS),
    }

    def spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
        low, high = (tuple(axes[n][side] if isinstance(n, str) else n for n in shape) for side in (0, 1))
        opt = tuple(10 if axis == "steps" else n for axis, n in zip(shape, high, strict=True))
        fixed = tuple(high[i] if low[i] == high[i] else axis for i, axis in enumerate(shape))
        return TensorSpec(name, dtype, fixed, low, opt, high)

    size, kind = config.vision.image_size, options.dtype
    cached = (config.prefix.depth, config.prefix.num_kv_heads, "prefix_rows", config.prefix.head_dim)
    cache = spec("keys", kind, *cached), spec("values", kind, *cached)
    image_tokens = spec("image_tokens", kind, "image_rows", config.prefix.width)
    actions = (config.action_horizon, config.action_dim)
    modulation = (2 * config.expert.depth + 1, 3 * config.expert.width)
    return {
        "vision": ((spec("pixels", "float32", "cameras", 3, size, size),), (image_tokens,)),
        "prefix": ((image_tokens, spec("tokens", "int32", "text_rows")), cache),
        "modulation": ((spec("time_features", "float32", "steps", config.expert.width),),
                       (spec("modulation", "float32", "steps", *modulation),)),
        "step": ((*cache, spec("x_t", "float32", *actions), spec("modulation", "float32", *modulation),
                  spec("dt", "float32", 1)),
                 (spec("x_next", "float32", *actions), spec("v_t", "float32", *actions))),
        "loop": ((*cache, spec("noise", "float32", *actions)), (spec("actions", "float32", *actions),)),
    }


def example(spec: TensorSpec) -> Tensor:
    """Random numbers of the tuned shape; prompt tokens below 256."""
    if spec.dtype == "int32":
        return torch.randint(0, 256, spec.opt, dtype=torch.int32)
    return torch.randn(spec.opt).to(getattr(torch, spec.dtype))
