"""SigLIP's attention in ONNX: products and a softmax, without the arithmetic on shapes of PyTorch's translation."""

from __future__ import annotations

import math

from onnxscript import opset18 as op


def attention(query, key, value, attn_mask=None, dropout_p: float = 0.0, is_causal: bool = False, scale=None,
              enable_gqa: bool = False):
    """softmax(q k^T / sqrt(head_dim)) v on [N, heads, T, head_dim]; nothing else is asked for by the model."""
    assert attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    factor = scale if scale is not None else 1.0 / math.sqrt(query.shape[-1])
    logits = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
    weights = op.Softmax(op.Mul(logits, op.CastLike(op.Constant(value_float=factor), logits)), axis=-1)
    return op.MatMul(weights, value)
