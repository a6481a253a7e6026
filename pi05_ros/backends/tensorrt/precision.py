"""Layers that compute in a higher precision than the network asked for, as the engine inspector tells.

A strongly typed network fixes every tensor's type, but a builder without a fast kernel may still convert and compute a
matrix product in float32. It gives right numbers slowly, and says nothing: it was reported on Jetson Thor. Fused blocks
do not tell their types, so the engine's size is looked at too: TensorRT 8.6 on an H200 kept a float16 graph of 139 MB
in 278 MB, and ran it at float32's speed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pi05_ros.backends.tensorrt.api import BITS, Api

MORE, MORE_BYTES = 1.25, 64e6  # of an engine over the weights of its graph: descriptions and kernels are in it too
PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "EINSUM")
# A type, as releases write it in "Format/Datatype": "Half", "Row major linear FP16 format", "BFloat16", "FP8".
WORDS = ((r"bfloat16|bf16", "bfloat16"), (r"fp8|float8|e4m3", "float8"), (r"\bhalf\b|fp16|float16", "float16"),
         (r"int8", "int8"), (r"\bfloat\b|fp32|float32|tf32", "float32"))
# And in names of kernels: sm80_xmma_gemm_bf16bf16_bf16f32_f32, sm89_xmma_gemm_e4m3bf16_...
TACTIC = re.compile(r"gemm_(?:tf32|f32|f16|bf16|e4m3|i8)|fprop_\w*?_(?:tf32|f32|f16|bf16|e4m3|i8)")
TACTIC_TYPES = {"tf32": "float32", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "e4m3": "float8",
                "i8": "int8"}


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine. types: of its inputs, then what its kernel's name says, where either is told."""

    name: str
    kind: str
    types: tuple[str, ...]
    origin: str  # the ONNX nodes it was made of, where told
    tactic: str = ""


@dataclass(frozen=True)
class Fallback:
    """A matrix product that was to read `wanted` numbers and is computed from `found` ones, in `layer`."""

    product: str
    wanted: str
    found: str
    layer: str

    def __str__(self) -> str:
        return f"{self.product}: {self.found} instead of {self.wanted} (in '{self.layer}')"


def wanted_products(api: Api, network: Any, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Every matrix product of the network by name, with the type of its narrowest operand, before any dequantising.
    known: types of tensors by name, where TensorRT does not tell the graph's (weak_types.py)."""
    makers = {}
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    for layer in layers:
        for i in range(layer.num_outputs):
            makers[layer.get_output(i).name] = layer
    wanted = {}
    for layer in layers:
        if layer.type.name in PRODUCTS:
            types = [_operand(api, makers, layer.get_input(i), known) for i in range(layer.num_inputs)
                     if layer.get_input(i) is not None]
            wanted[layer.name] = min(types, key=lambda dtype: BITS.get(dtype, 64), default="float32")
    return wanted


def _operand(api: Api, makers: Mapping[str, Any], tensor: Any, known: Mapping[str, str]) -> str:
    maker = makers.get(tensor.name)
    if maker is not None and maker.type.name == "DEQUANTIZE":
        tensor = maker.get_input(0)
    return known.get(tensor.name) or api.dtype(tensor.dtype)


def engine_layers(inspected: str) -> list[EngineLayer]:
    """The JSON of the engine inspector; layers without details have no types. Not JSON: no layers. It has line ends
    inside strings where shapes are dynamic (8.6)."""
    try:
        stored = json.loads(inspected, strict=False).get("Layers", [])
    except (ValueError, AttributeError):
        return []
    return [_layer(entry) if isinstance(entry, dict) else EngineLayer(str(entry), "", (), "") for entry in stored]


def _layer(entry: Mapping[str, Any]) -> EngineLayer:
    inputs = entry.get("Inputs", [])
    types = [_type(str(tensor.get("Format/Datatype", tensor.get("Datatype", "")))) for tensor in inputs
             if isinstance(tensor, dict)]
    tactic = str(entry.get("TacticName", ""))
    if found := TACTIC.search(tactic):
        types.append(TACTIC_TYPES[found.group().rpartition("_")[2]])
    return EngineLayer(str(entry.get("Name", "")), str(entry.get("LayerType", "")), tuple(t for t in types if t),
                       str(entry.get("Metadata", "")), tactic)


def _type(words: str) -> str:
    return next((dtype for pattern, dtype in WORDS if re.search(pattern, words.lower())), "")


def fell_back(wanted: Mapping[str, str], layers: list[EngineLayer]) -> list[Fallback]:
    """Products whose layer reads nothing as narrow as they do; fused blocks that tell no types are passed over."""
    found = []
    for product, dtype in wanted.items():
        for layer in layers:
            if layer.types and layer.kind != "Reformat" and _mentions(layer, product):
                narrowest = min(layer.types, key=lambda each: BITS.get(each, 64))
                if BITS.get(narrowest, 64) > BITS.get(dtype, 64):
                    found.append(Fallback(product, dtype, narrowest, layer.name))
    return found


def kept_wider(plan_bytes: int, graph_bytes: int) -> list[Fallback]:
    """The engine, where it is so much larger than the weights of its graph that it must hold them in a wider type."""
    if not graph_bytes or plan_bytes <= MORE * graph_bytes + MORE_BYTES:
        return []
    return [Fallback("all weights", f"{graph_bytes / 1e6:.0f} MB", f"{plan_bytes / 1e6:.0f} MB", "the engine")]


def seen(wanted: Mapping[str, str], layers: list[EngineLayer]) -> int:
    """How many products the inspector named with types: the others cannot be judged."""
    return sum(any(layer.types and _mentions(layer, product) for layer in layers) for product in wanted)


def _mentions(layer: EngineLayer, product: str) -> bool:
    return re.search(rf"(?<![\w./]){re.escape(product)}(?![\w./])", f"{layer.name} {layer.origin}") is not None
