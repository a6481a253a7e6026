"""What is changed in an exported ONNX graph: opset 17, weights as they are multiplied, the type of the softmax."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.rules import common as rules

from pi05_ros.errors import BackendError

FLOAT32, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
SIXTEEN_BITS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# Of onnxscript's own rules those that these graphs have a use for. The whole set has one that compares every node with
# every other: minutes for a step, hours for the ten thousand nodes of `loop`.
SIMPLER = (rules.squeeze_reshape_1d_rule, rules.unsqueeze_unsqueeze_rule, rules.reshape_reshape_rule,
           rules.transpose_transpose_rule, rules.no_op_transpose_rule, rules.no_op_expand_rule, rules.cast_cast_rule,
           rules.no_op_cast_rule, rules.mul_by_1_rule, rules.materialize_reshape_shape_rule)


def optimise(model: ir.Model) -> None:
    """Fold constants, write shapes into reshapes, and take out what does nothing or is there twice. Transposed weights
    stay as they are: `transpose_weights` turns them when they are written."""
    for _ in range(2):
        fold_constants(model, onnx_shape_inference=True,
                       should_fold=lambda node: False if node.op_type == "Transpose" else None)
        RewriteRuleSet(SIMPLER).apply_to_model(model)
        remove_unused_nodes(model)
    ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(), common.CommonSubexpressionEliminationPass(), common.OutputFixPass(),
        common.NameFixPass())(model)


def lower_to_opset_17(model: ir.Model) -> None:
    """Opset 18 to 17, the last that TensorRT 8.6 reads: reductions have axes as attributes, Split its sizes as input.

    Raises:
        BackendError: an operator that opset 17 has in another form and this does not know.
    """
    for node in model.graph:
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.inputs) > 1:
            node.attributes["axes"] = ir.AttrInt64s("axes", constant(node.inputs[1]).numpy().tolist())
            node.attributes.pop("noop_with_empty_axes", None)
            node.resize_inputs(1)
        elif node.op_type == "Split" and "num_outputs" in node.attributes:
            parts = node.attributes.pop("num_outputs").as_int()
            if len(node.inputs) < 2 or node.inputs[1] is None:
                axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                extent = node.inputs[0].shape[axis]  # type: ignore[index,union-attr]
                sizes = [len(part) for part in np.array_split(np.empty(int(extent)), parts)]  # type: ignore[arg-type]
                node.resize_inputs(2)
                node.replace_input_with(1, add_constant(model, np.array(sizes, np.int64)))
        elif onnx.defs.get_schema(node.op_type, 18, node.domain).since_version > 17:
            raise BackendError(f"operator {node.op_type} ({node.name})", expected="one that opset 17 has",
                               received="its form of opset 18",
                               way_out="Use the PyTorch version this package is tested with, or a later opset.")
    model.opset_imports[""] = 17


def plain_reshapes(model: ir.Model) -> None:
    """Without `allowzero`, which changes nothing where no size is 0, and which not every reader knows."""
    for node in model.graph:
        if node.op_type == "Reshape":
            sizes = node.inputs[1].const_value if node.inputs[1] is not None else None
            if sizes is None or 0 not in sizes.numpy():
                node.attributes.pop("allowzero", None)


def whole_shapes(model: ir.Model) -> None:
    """`Shape` without `start` and `end`: TensorRT 8.6's parser passes over them without a word, and gives all sizes.
    The wanted ones are gathered; one that is squeezed to a scalar is gathered as a scalar."""
    for node in list(model.graph):
        if node.op_type != "Shape" or not node.attributes.keys() & {"start", "end"}:
            continue
        (source,), (out,) = node.inputs, node.outputs
        start, end = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
        axes = range(source.shape.rank())[start:end]  # type: ignore[union-attr]
        squeezed = [use.node for use in out.uses() if len(use.node.inputs) == 1 and use.node.op_type == "Squeeze"]
        scalar = len(axes) == 1 and len(squeezed) == len(out.uses()) > 0 and not out.is_graph_output()
        shape = ir.Node("", "Shape", [source], metadata_props=dict(node.metadata_props))
        typed(shape.outputs[0], INT64, ir.Shape([source.shape.rank()]))  # type: ignore[union-attr]
        wanted = add_constant(model, np.array(axes[0] if scalar else list(axes), np.int64))
        gather = ir.Node("", "Gather", [shape.outputs[0], wanted], attributes={"axis": ir.AttrInt64("axis", 0)},
                         metadata_props=dict(node.metadata_props))
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [shape, gather], [out], [gather.outputs[0]])
        typed(gather.outputs[0], INT64, ir.Shape([] if scalar else [len(axes)]))
        for each in squeezed if scalar else ():
            ir.convenience.replace_all_uses_with(each.outputs[0], gather.outputs[0])
            model.graph.remove(each, safe=True)
    common.CommonSubexpressionEliminationPass()(model)


def transpose_weights(model: ir.Model) -> None:
    """Store each Linear's weight as MatMul reads it, [in, out]; made when it is written, so never all at once."""
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or not source.is_initializer() or len(source.uses()) != 1:
            continue
        tensor, (out,) = constant(source), node.outputs
        flipped = transposed(tensor)
        weight = ir.Value(name=source.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(flipped.shape),
                          const_value=flipped)
        del model.graph.initializers[source.name or ""]
        model.graph.register_initializer(weight)
        ir.convenience.replace_all_uses_with(out, weight)
        model.graph.remove(node, safe=True)


def transposed(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def make() -> ir.Tensor:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype, name=tensor.name)

    return ir.LazyTensor(make, dtype=tensor.dtype, shape=ir.Shape(tuple(reversed(tensor.shape.numpy()))),
                         name=tensor.name)


def softmax_in_float32(model: ir.Model) -> None:
    """Every softmax of a 16-bit graph between two casts, as Gemma's already are."""
    for node in list(model.graph):
        if node.op_type != "Softmax" or dtype_of(node.inputs[0]) not in SIXTEEN_BITS:
            continue
        logits, out = node.inputs[0], node.outputs[0]
        kind = dtype_of(logits)
        up, wide, down = cast(logits, FLOAT32, node), None, None
        wide = ir.Node("", "Softmax", [up.outputs[0]], attributes=dict(node.attributes),
                       metadata_props=dict(node.metadata_props))
        down = cast(wide.outputs[0], kind, node)
        typed(wide.outputs[0], FLOAT32, out.shape)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [up, wide, down], [out], [down.outputs[0]])


def softmax_in_graph_dtype(model: ir.Model) -> None:
    """Every softmax between two casts without them: the pattern that TensorRT fuses into one attention kernel."""
    for node in list(model.graph):
        if node.op_type != "Softmax":
            continue
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        after = [use.node for use in node.outputs[0].uses()]
        if before is None or before.op_type != "Cast" or len(after) != 1 or after[0].op_type != "Cast":
            continue
        kind = dtype_of(after[0].outputs[0])
        if dtype_of(before.inputs[0]) != kind:
            continue
        node.replace_input_with(0, before.inputs[0])
        typed(node.outputs[0], kind, node.outputs[0].shape)
        ir.convenience.replace_all_uses_with(after[0].outputs[0], node.outputs[0])
        model.graph.remove(after, safe=True)
        if not before.outputs[0].uses():
            model.graph.remove(before, safe=True)


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    return value.dtype if value is not None else None


def constant(value: ir.Value | None) -> ir.TensorProtocol:
    """The number behind a value that must be known."""
    if value is None or value.const_value is None:
        raise BackendError(f"value {value and value.name}", expected="a constant", received="a computed one",
                           way_out="Use the PyTorch version this package is tested with.")
    return value.const_value


def add_constant(model: ir.Model, array: np.ndarray, name: str = "") -> ir.Value:
    """A new initializer, or the one of the same name; unnamed ones share by their contents."""
    name = name or f"constant_{array.dtype}_{array.shape}_{'_'.join(map(str, array.reshape(-1).tolist()))}"
    if name not in model.graph.initializers:
        tensor = ir.tensor(array, name=name)
        model.graph.register_initializer(ir.Value(name=name, type=ir.TensorType(tensor.dtype),
                                                  shape=ir.Shape(array.shape), const_value=tensor))
    return model.graph.initializers[name]


def cast(value: ir.Value | None, kind: ir.DataType | None, like: ir.Node) -> ir.Node:
    """A Cast of `value` to `kind`, named later after the module that `like` came from."""
    assert value is not None and kind is not None
    node = ir.Node("", "Cast", [value], attributes={"to": ir.AttrInt64("to", int(kind))},
                   metadata_props=dict(like.metadata_props))
    typed(node.outputs[0], kind, value.shape)
    return node


def typed(value: ir.Value, kind: ir.DataType | None, shape: ir.Shape | None) -> None:
    assert kind is not None
    value.type, value.shape = ir.TensorType(kind), shape
