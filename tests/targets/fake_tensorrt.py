"""A stand-in for TensorRT and the CUDA driver: the surface is the real bindings', the arithmetic ONNX Runtime's.

A class offers what tensorrt_surface.json records for the chosen version, and nothing else: another name, a
read-only property set, or arguments that fit no recorded signature fail the test at once. The driver queues what it is
given and runs it when it is waited for, so that a forgotten wait, a wrong address or a use after free shows.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

SURFACE = json.loads(Path(__file__).with_name("tensorrt_surface.json").read_text())
#: milliseconds that the driver's clock advances
H2D_MS, COMPUTE_MS, D2H_MS = 0.25, 4.0, 0.5
#: what the profiler says of a layer: a constant, and a rate per multiplication or per value
LAYER_MS, MULTIPLICATION_MS, VALUE_MS = 2e-3, 1e-9, 1e-7


@dataclasses.dataclass
class World:
    """What the pretended machine is like, and what was asked of it."""

    version: str = "10.3"
    #: answers of the driver
    gpu: str = "Orin"
    compute_capability: tuple[int, int] = (8, 7)
    devices: int = 1
    #: operators that the parser does not know
    unknown: frozenset[str] = frozenset()
    #: what the builder writes into its log before it gives up; empty: it builds
    build_error: str = ""
    warning: str = ""
    dla_cores: int = 0
    #: operators that run on DLA
    dla_operators: frozenset[str] = frozenset({"Conv", "Relu", "Add"})
    broken_driver: bool = False
    #: added to every output: an engine that computes something else
    wrong_by: float = 0.0
    #: notes for the tests
    config: Any = None
    caches: list[bytes] = dataclasses.field(default_factory=list)
    used: set[str] = dataclasses.field(default_factory=set)


# ------------------------------------------------------------------------------------------ the surface


def fits(signature: str, positional: tuple[Any, ...], named: dict[str, Any], known: dict[str, type]) -> bool:
    """Tell whether a call fits one of the recorded signatures."""
    return any(_fits_one(one, positional, named, known) for one in re.split(r" \| (?=\()", signature))


def _fits_one(signature: str, positional: tuple[Any, ...], named: dict[str, Any], known: dict[str, type]) -> bool:
    inside = signature[1 : signature.rindex(") -> ")]
    parameters = [p.split(": ", 1) for p in re.split(r", (?=\w+: )", inside) if p]
    names = [name for name, _ in parameters]
    required = [name for name, kind in parameters if " = " not in kind]
    given = dict(zip(names, positional, strict=False)) | named
    if (
        len(positional) > len(names)
        or not set(named) <= set(names[len(positional) :])
        or not set(required) <= set(given)
    ):
        return False
    kinds = {name: kind.split(" = ")[0] for name, kind in parameters}
    return all(_is(value, kinds[name], known) for name, value in given.items())


def _is(value: Any, kind: str, known: dict[str, type]) -> bool:
    kind = kind.split("::")[-1]
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool | enum.Enum)
    if kind == "Dims":  # the bindings convert sequences
        return isinstance(value, tuple | list) and all(type(v) is int for v in value)
    plain = {"str": str, "bool": bool, "buffer": bytes, "tuple": tuple, "list": list}
    return isinstance(value, plain.get(kind) or known.get(kind, object))


def guarded(world: World, known: dict[str, type]) -> Callable[[type], type]:
    """Restrict a class to the recorded members of its name."""

    def restrict(cls: type) -> type:
        members: dict[str, str] = SURFACE[world.version]["classes"][cls.__name__]

        def check(name: str) -> None:
            if not name.startswith("_"):
                assert name in members, f"TensorRT {world.version}: {cls.__name__} has no {name}"
                world.used.add(f"{cls.__name__}.{name}")

        class Guarded(cls):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                if members.get("__init__"):
                    assert fits(members["__init__"], args, kwargs, known), f"{cls.__name__}{args}"
                super().__init__(*args, **kwargs)

            def __getattribute__(self, name: str) -> Any:
                check(name)
                value = object.__getattribute__(self, name)
                if name.startswith("_") or not callable(value):
                    return value

                def call(*args: Any, **kwargs: Any) -> Any:
                    assert fits(members[name], args, kwargs, known), f"{cls.__name__}.{name}{args}{kwargs}"
                    return value(*args, **kwargs)

                return call

            def __setattr__(self, name: str, value: Any) -> None:
                check(name)
                if not name.startswith("_"):
                    assert members[name] == "settable property", f"{cls.__name__}.{name} cannot be set"
                object.__setattr__(self, name, value)

        Guarded.__name__ = cls.__name__
        known[cls.__name__] = Guarded
        return Guarded

    return restrict


# ------------------------------------------------------------------------------------------ TensorRT


def make_tensorrt(world: World, driver: FakeDriver) -> types.ModuleType:
    """Return a module to stand as `tensorrt`."""
    surface = SURFACE[world.version]
    module = types.ModuleType("tensorrt")
    known: dict[str, type] = {}
    guard = guarded(world, known)
    # the bindings' enums are no integers: only int() makes them so
    plain = {name: enum.Enum(name, {m: v for m, v in members.items()}) for name, members in surface["enums"].items()}
    for kind in plain.values():
        kind.__int__ = lambda self: self.value  # type: ignore[attr-defined]
    layer_types = enum.Enum("LayerType", ["CONVOLUTION", "OTHER"])
    known |= plain
    dtypes = {1: plain["DataType"].FLOAT, 2: plain["DataType"].UINT8, 10: plain["DataType"].HALF}

    class Dims(tuple):  # type: ignore[type-arg]
        pass

    class ILogger:
        Severity = enum.Enum("Severity", surface["severity"])

        def __init__(self) -> None:
            self._ready = True

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError("must be overridden")

    known["ILogger"] = ILogger

    class IProfiler:
        def __init__(self) -> None:
            self._ready = True

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            raise NotImplementedError("must be overridden")

    known["IProfiler"] = IProfiler

    def say(log: Any, severity: str, text: str) -> None:
        log.log(getattr(ILogger.Severity, severity), text)

    @guard
    class ITensor:
        def __init__(self, name: str, shape: tuple[int, ...]) -> None:
            self._fields = name, Dims(shape)

        name = property(lambda self: self._fields[0])
        shape = property(lambda self: self._fields[1])

    @guard
    class ILayer:
        def __init__(self, node: Any, tensors: dict[str, Any]) -> None:
            self._node, self._tensors = node, tensors

        name = property(lambda self: self._node.name)
        type = property(lambda self: layer_types.CONVOLUTION if self._node.op_type == "Conv" else layer_types.OTHER)
        num_inputs = property(lambda self: len(self._node.input))
        num_outputs = property(lambda self: len(self._node.output))

        def get_input(self, index: int) -> Any:
            return self._tensors.get(self._node.input[index])  # None for weights, as in the bindings

        def get_output(self, index: int) -> Any:
            return self._tensors.get(self._node.output[index])

    @guard
    class INetworkDefinition:
        def __init__(self) -> None:
            self._model: Any = None
            self._inputs: list[Any] = []
            self._layers: list[Any] = []

        num_inputs = property(lambda self: len(self._inputs))
        num_layers = property(lambda self: len(self._layers))

        def get_input(self, index: int) -> Any:
            return self._inputs[index]

        def get_layer(self, index: int) -> Any:
            return self._layers[index]

    @guard
    class ParserError:
        def __init__(self, index: int, node: Any) -> None:
            self._index, self._node = index, node

        def node(self) -> int:
            return self._index

        def node_name(self) -> str:
            return str(self._node.name)

        def node_operator(self) -> str:
            return str(self._node.op_type)

        def code(self) -> Any:
            return plain["ErrorCode"].UNSUPPORTED_NODE

        def desc(self) -> str:
            return "Assertion failed: no importer registered for this operator"

    @guard
    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self._network, self._errors = network, []

        num_errors = property(lambda self: len(self._errors))

        def parse(self, model: bytes, path: str | None = None) -> bool:
            proto = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
            graph = proto.graph
            self._errors = [ParserError(i, n) for i, n in enumerate(graph.node) if n.op_type in world.unknown]
            if self._errors:
                return False
            values = [*graph.input, *graph.value_info, *graph.output]
            tensors = {v.name: ITensor(v.name, _shape(v)) for v in values}
            self._network._model = model
            self._network._inputs = [tensors[v.name] for v in graph.input]
            self._network._layers = [ILayer(node, tensors) for node in graph.node]
            return True

        def get_error(self, index: int) -> Any:
            return self._errors[index]

    @guard
    class IOptimizationProfile:
        def __init__(self) -> None:
            self._ranges: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self._ranges[input] = [list(min), list(opt), list(max)]

    @guard
    class ITimingCache:
        def __init__(self, data: bytes) -> None:
            self._data = data

        def serialize(self) -> bytes:
            return self._data + b"|timed"

    @guard
    class IBuilderConfig:
        def __init__(self) -> None:
            self._flags = {plain["BuilderFlag"].TF32}  # the default, documented
            self._profiles: list[Any] = []
            self._pools: dict[str, int] = {}
            world.config = self

        def set_flag(self, flag: Any) -> None:
            self._flags.add(flag)

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(flag)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._pools[pool.name] = pool_size

        def add_optimization_profile(self, profile: Any) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            return ITimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            world.caches.append(cache._data)
            return not cache._data.startswith(b"foreign")

        def can_run_on_DLA(self, layer: Any) -> bool:
            return layer._node.op_type in world.dla_operators

    @guard
    class Builder:
        def __init__(self, logger: Any) -> None:
            assert logger._ready, "ILogger.__init__ was not called"
            if world.broken_driver:
                say(logger, "ERROR", "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._log = logger

        num_DLA_cores = property(lambda self: world.dla_cores)

        def create_network(self, flags: int = 0) -> Any:
            typed = 1 << int(plain["NetworkDefinitionCreationFlag"].STRONGLY_TYPED)
            assert flags == typed, "not a strongly typed network"
            return INetworkDefinition()

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            if world.warning:
                say(self._log, "WARNING", world.warning)
            if world.build_error:
                say(self._log, "ERROR", world.build_error)
                return None
            free = [t.name for t in network._inputs if -1 in t.shape]
            ranges = config._profiles[0]._ranges if config._profiles else {}
            if set(free) != set(ranges):
                say(self._log, "ERROR", "Network has dynamic or shape inputs, but no optimization profile")
                return None
            header = {"version": surface["version"], "capability": world.compute_capability, "ranges": ranges}
            return json.dumps(header).encode() + b"\0" + network._model

    @guard
    class IExecutionContext:
        def __init__(self, engine: Any) -> None:
            self._engine = engine
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._profiler: Any = None

        profiler = property(lambda self: self._profiler, lambda self, value: self._profile(value))

        def _profile(self, profiler: Any) -> None:
            assert profiler._ready, "IProfiler.__init__ was not called"
            object.__setattr__(self, "_profiler", profiler)

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            low, _, high = self._engine._ranges.get(name, [list(self._engine._declared[name])] * 3)
            if len(shape) != len(low) or any(not a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                return False
            self._shapes[name] = tuple(shape)
            return True

        def infer_shapes(self) -> list[str]:
            return [i.name for i in self._engine._session.get_inputs() if i.name not in self._shapes]

        def get_tensor_shape(self, name: str) -> Any:
            if name in self._shapes:
                return Dims(self._shapes[name])
            batch = next(iter(self._shapes.values()))[0]
            return Dims(batch if n == -1 else n for n in self._engine._declared[name])

        def set_tensor_address(self, name: str, memory: int) -> bool:
            assert memory in driver.device_memory, f"{name}: {memory} is not on the device"
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            names = [v.name for v in [*self._engine._session.get_inputs(), *self._engine._session.get_outputs()]]
            if set(names) != set(self._addresses):
                return False
            addresses = dict(self._addresses)
            assert self._profiler is None or driver.captured is None, "a profiler cannot be captured"
            driver.queue(stream_handle, COMPUTE_MS, lambda: self._compute(addresses))
            if self._profiler is not None:
                driver.queue(stream_handle, 0.0, self._report)
            return True

        def _report(self) -> None:
            for name, ms in _layers(self._engine._model):
                self._profiler.report_layer_time(name, ms)

        def _compute(self, addresses: dict[str, int]) -> None:
            session, feed = self._engine._session, {}
            for value in session.get_inputs():
                dtype = np.uint8 if "uint8" in value.type else np.float32
                feed[value.name] = driver.read(addresses[value.name], self._shapes[value.name], dtype)
            for value, result in zip(session.get_outputs(), session.run(None, feed), strict=True):
                driver.write(addresses[value.name], result + np.float32(world.wrong_by))

    @guard
    class ICudaEngine:
        def __init__(self, header: dict[str, Any], model: bytes) -> None:
            proto = onnx.load_from_string(model)
            self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
            self._ranges, self._model = header["ranges"], proto
            values = [*proto.graph.input, *proto.graph.output]
            self._declared = {v.name: Dims(_shape(v)) for v in values}
            self._types = {v.name: dtypes[v.type.tensor_type.elem_type] for v in values}
            self._inputs = {v.name for v in proto.graph.input}

        num_io_tensors = property(lambda self: len(self._declared))

        def get_tensor_name(self, index: int) -> str:
            return list(self._declared)[index]

        def get_tensor_mode(self, name: str) -> Any:
            modes = plain["TensorIOMode"]
            return modes.INPUT if name in self._inputs else modes.OUTPUT

        def get_tensor_shape(self, name: str) -> Any:
            return self._declared[name]

        def get_tensor_dtype(self, name: str) -> Any:
            return self._types[name]

        def create_execution_context(self) -> Any:
            return IExecutionContext(self)

    @guard
    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._log = logger
            self._trusted = False

        engine_host_code_allowed = property(
            lambda self: self._trusted, lambda self, value: object.__setattr__(self, "_trusted", value)
        )

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            text, _, model = serialized_engine.partition(b"\0")
            header = json.loads(text)
            if header["version"] != surface["version"] and not self._trusted:
                say(self._log, "ERROR", "The engine plan file is not compatible with this version of TensorRT")
                return None
            return ICudaEngine(header, model)

    numpy_types = {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8}
    offered = {
        **plain,
        "ILogger": ILogger,
        "IProfiler": IProfiler,
        "Builder": Builder,
        "OnnxParser": OnnxParser,
        "Runtime": Runtime,
        "nptype": lambda kind: numpy_types[kind.name],
    }
    for name, value in offered.items():
        assert name in surface["names"], f"TensorRT {world.version} has no {name}"
        setattr(module, name, value)
    module.__version__ = surface["version"]  # type: ignore[attr-defined]
    return module


def _layers(model: Any) -> list[tuple[str, float]]:
    """Return the layers of an engine: a convolution with the Relu behind it, and all else alone."""
    proto = onnx.shape_inference.infer_shapes(model)
    weights = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    values = [*proto.graph.input, *proto.graph.value_info, *proto.graph.output]
    pixels = {v.name: int(np.prod([d for d in _shape(v)[2:] if d > 0])) for v in values}
    channels = {v.name: int((*_shape(v), 1, 1)[1]) for v in values}
    found: list[tuple[str, float]] = [("Reformatting CopyNode for Input Tensor 0 to " + proto.graph.node[0].name, 1e-3)]
    fused: set[str] = set()
    for node in proto.graph.node:
        readers = [other for other in proto.graph.node if node.output[0] in other.input]
        heavy = node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in weights
        if heavy:
            name, work = node.name, int(np.prod(weights[node.input[1]])) * pixels[node.output[0]]
            if len(readers) == 1 and readers[0].op_type == "Relu":
                name, _ = f"{name} + {readers[0].name}", fused.add(readers[0].name)
            found.append((name, LAYER_MS + MULTIPLICATION_MS * work))
        elif node.name not in fused and node.output[0] in pixels:
            found.append((node.name, VALUE_MS * channels[node.output[0]] * pixels[node.output[0]]))
    return found


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(-1 if d.dim_param else d.dim_value for d in value.type.tensor_type.shape.dim)


# ------------------------------------------------------------------------------------------ the driver


class FakeFunction:
    """A function of a ctypes library: has argtypes and restype, returns an error code."""

    argtypes: Any = None
    restype: Any = None

    def __init__(self, run: Callable[..., int | None]) -> None:
        self.run = run

    def __call__(self, *arguments: Any) -> int:
        assert self.argtypes is not None and len(self.argtypes) == len(arguments), "arguments not as declared"
        return self.run(*(getattr(a, "_obj", a) for a in arguments)) or 0


class FakeDriver:
    """libcuda on the host: a queue, memory on both sides, a clock."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.host_memory: dict[int, Any] = {}
        self.device_memory: dict[int, Any] = {}
        self.queued: list[tuple[float, Callable[[], None]]] = []
        self.captured: list[tuple[float, Callable[[], None]]] | None = None
        self.graphs: dict[int, list[tuple[float, Callable[[], None]]]] = {}
        self.events: dict[int, float] = {}
        self.clock_ms = 0.0
        self.handles = 0
        self.copies = 0

    def __getattr__(self, name: str) -> FakeFunction:
        if not name.startswith("cu"):
            raise AttributeError(name)
        function = FakeFunction(getattr(type(self), f"do_{name}").__get__(self))
        setattr(self, name, function)
        return function

    def queue(self, stream: int, ms: float, work: Callable[[], None]) -> None:
        assert stream, "the default stream"
        (self.queued if self.captured is None else self.captured).append((ms, work))

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        memory = self.device_memory[address]
        return np.frombuffer(memory, dtype, int(np.prod(shape))).reshape(shape).copy()

    def write(self, address: int, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).tobytes()
        assert len(data) == len(self.device_memory[address])
        ctypes.memmove(address, data, len(data))

    def handle(self) -> int:
        self.handles += 1
        return self.handles

    def do_cuInit(self, flags: int) -> int:
        return 0 if self.world.devices else 100

    def do_cuGetErrorName(self, code: int, text: Any) -> None:
        text.value = {100: b"CUDA_ERROR_NO_DEVICE", 2: b"CUDA_ERROR_OUT_OF_MEMORY"}[code]

    def do_cuDriverGetVersion(self, version: Any) -> None:
        version.value = 12060

    def do_cuDeviceGet(self, device: Any, ordinal: int) -> None:
        device.value = ordinal

    def do_cuDeviceGetName(self, name: Any, length: int, device: int) -> None:
        name.value = self.world.gpu.encode()

    def do_cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> None:
        value.value = self.world.compute_capability[attribute - 75]

    def do_cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        context.value = self.handle()

    def do_cuCtxSetCurrent(self, context: int) -> None:
        assert context

    def do_cuStreamCreate(self, stream: Any, flags: int) -> None:
        stream.value = self.handle()

    def _allocate(self, memory: dict[int, Any], result: Any, size: int) -> None:
        buffer = (ctypes.c_byte * size)()
        result.value = ctypes.addressof(buffer)
        memory[result.value] = buffer

    def do_cuMemAlloc_v2(self, pointer: Any, size: int) -> None:
        self._allocate(self.device_memory, pointer, size)

    def do_cuMemAllocHost_v2(self, pointer: Any, size: int) -> None:
        self._allocate(self.host_memory, pointer, size)

    def do_cuMemFree_v2(self, address: int) -> None:
        del self.device_memory[address]

    def do_cuMemFreeHost(self, address: int) -> None:
        del self.host_memory[address]

    def do_cuMemcpyHtoDAsync_v2(self, device: int, host: int, size: int, stream: int) -> None:
        assert size <= len(self.host_memory[host]) and size <= len(self.device_memory[device])
        self.copies += 1
        self.queue(stream, H2D_MS, lambda: ctypes.memmove(device, host, size))  # type: ignore[arg-type, return-value]

    def do_cuMemcpyDtoHAsync_v2(self, host: int, device: int, size: int, stream: int) -> None:
        assert size <= len(self.host_memory[host]) and size <= len(self.device_memory[device])
        self.copies += 1
        self.queue(stream, D2H_MS, lambda: ctypes.memmove(host, device, size))  # type: ignore[arg-type, return-value]

    def do_cuStreamSynchronize(self, stream: int) -> None:
        assert self.captured is None, "waiting while capturing is an error"
        for ms, work in self.queued:
            self.clock_ms += ms
            work()
        self.queued = []

    def do_cuStreamBeginCapture_v2(self, stream: int, mode: int) -> None:
        assert not self.queued, "capturing with work under way"
        self.captured = []

    def do_cuStreamEndCapture(self, stream: int, graph: Any) -> None:
        assert self.captured is not None
        graph.value = self.handle()
        self.graphs[graph.value], self.captured = self.captured, None

    def do_cuGraphInstantiateWithFlags(self, result: Any, graph: int, flags: int) -> None:
        result.value = self.handle()
        self.graphs[result.value] = self.graphs[graph]

    def do_cuGraphLaunch(self, graph: int, stream: int) -> None:
        self.queued += self.graphs[graph]

    def do_cuGraphDestroy(self, graph: int) -> None:
        del self.graphs[graph]

    do_cuGraphExecDestroy = do_cuGraphDestroy

    def do_cuEventCreate(self, event: Any, flags: int) -> None:
        event.value = self.handle()

    def do_cuEventRecord(self, event: int, stream: int) -> None:
        self.queue(stream, 0.0, lambda: self.events.__setitem__(event, self.clock_ms))

    def do_cuEventElapsedTime(self, ms: Any, start: int, end: int) -> None:
        assert not self.queued, "events that have not happened"
        ms.value = self.events[end] - self.events[start]
