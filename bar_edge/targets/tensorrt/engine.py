"""A TensorRT engine that `build` made on this machine, run.

A bundle takes it to the device as it is, with the modules that it imports; it needs Python 3.10 and numpy there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from bar_edge.errors import BarEdgeError, EnvironmentLacks, InputError
from bar_edge.targets.tensorrt.bindings import given, import_tensorrt, make, new_log, numbers
from bar_edge.targets.tensorrt.cuda import Buffer, Cuda, Gpu

#: runs of which a layer's time is the median
LAYER_RUNS = 30
REBUILD = "bar-edge export RUN --target trt"


def load(engine_path: Path, onnx_path: Path | None = None) -> Engine:
    """Load an engine that `build` made on this machine, for running it.

    An engine is executable code: it is loaded only if it is the one its manifest names, built from the
    given ONNX file by this TensorRT version for this GPU. Raises InputError if it is another file,
    EnvironmentLacks if it belongs to another machine; both name the command that builds it anew.
    """
    manifest = _read_manifest(engine_path)
    rebuild = f"build it on this machine: {manifest['rebuild']}"
    engine = engine_path.read_bytes()
    if sha256(engine) != manifest["engine"]["sha256"]:
        raise InputError("the engine that its manifest names", got="other bytes", remedy=rebuild)
    if onnx_path is not None and sha256(read_model(onnx_path)) != manifest["onnx"]["sha256"]:
        raise InputError(f"an engine built from {onnx_path.name}", got="one built from another file", remedy=rebuild)
    trt, cuda = import_tensorrt(), Cuda()
    reason = foreign(manifest, trt.__version__, cuda.gpu())
    if reason:
        raise EnvironmentLacks(
            "the TensorRT and GPU that the engine was built with", got=reason, consequence="not loaded", remedy=rebuild
        )
    log = new_log(trt)
    runtime = make(trt.Runtime, log)
    if manifest["options"]["version_compatible"]:
        runtime.engine_host_code_allowed = True
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        raise BarEdgeError("an engine that TensorRT loads", got=log.text(), consequence="not loaded", remedy=rebuild)
    return Engine(trt, runtime, loaded, log, cuda)


def foreign(manifest: dict[str, Any], version: str, gpu: Gpu) -> str:
    """Return why an engine does not belong to this TensorRT version and GPU; empty if it does."""
    options, built = manifest["options"], manifest["gpu"]
    newer = options["version_compatible"] and numbers(version) >= numbers(manifest["tensorrt"])
    if version != manifest["tensorrt"] and not newer:
        return f"TensorRT {version}; the engine was built by {manifest['tensorrt']}"
    same_capability = gpu.compute_capability == built["compute_capability"]
    fits = {
        "none": same_capability and gpu.name == built["name"],
        "same-compute-capability": same_capability,
        "ampere+": numbers(gpu.compute_capability) >= (8, 0),
    }
    if not fits[options["hardware"]]:
        return f"{gpu.name} ({gpu.compute_capability}); built for {built['name']} ({built['compute_capability']})"
    return ""


def manifest_path(engine_path: Path) -> Path:
    """Return where an engine's manifest lies: beside it."""
    return engine_path.with_name(f"{engine_path.name}.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Where one run's time went, in milliseconds; the first three by the GPU's clock."""

    h2d: float
    compute: float
    d2h: float
    #: the host's time to put the computation into the queue; above `compute`, the host is the limit
    enqueue: float
    #: the host's time from the first copy to the last result
    total: float


class Engine:
    """A loaded engine; inputs and outputs are float32 or uint8 arrays on the host, pinned inside.

    inputs, outputs: name -> shape, -1 where free; dtypes: name -> numpy type. Computation runs as a CUDA graph,
    one per set of shapes.
    """

    def __init__(self, trt: Any, runtime: Any, engine: Any, log: Any, cuda: Cuda) -> None:
        self._trt, self._engine, self._log, self._cuda = trt, engine, log, cuda
        self._runtime = runtime  # must outlive the engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        self.inputs = {name: shapes[name] for name in names if modes[name] == trt.TensorIOMode.INPUT}
        self.outputs = {name: shapes[name] for name in names if modes[name] == trt.TensorIOMode.OUTPUT}
        self.dtypes = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        self._context = given(engine.create_execution_context(), log)
        self._shapes: tuple[tuple[int, ...], ...] = ()
        self._buffers: dict[str, Buffer] = {}
        self._graph = 0
        self._events = [cuda.event() for _ in range(4)]
        #: of the last run
        self.timing: Timing | None = None

    def run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Run once on one array per input, in order; returns one array per output, which the next run overwrites."""
        self._bind(arrays)
        cuda, (start, copied, computed, end) = self._cuda, self._events
        for name, array in zip(self.inputs, arrays, strict=True):
            self._buffers[name].host[...] = array
        began = time.perf_counter()
        cuda.mark(start)
        for name in self.inputs:
            cuda.to_device(self._buffers[name])
        cuda.mark(copied)
        queueing = time.perf_counter()
        cuda.launch(self._graph)
        enqueue_ms = (time.perf_counter() - queueing) * 1e3
        cuda.mark(computed)
        for name in self.outputs:
            cuda.to_host(self._buffers[name])
        cuda.mark(end)
        cuda.wait()
        self.timing = Timing(
            h2d=cuda.elapsed_ms(start, copied),
            compute=cuda.elapsed_ms(copied, computed),
            d2h=cuda.elapsed_ms(computed, end),
            enqueue=enqueue_ms,
            total=(time.perf_counter() - began) * 1e3,
        )
        return [self._buffers[name].host for name in self.outputs]

    def layers_ms(self, arrays: list[np.ndarray]) -> dict[str, float]:
        """Return the median time of every layer in ms, by TensorRT's own profile, on one array per input.

        In a context of its own: one with a profiler waits for every layer, and cannot be captured as a graph.
        """
        self.run(arrays)
        times: dict[str, list[float]] = {}

        class Profiler(self._trt.IProfiler):  # type: ignore[misc,name-defined]
            def __init__(self, trt: Any) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times.setdefault(layer_name, []).append(ms)

        context, profiler = given(self._engine.create_execution_context(), self._log), Profiler(self._trt)
        context.profiler = profiler
        for name, shape in zip(self.inputs, self._shapes, strict=True):
            given(context.set_input_shape(name, tuple(shape)), self._log)
        for name, buffer in self._buffers.items():
            given(context.set_tensor_address(name, buffer.device_address), self._log)
        for _ in range(LAYER_RUNS):
            given(context.execute_async_v3(self._cuda.stream), self._log)
            self._cuda.wait()
        return {name: statistics.median(found) for name, found in times.items()}

    def _bind(self, arrays: list[np.ndarray]) -> None:
        """Make buffers and a graph for the arrays' shapes, unless the last run had the same."""
        shapes = tuple(array.shape for array in arrays)
        if shapes == self._shapes:
            return
        context, cuda = self._context, self._cuda
        self._release()
        for (name, declared), array in zip(self.inputs.items(), arrays, strict=True):
            if array.dtype != self.dtypes[name] or not context.set_input_shape(name, tuple(array.shape)):
                raise InputError(
                    f"input {name} of {self.dtypes[name]} and shape {declared} within the engine's batch range",
                    got=f"{array.dtype} {array.shape}",
                    consequence="nothing was run",
                    remedy="build the engine with a batch range that holds it",
                )
        missing = context.infer_shapes()
        if missing:
            raise BarEdgeError("shapes for every tensor", got=f"none for {', '.join(missing)}")
        for name in (*self.inputs, *self.outputs):
            self._buffers[name] = cuda.buffer(tuple(context.get_tensor_shape(name)), self.dtypes[name])
            given(context.set_tensor_address(name, self._buffers[name].device_address), self._log)
        # the first run after new shapes prepares memory, which a graph must not contain
        given(context.execute_async_v3(cuda.stream), self._log)
        cuda.wait()
        cuda.begin_capture()
        given(context.execute_async_v3(cuda.stream), self._log)
        self._graph = cuda.end_capture()
        self._shapes = shapes

    def _release(self) -> None:
        for buffer in self._buffers.values():
            self._cuda.free(buffer)
        if self._graph:
            self._cuda.drop_graph(self._graph)
        self._buffers, self._graph, self._shapes = {}, 0, ()


def _read_manifest(engine_path: Path) -> dict[str, Any]:
    path = manifest_path(engine_path)
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["schema"] != 1 or not engine_path.is_file():
            raise ValueError(f"schema {manifest['schema']}")
        _ = manifest["options"]["version_compatible"], manifest["gpu"]["name"], manifest["rebuild"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"an engine with its manifest {path.name}",
            got=f"{type(error).__name__}: {error}"[:200],
            consequence="not loaded: an engine is executable code",
            remedy=f"build it on this machine: {REBUILD}",
        ) from error
    return manifest


def read_model(path: Path) -> bytes:
    """Return an ONNX file; raises InputError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError("an ONNX file", got=f"{path.name}: {error.strerror}", consequence="no engine") from error


def sha256(data: bytes) -> str:
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()
