"""Names that a person can read in an engine inspector: `prefix/layer3/attention/q`, `step/layer0/mlp/down`.

A Linear's product has its module's name alone; every other node has its operator's behind it, and a number where that
is not unique. In `loop` the name begins with the step: `loop/step2/layer0/attention/q`.
"""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"  # where PyTorch's exporter keeps the modules a node came from
WRAPPERS = ("step.model.", "model.", "step.")  # of graphs.py
PLAIN = (("vision_tower.encoder.", ""), ("vision_tower.", ""), ("language_model.", ""), ("action_expert.", ""),
         ("embeddings.patch_embedding", "patches"), ("embeddings", "patches"), ("post_layernorm", "final_norm"),
         ("layers.", "layer"), ("self_attn", "attention"), ("_proj", ""), ("layer_norm1", "attention_norm"),
         ("layer_norm2", "mlp_norm"), ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm"))
PRODUCTS = ("MatMul", "Gemm", "Conv")
ENDS = ("action_in_proj", "action_out_proj")


def module_path(node: ir.Node) -> str:
    """The model's own name of the module a node came from (`language_model.layers.3.mlp.up_proj`), or ''."""
    scopes = [scope for scope in ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))[:-1]
              if not scope.startswith("_empty")]
    path = (scopes[-1] if scopes else "") + "."
    for wrapper in WRAPPERS:
        path = path.removeprefix(wrapper)
    return path.removesuffix(".")


def readable(path: str) -> str:
    """`language_model.layers.3.self_attn.q_proj` -> `layer3/attention/q`."""
    if path in ENDS:  # their `_proj` is no part of attention
        return path
    for old, new in PLAIN:
        path = path.replace(old, new)
    return path.replace(".", "/")


def rename(model: ir.Model, graph: str) -> None:
    """Name nodes, what they make, and weights; inputs and outputs of the graph keep theirs."""
    seen: Counter[str] = Counter()
    step = -1
    bound = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph:
        path = module_path(node)
        product = node.op_type in PRODUCTS and any(weight_of(value) for value in node.inputs)
        step += product and path == ENDS[0]
        base = "/".join(part for part in (graph, f"step{max(step, 0)}" if graph == "loop" else "", readable(path))
                        if part)
        name = base if product and path else f"{base}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        for index, value in enumerate(node.outputs):
            if value.name not in bound:
                value.name = node.name + (f":{index}" if len(node.outputs) > 1 else ":out")
    for count, value in enumerate(list(model.graph.initializers.values())):
        old = value.name or ""
        for wrapper in WRAPPERS:
            old = old.removeprefix(wrapper)
        module, _, leaf = old.rpartition(".")
        value.name = f"{graph}/{readable(module)}/{leaf}" if module else f"{graph}/constant{count}"


def weight_of(value: ir.Value | None) -> ir.Value | None:
    """The initializer behind a product's operand, seen through a transposition or a dequantisation; None: no weight."""
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or producer.op_type not in ("Transpose", "DequantizeLinear"):
            return None
        value = producer.inputs[0]
    return value
