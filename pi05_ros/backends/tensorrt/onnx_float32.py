"""A copy of a 16-bit graph that computes in float32: onnxruntime's CPU has no bfloat16 arithmetic.

The weights are the same numbers, and float8 stays float8; only what is between is not rounded.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pi05_ros.backends.tensorrt.onnx_passes import FLOAT32, SIXTEEN_BITS


def in_float32(model: ir.Model) -> ir.Model:
    """The model, changed in place: every 16-bit tensor, weight and cast is float32."""
    for value in list(model.graph.initializers.values()):
        if value.dtype in SIXTEEN_BITS:
            value.const_value = widened(value.const_value)  # type: ignore[arg-type]
            value.type = ir.TensorType(FLOAT32)
    for value in (*model.graph.inputs, *model.graph.outputs, *(out for node in model.graph for out in node.outputs)):
        if value.dtype in SIXTEEN_BITS:
            value.type = ir.TensorType(FLOAT32)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() in map(int, SIXTEEN_BITS):
            node.attributes["to"] = ir.AttrInt64("to", int(FLOAT32))
    return model


def widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    return ir.LazyTensor(lambda: ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name), dtype=FLOAT32,
                         shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)
