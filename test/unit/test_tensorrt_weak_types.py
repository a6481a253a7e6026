"""Types of a network whose release calls every floating-point tensor float32: followed from inputs and casts."""

from types import SimpleNamespace

import pytest

from pi05_ros.backends.tensorrt.api import Api
from pi05_ros.backends.tensorrt.precision import wanted_products
from pi05_ros.backends.tensorrt.weak_types import obey_types
from pi05_ros.errors import BackendError


class Layer:
    """Of a network without strong typing: what it gives is called FLOAT, unless it is a cast, of integers or set."""

    def __init__(self, kind, inputs, output, dtype="FLOAT", to=None):
        self.type, self.precision, self.set = SimpleNamespace(name=kind), None, {}
        self.inputs, self.num_inputs, self.num_outputs = inputs, len(inputs), 1
        self.output, self.to_type = tensor(output, dtype), SimpleNamespace(name=to or dtype)
        self.name = output

    def get_input(self, index):
        return self.inputs[index]

    def get_output(self, index):
        return self.output

    def output_type_is_set(self, index):
        return index in self.set

    def set_output_type(self, index, dtype):
        self.set[index] = dtype


class CastLayer(Layer):
    """What the bindings want a cast to be called before they tell its type."""


def tensor(name, dtype="FLOAT"):
    return SimpleNamespace(name=name, dtype=SimpleNamespace(name=dtype))


def half_network():
    """x float16 times weights, its softmax between casts, a float32 product, sums and embeddings of integers."""
    layers = []

    def add(kind, *inputs, **more):
        layers.append(Layer(kind, inputs, f"{kind.lower()}{len(layers)}", **more))
        return layers[-1].output

    x, tokens = tensor("x", "HALF"), tensor("tokens", "INT32")
    weights = add("SHUFFLE", add("CONSTANT"))
    product = add("MATRIX_MULTIPLY", x, weights)
    softmax = add("SOFTMAX", add("CAST", product, to="FLOAT"), None)
    again = add("MATRIX_MULTIPLY", add("CAST", softmax, to="HALF"), product)
    total = add("ELEMENTWISE", add("CAST", again, to="FLOAT"), softmax)
    add("MATRIX_MULTIPLY", total, weights)
    add("ELEMENTWISE", tokens, add("SHAPE", x, dtype="INT32"), dtype="INT32")
    add("GATHER", weights, tokens)
    return SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__, num_inputs=2,
                           get_input=(x, tokens).__getitem__), layers


def test_a_release_without_strong_typing_keeps_float32_where_the_graph_has_it_and_nowhere_else():
    kinds = SimpleNamespace(FLOAT=SimpleNamespace(name="FLOAT"), HALF=SimpleNamespace(name="HALF"))
    flags = SimpleNamespace(FP16="fp16", OBEY_PRECISION_CONSTRAINTS="obey")
    api = Api("tensorrt", SimpleNamespace(BuilderFlag=flags, DataType=kinds, ICastLayer=CastLayer), "8.6.0")
    for dtype, wanted in (("float32", []), ("float16", ["fp16", "obey"])):
        network, layers = half_network()
        flagged = []
        types = obey_types(api, SimpleNamespace(set_flag=flagged.append),
                           SimpleNamespace(file="step.onnx", precision={"dtype": dtype}), network)
        assert flagged == wanted
        kept = [layer.name for layer in layers if layer.precision is kinds.FLOAT]
        assert kept == (["softmax4", "elementwise8", "matrix_multiply9"] if wanted else [])
        assert [layer.name for layer in layers if layer.set == {0: kinds.FLOAT}] == kept
        half = [layer.name for layer in layers if layer.precision is kinds.HALF and layer.set == {0: kinds.HALF}]
        assert half == (["matrix_multiply2", "matrix_multiply6"] if wanted else [])  # products alone are asked for it
        products = wanted_products(api, network, types)
        assert list(products.values()) == ["float16", "float16" if wanted else "float32", "float32"]
    for precision in ({"dtype": "bfloat16"}, {"dtype": "float16", "quantisation": "fp8"}):
        with pytest.raises(BackendError, match="--dtype float16, or take TensorRT 10"):
            obey_types(api, None, SimpleNamespace(file="step.onnx", precision=precision), None)
