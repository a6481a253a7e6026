"""A stand-in of torch_tensorrt: records calls of `dynamo.compile`, whose signature is the recorded one of a release.

What it gives has the shape of the real thing, as release 2.13.0 gave it on a CPU: a graph around a module with one
engine, whose inputs come in another order than the program's and whose outputs are named by number.
"""

from __future__ import annotations

import inspect
import json
import operator
from pathlib import Path
from types import SimpleNamespace

import torch

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "torch_tensorrt_2.13.0.json").read_text())


def signature(more=(), without=()):
    """Of `compile`: as recorded, with and without some arguments."""
    kind = inspect.Parameter
    names = [name for name in (*RECORDED["defaults"], *more) if name not in without]
    found = [kind(name, kind.KEYWORD_ONLY, default=RECORDED["defaults"].get(name)) for name in names[1:]]
    return inspect.Signature([kind(names[0], kind.POSITIONAL_OR_KEYWORD), *found, kind("kwargs", kind.VAR_KEYWORD)])


class Engine(torch.nn.Module):
    """As torch_tensorrt's `TorchTensorRTModule`, without a runtime."""

    def __init__(self, plan, inputs, outputs):
        super().__init__()
        self.serialized_engine, self.requires_output_allocator = plan, False
        self.input_binding_names, self.output_binding_names = inputs, outputs


def compiled(inputs, outputs, plan=b"plan", order=None, left=()):
    """A graph around one engine. inputs: names. order: of the engine's inputs. left: operators that stay outside."""
    graph, order = torch.fx.Graph(), list(order or reversed(inputs))
    placeholders = {name: graph.placeholder(name) for name in inputs}
    theirs = [f"output{i}" for i in range(outputs)]
    call = graph.call_module("_run_on_acc_0", tuple(placeholders[name] for name in order))
    made = [graph.call_function(operator.getitem, (call, i)) for i in range(outputs)] if outputs > 1 else [call]
    for target in left:
        made[0] = graph.call_function(target, (made[0],))
    graph.output(tuple(made))
    return torch.fx.GraphModule({"_run_on_acc_0": Engine(plan, order, theirs)}, graph)


class Library:
    """`module` stands for `import torch_tensorrt`. give: (program, arguments) to what compile returns, or raises."""

    def __init__(self, give, more=(), without=(), version=RECORDED["version"], package="tensorrt"):
        self.calls = []

        def compile(program, **settings):
            self.calls.append(settings)
            return give(program, settings)

        compile.__signature__ = signature(more, without)
        self.module = SimpleNamespace(__version__=version, tensorrt_package_name=package,
                                      Input=lambda **described: SimpleNamespace(**described),
                                      dynamo=SimpleNamespace(compile=compile))
