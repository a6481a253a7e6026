"""Operators that PyTorch's exporter would write less well: what is between two roundings of eager is in float32.

In 16-bit graphs PyTorch's own translations round constants (1/sqrt(head_dim), the GELU's) and every step between.
"""

from __future__ import annotations

import math

from onnx_ir import DataType
from onnxscript import opset18 as op


def attention(query, key, value, attn_mask=None, dropout_p: float = 0.0, is_causal: bool = False, scale=None,
              enable_gqa: bool = False):
    """softmax(q k^T / sqrt(head_dim)) v on [N, heads, T, head_dim]; nothing else is asked for by the model."""
    assert attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    factor = op.Constant(value_float=scale if scale is not None else 1.0 / math.sqrt(query.shape[-1]))
    scaled = narrow(op.Mul(wide(query), factor), query)
    weights = op.Softmax(op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2])), axis=-1)
    return op.MatMul(weights, value)


def gelu(x, approximate: str = "none"):
    """GELU by tanh, for opsets that have no such operator."""
    assert approximate == "tanh"
    y = wide(x)
    inner = op.Mul(op.Constant(value_float=math.sqrt(2.0 / math.pi)),
                   op.Add(y, op.Mul(op.Constant(value_float=0.044715), op.Mul(y, op.Mul(y, y)))))
    half = op.Mul(op.Constant(value_float=0.5), y)
    return narrow(op.Mul(half, op.Add(op.Constant(value_float=1.0), op.Tanh(inner))), x)


def wide(x):
    return x if x.dtype == DataType.FLOAT else op.Cast(x, to=int(DataType.FLOAT))


def narrow(x, like):
    return x if like.dtype == DataType.FLOAT else op.Cast(x, to=int(like.dtype))
