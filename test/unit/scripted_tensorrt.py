"""A stand-in of TensorRT's Python API that records every call, and computes with a function of the test.

Each class has only the names that this release has (8.6, 10 and 11 of `tensorrt`, 1.7 of `tensorrt_rtx`; read from the
published bindings), so a call to a name that a release lacks fails as it would there. Plans are JSON.
"""

from __future__ import annotations

import enum
import json
import weakref
from types import SimpleNamespace

DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT32 FP8")
TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
LayerInformationFormat = enum.Enum("LayerInformationFormat", "ONELINE JSON")
NAMES = {"float32": DataType.FLOAT, "float16": DataType.HALF, "bfloat16": DataType.BF16, "int32": DataType.INT32}
RELEASES = {"8.6.0": "tensorrt", "10.3.0": "tensorrt", "11.4.0.106": "tensorrt", "1.7.1.116": "tensorrt_rtx"}


def plan_of(entry_inputs, entry_outputs, graph="", memory=512):
    """A serialized engine with these bindings."""
    tensors = [[spec.name, mode, spec.dtype, [axis if isinstance(axis, int) else -1 for axis in spec.shape]]
               for mode, specs in (("INPUT", entry_inputs), ("OUTPUT", entry_outputs)) for spec in specs]
    return json.dumps({"graph": graph, "tensors": tensors, "memory": memory}).encode()


class Script:
    """`module` stands for `import tensorrt`; `calls` has (name, *arguments) of every call in order.

    Args:
        compute: (graph, addresses by binding, shapes by input) is called for each execution; a dictionary that it gives
            has the shapes of outputs.
        fails: names of calls that fail as TensorRT does: None or False, and a message in the log.
        words: what is in the log then.
    """

    def __init__(self, version="10.3.0", compute=lambda graph, addresses, shapes: None, fails=(), words="no words"):
        self.version, self.compute, self.fails, self.words = version, compute, set(fails), words
        self.calls, self.logger = [], None
        self.flavour = RELEASES[version]
        old, rtx = version.startswith("8.6"), self.flavour == "tensorrt_rtx"
        has_both = version.startswith("10")
        script = self

        class ILogger:
            def __init__(self):
                script.logger = weakref.ref(self)

        class Runtime:
            def __init__(self, logger):
                assert isinstance(logger, ILogger)
                script.note("Runtime")
                self._logger = weakref.ref(logger)

            def deserialize_cuda_engine(self, plan):
                script.note("deserialize_cuda_engine", len(plan))
                return None if script.failed("deserialize_cuda_engine") else Engine(self, json.loads(bytes(plan)))

        class Engine:
            def __init__(self, runtime, stored):
                self._runtime, self._logger, self._stored = weakref.ref(runtime), runtime._logger, stored
                self._contexts = 0

            num_io_tensors = property(lambda self: len(self._stored["tensors"]))
            if old or has_both:
                device_memory_size = property(lambda self: self._stored["memory"])
            if not old:
                device_memory_size_v2 = property(lambda self: self._stored["memory"])

            def get_tensor_name(self, index):
                return self._stored["tensors"][index][0]

            def _tensor(self, name):
                return next(tensor for tensor in self._stored["tensors"] if tensor[0] == name)

            def get_tensor_mode(self, name):
                return TensorIOMode[self._tensor(name)[1]]

            def get_tensor_dtype(self, name):
                return NAMES[self._tensor(name)[2]]

            def get_tensor_shape(self, name):
                return tuple(self._tensor(name)[3])

            def create_engine_inspector(self):
                return Inspector()

            if old:
                def create_execution_context_without_device_memory(self):
                    return self._context()
            else:
                def create_execution_context(self, how):
                    assert how is Strategy.USER_MANAGED or rtx and how._strategy is Strategy.USER_MANAGED
                    return self._context()
            if rtx:
                def create_runtime_config(self):
                    return RuntimeConfig()

            def _context(self):
                script.note("create_context")
                return None if script.failed("create_context") else Context(self)

        class Inspector:
            """As all of them: of an engine of dynamic shapes it tells types only where a context has the shapes."""

            execution_context = None

            def get_engine_information(self, kind):
                of = self.execution_context
                known = of is not None and not of.infer_shapes()
                return json.dumps({"Layers": [{"Name": "one", "Inputs": [
                    {"Format/Datatype": "Row major linear FP16 format" if known else "N/A due to dynamic shapes"}]}]})

        class RuntimeConfig:
            _strategy = None
            dynamic_shapes_kernel_specialization_strategy = cuda_graph_strategy = "default"

            def set_execution_context_allocation_strategy(self, strategy):
                self._strategy = strategy

        class Context:
            def __init__(self, engine):
                self._engine = weakref.ref(engine)
                self._addresses, self._shapes, self._outputs, self._memory = {}, {}, {}, 0
                self._profile = -1 if old and engine._contexts else 0  # 8.6 gives it to the first context alone
                engine._contexts += 1

            if old:
                active_optimization_profile = property(lambda self: self._profile)

                def set_optimization_profile_async(self, index, stream):
                    script.note("set_optimization_profile_async", index, stream)
                    self._profile = -1 if script.failed("set_optimization_profile_async") else index
                    return self._profile == index

                def _set(self, address):
                    script.note("device_memory", address)
                    self._memory = address

                device_memory = property(None, _set)
            else:
                def set_device_memory(self, address, size):
                    script.note("set_device_memory", address, size)
                    assert size >= self._engine()._stored["memory"]
                    self._memory = address

            def set_tensor_address(self, name, address):
                script.note("set_tensor_address", name, address)
                assert self._profile == 0, "a segmentation fault"
                self._addresses[name] = address
                return not script.failed("set_tensor_address")

            def set_input_shape(self, name, shape):
                script.note("set_input_shape", name, tuple(shape))
                self._shapes[name] = tuple(shape)
                return not script.failed("set_input_shape")

            def infer_shapes(self):
                inputs = [t[0] for t in self._engine()._stored["tensors"] if t[1] == "INPUT"]
                return [name for name in inputs if name not in self._shapes]

            def get_tensor_shape(self, name):
                return self._shapes.get(name) or self._outputs.get(name) or self._engine().get_tensor_shape(name)

            if rtx:
                def is_stream_capturable(self, stream):
                    return not script.failed("is_stream_capturable")

            def execute_async_v3(self, stream):
                script.note("execute_async_v3", stream)
                engine = self._engine()
                assert engine is not None and engine._runtime() is not None and engine._logger() is not None
                assert not self.infer_shapes() and (self._memory or not engine._stored["memory"])
                assert {t[0] for t in engine._stored["tensors"]} == set(self._addresses)
                if script.failed("execute_async_v3"):
                    return False
                made = script.compute(engine._stored["graph"], dict(self._addresses), dict(self._shapes))
                self._outputs = made if isinstance(made, dict) else {}
                return True

        Strategy = enum.Enum("Strategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")
        flags = {"EXPLICIT_BATCH": 0} if old else {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1} if has_both else {
            "STRONGLY_TYPED": 1}
        self.module = SimpleNamespace(
            __version__=version, ILogger=ILogger, Runtime=Runtime, TensorIOMode=TensorIOMode, DataType=DataType,
            LayerInformationFormat=LayerInformationFormat,
            NetworkDefinitionCreationFlag=enum.IntEnum("NetworkDefinitionCreationFlag", flags))
        self.classes = {"Runtime": Runtime, "ICudaEngine": Engine, "IExecutionContext": Context}
        if rtx:
            self.classes["IRuntimeConfig"] = RuntimeConfig
        if not old:
            self.module.ExecutionContextAllocationStrategy = Strategy
        if rtx:
            self.module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(
                EAGER="eager", LAZY="lazy", NONE="none")
            self.module.CudaGraphStrategy = SimpleNamespace(DISABLED="disabled")

    def note(self, *call):
        self.calls.append(call)

    def failed(self, name):
        if name in self.fails and self.logger() is not None:
            self.logger().log(SimpleNamespace(name="ERROR"), self.words)
        return name in self.fails

    def names(self):
        return [call[0] for call in self.calls]
