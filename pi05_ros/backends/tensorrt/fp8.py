"""Linears through float8 (e4m3fn): QuantizeLinear and DequantizeLinear around them, with scales from calibration.

The scales of module `m` are `m.weight_scale`, float32 [out] or [], and `m.input_scale`, float32 []: a number x is
stored as round(x / scale), so scale is the largest magnitude over 448.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from pi05_ros.backends.tensorrt.onnx_names import PRODUCTS, module_path, weight_of
from pi05_ros.backends.tensorrt.onnx_passes import add_constant, dtype_of, typed
from pi05_ros.errors import ConfigError

FP8, FP8_MAX = ir.DataType.FLOAT8E4M3FN, 448.0


@dataclass(frozen=True)
class Scales:
    """weight: float32 [out] or []; input: float32 []."""

    weight: np.ndarray
    input: np.ndarray


def read_scales(path: Path) -> dict[str, Scales]:
    """Module name to scales, from a safetensors file.

    Raises:
        ConfigError: not such a file, a scale without its partner, or one that is not finite and above 0.
    """
    try:
        stored = load_file(path)
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), expected="a safetensors file of scales", received=str(error),
                          way_out="Give the file that `pi05 quantize` wrote.") from error
    modules = {name.rpartition(".")[0] for name in stored if name.endswith(("weight_scale", "input_scale"))}
    found = {}
    for module in sorted(modules):
        pair = [stored.get(f"{module}.{kind}_scale") for kind in ("weight", "input")]
        for scale in pair:
            if scale is None or not (np.isfinite(scale) & (scale > 0)).all():
                raise ConfigError(f"scales of '{module}'", expected="weight_scale and input_scale, finite and above 0",
                                  received="none" if scale is None else str(scale), way_out="Calibrate again.")
        found[module] = Scales(*(np.asarray(scale, np.float32) for scale in pair))
    if not found:
        raise ConfigError(str(path), expected="tensors <module>.weight_scale and <module>.input_scale",
                          received=", ".join(list(stored)[:3]) or "none", way_out="Calibrate again.")
    return found


def quantise(model: ir.Model, scales: Mapping[str, Scales]) -> None:
    """Write Q/DQ around the products of the modules in `scales` that this graph has; weights are stored as float8.

    Scales take the graph's own type, because the operators want it so; the weights are divided by what is stored.
    """
    dequantised: dict[str, ir.Value] = {}
    for node in list(model.graph):
        module = module_path(node)
        if module not in scales or node.op_type not in PRODUCTS:
            continue
        x, weight = node.inputs[0], weight_of(node.inputs[1])
        if x is None or weight is None or node.op_type != "MatMul":
            continue
        kind = dtype_of(x)
        assert kind is not None and weight.name is not None
        given, props = scales[module], dict(node.metadata_props)
        if module not in dequantised:
            dequantised[module] = _quantised_weight(model, node, weight, given.weight.reshape(-1), module)
        scale = add_constant(model, given.input.reshape(()).astype(kind.numpy()), f"{module}.input_scale")
        zero = add_constant(model, np.zeros((), FP8.numpy()), "float8_zero")
        down = ir.Node("", "QuantizeLinear", [x, scale, zero], metadata_props=props)
        up = ir.Node("", "DequantizeLinear", [down.outputs[0], scale, zero], metadata_props=props)
        typed(down.outputs[0], FP8, x.shape)
        typed(up.outputs[0], kind, x.shape)
        model.graph.insert_before(node, [down, up])
        node.replace_input_with(0, up.outputs[0])
        node.replace_input_with(1, dequantised[module])


def _quantised_weight(model: ir.Model, before: ir.Node, weight: ir.Value, scale: np.ndarray, module: str) -> ir.Value:
    """Replace the initializer [in, out] by float8 numbers and a DequantizeLinear; what that makes."""
    tensor, kind = weight.const_value, weight.dtype
    assert tensor is not None and kind is not None and weight.name is not None
    per_channel = scale.size > 1
    if per_channel and scale.size != tensor.shape.numpy()[1]:
        raise ConfigError(f"{module}.weight_scale", expected=f"one scale or {tensor.shape.numpy()[1]}",
                          received=str(scale.size), way_out="Take the scales of this model.")
    rounded = scale.astype(kind.numpy())

    def make() -> ir.Tensor:
        return ir.Tensor(to_float8(tensor.numpy().astype(np.float32) / rounded.astype(np.float32)), dtype=FP8)

    stored = ir.LazyTensor(make, dtype=FP8, shape=ir.Shape(tensor.shape.numpy()), name=weight.name)
    del model.graph.initializers[weight.name]
    small = ir.Value(name=weight.name, type=ir.TensorType(FP8), shape=ir.Shape(tensor.shape.numpy()),
                     const_value=stored)
    model.graph.register_initializer(small)
    held = rounded if per_channel else rounded.reshape(())
    inputs = [small, add_constant(model, held, f"{module}.weight_scale"),
              add_constant(model, np.zeros(held.shape, FP8.numpy()), f"float8_zeros_{held.size}" if per_channel
                           else "float8_zero")]
    up = ir.Node("", "DequantizeLinear", inputs, metadata_props=dict(before.metadata_props),
                 attributes={"axis": ir.AttrInt64("axis", 1)} if per_channel else {})
    typed(up.outputs[0], kind, small.shape)
    model.graph.insert_before(before, [up])
    return up.outputs[0]


def to_float8(numbers: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, beyond the range saturated, as QuantizeLinear does."""
    return numbers.clip(-FP8_MAX, FP8_MAX).astype(FP8.numpy())


def fake_quantise(x: Tensor, scale: Tensor) -> Tensor:
    """What x is after both operators, in its own dtype: what an eager comparison multiplies."""
    return ((x.float() / scale.float()).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
            * scale.float()).to(x.dtype)


def as_stored(scales: Mapping[str, Scales], dtype: str) -> dict[str, Scales]:
    """What a graph of type `dtype` (names.DTYPES) holds of them: scales are of its own type."""
    kind = getattr(torch, dtype)

    def rounded(array: np.ndarray) -> np.ndarray:
        return torch.from_numpy(array).to(kind).float().numpy()

    return {name: Scales(rounded(given.weight), rounded(given.input)) for name, given in scales.items()}


def fake_quantise_linears(model: nn.Module, scales: Mapping[str, Scales]) -> None:
    """Let the Linears of `scales` that are loaded multiply rounded weights and inputs, as their graph does."""
    for name, given in scales.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if linear.weight.is_meta:
            continue
        step = torch.tensor(given.input.reshape(()))
        weight_step = torch.tensor(given.weight.reshape(-1, 1))
        linear.weight = nn.Parameter(fake_quantise(linear.weight, weight_step), requires_grad=False)
        linear.register_forward_pre_hook(lambda module, args, step=step: (fake_quantise(args[0], step),))
