"""Networks without strong typing (TensorRT 8.6): which type each tensor has in the graph, and a build that obeys.

There a layer's floating-point result is called float32 whatever goes in: float16 graphs built by those words are
float32 engines (seen on an H200: of float32's size and speed). So types are followed from inputs and casts. No PyTorch;
Python 3.10 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pi05_ros.backends.tensorrt.api import Api
from pi05_ros.backends.tensorrt.names import GraphSpec
from pi05_ros.backends.tensorrt.precision import PRODUCTS
from pi05_ros.errors import BackendError

FLOATS = ("float32", "float16")
UNTYPED = ("CONSTANT", "CAST", "SHAPE", "IDENTITY")  # layers whose type is what they are


def graph_types(api: Api, network: Any) -> dict[str, str]:
    """By tensor. What is made of constants alone is left out: it takes the type of what it meets."""
    types = {tensor.name: api.dtype(tensor.dtype) for tensor in map(network.get_input, range(network.num_inputs))}
    for layer in map(network.get_layer, range(network.num_layers)):
        inputs = [tensor for tensor in map(layer.get_input, range(layer.num_inputs)) if tensor is not None]
        given = [types[tensor.name] for tensor in inputs if types.get(tensor.name) in FLOATS]
        for index in range(layer.num_outputs):
            tensor = layer.get_output(index)
            told = _told(api, layer, index)
            if told not in FLOATS or layer.type.name == "CAST" or layer.output_type_is_set(index):
                types[tensor.name] = told
            elif given:
                types[tensor.name] = given[0]
    return types


def _told(api: Api, layer: Any, index: int) -> str:
    if layer.type.name == "CAST":
        layer.__class__ = api.module.ICastLayer  # the bindings give every layer as an ILayer
        return api.dtype(layer.to_type)
    return api.dtype(layer.get_output(index).dtype)


def obey_types(api: Api, config: Any, graph: GraphSpec, network: Any) -> Mapping[str, str]:
    """Allow float16, but keep in float32 what the graph has so (softmax, norms, sums), which the builder would compute
    in float16 too, and ask for float16 where products have it, which it computed in float32 in some graphs. Returns
    `graph_types`.

    Raises:
        BackendError: types that such a release does not have.
    """
    flags, dtype = api.module.BuilderFlag, graph.precision.get("dtype", "float32")
    if dtype == "bfloat16" or graph.precision.get("quantisation", "none") != "none":
        raise BackendError(f"'{graph.file}'", expected="float32 or float16 with TensorRT " + api.version,
                           received=f"{dtype}, quantisation {graph.precision.get('quantisation', 'none')}",
                           way_out="Export with --dtype float16, or take TensorRT 10 or later.")
    if dtype != "float16":
        return {}
    types, kinds = graph_types(api, network), api.module.DataType
    config.set_flag(flags.FP16)
    config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
    for layer in map(network.get_layer, range(network.num_layers)):
        names = [layer.get_output(index).name for index in range(layer.num_outputs)]
        given = {types.get(name) for name in names}
        asked = kinds.FLOAT if given == {"float32"} else kinds.HALF if given == {"float16"} else None
        if asked is None or layer.type.name in UNTYPED or asked is kinds.HALF and layer.type.name not in PRODUCTS:
            continue
        layer.precision = asked
        for index in range(len(names)):
            layer.set_output_type(index, asked)
    return types
