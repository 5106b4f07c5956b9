"""An ONNX file to a TensorRT engine on this machine, and the engine run.

The only module that imports `tensorrt`, and only when asked to. It uses what the bindings of 10.3, 10.16, 11.0 and
11.4 have in common (tests/data/tensorrt_surface.json) and was run against a stand-in generated from them: **not yet
on a real TensorRT**. A bundle takes it to the device as it is, with cuda.py and errors.py; it needs Python 3.10 and
numpy there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bar_edge.errors import BarEdgeError, EnvironmentLacks, InputError
from bar_edge.files import write_bytes, write_json
from bar_edge.targets.tensorrt.cuda import Buffer, Cuda, Gpu

#: majors that this module was written against
MAJORS = (10, 11)
#: runs of which a layer's time is the median
LAYER_RUNS = 30
HARDWARE = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
REBUILD = "bar-edge export RUN --target trt"
#: how TensorRT complains -> what to do; the first that is found counts
REMEDIES = {
    r"[Oo]ut ?[Oo]f ?[Mm]emory|Cuda Runtime \(out of memory\)|insufficient memory": "free memory on the GPU, build for "
    "a smaller largest batch, or set a lower workspace limit",
    r"workspace|memory pool": "allow more workspace, or set no limit",
    r"must have (the )?same (input )?types|[Tt]ype mismatch": "export the ONNX file again: its types must agree "
    "at every node of a strongly typed network",
    r"[Oo]ptimization profile|min.*opt.*max|missing dimensions": "give a batch range smallest <= best <= largest",
    r"DLA": "build without DLA, or with static shapes in fp16 or int8",
    r"Could not find any implementation for node": "set no workspace limit, try another precision or lowering, "
    "or a newer TensorRT",
    r"UNSUPPORTED_NODE|No importer registered|Plugin not found|unsupported": "run bar-edge's TensorRT check on "
    "the file, and export with --lowering slices, zero-filled or regular",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is built."""

    #: smallest, best and largest batch of the engine; what it is fastest at is the middle one
    batch: tuple[int, int, int] = (1, 1, 1)
    #: most scratch memory that a layer may use; 0 sets no limit (TensorRT: all memory of the GPU)
    workspace_mib: int = 0
    #: 0 to 5: how long TensorRT searches
    optimization_level: int = 3
    #: fp32 convolutions may round their inputs to 10 bits of mantissa (faster, error about 1e-3)
    tf32: bool = False
    #: folder of timing caches, one file per TensorRT version and GPU; empty keeps none
    timing_caches: str = ""
    #: the engine loads in newer TensorRT versions too, and may be slower
    version_compatible: bool = False
    #: none: this GPU only; ampere+; same-compute-capability (from 10.9)
    hardware: str = "none"
    #: the DLA core to build for, what it cannot run goes to the GPU; -1 builds for the GPU
    dla_core: int = -1

    def __post_init__(self) -> None:
        low, best, high = self.batch
        if not 1 <= low <= best <= high:
            raise _bad_option("a batch range 1 <= smallest <= best <= largest", f"{self.batch}")
        if self.hardware not in HARDWARE:
            raise _bad_option(f"hardware compatibility: {', '.join(HARDWARE)}", self.hardware)
        if not 0 <= self.optimization_level <= 5 or self.workspace_mib < 0:
            got = f"level {self.optimization_level}, workspace {self.workspace_mib} MiB"
            raise _bad_option("an optimisation level from 0 to 5 and a workspace of 0 or more MiB", got)
        if self.dla_core >= 0 and low != high:
            raise _bad_option("one batch size for DLA, which has no dynamic shapes", f"{self.batch}")


def build(
    onnx_path: Path, engine_path: Path, options: EngineOptions | None = None, *, rebuild: str = REBUILD
) -> dict[str, Any]:
    """Build an engine for the GPU of this machine and return its manifest, which is also written beside it.

    The network is strongly typed: precision is what the file's tensors say. rebuild: the command that a user
    of the engine is told if it does not fit a machine. Raises EnvironmentLacks without TensorRT, GPU or what the
    options ask of them, InputError if TensorRT refuses the file, BarEdgeError if the build fails; the engine's
    path then keeps what it held.
    """
    options, model = options or EngineOptions(), _read(onnx_path)
    trt, gpu = import_tensorrt(), Cuda().gpu()
    log = _new_log(trt)
    builder = _make(trt.Builder, log)
    # required by 10.x, accepted and ignored by 11
    network = _given(builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)), log)
    _parse(trt, network, log, model, onnx_path.name)
    config = _given(builder.create_builder_config(), log)
    _configure(trt, config, options)
    profile = _add_profile(builder, network, config, options, log)
    fallback = _use_dla(trt, builder, network, config, options) if options.dla_core >= 0 else []
    start = time.perf_counter()
    with _timing_cache(config, options, f"{trt.__version__}-{gpu.name}-{gpu.compute_capability}", log):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _build_error(log, network, onnx_path.name)
    engine = bytes(plan)
    manifest = {
        "schema": 1,
        "onnx": {"file": onnx_path.name, "sha256": _sha256(model)},
        "engine": {"file": engine_path.name, "sha256": _sha256(engine), "bytes": len(engine)},
        "tensorrt": trt.__version__,
        "gpu": dataclasses.asdict(gpu),
        "options": {**dataclasses.asdict(options), "batch": list(options.batch)},
        "profile": profile,
        "dla_fallback": fallback,
        "warnings": log.warnings[:20],
        "build_s": round(time.perf_counter() - start, 1),
        "rebuild": rebuild,
    }
    write_bytes(engine_path, engine)
    write_json(manifest_path(engine_path), manifest)
    return manifest


def load(engine_path: Path, onnx_path: Path | None = None) -> Engine:
    """Load an engine that `build` made on this machine, for running it.

    An engine is executable code: it is loaded only if it is the one its manifest names, built from the
    given ONNX file by this TensorRT version for this GPU. Raises InputError if it is another file,
    EnvironmentLacks if it belongs to another machine; both name the command that builds it anew.
    """
    manifest = _read_manifest(engine_path)
    rebuild = f"build it on this machine: {manifest['rebuild']}"
    engine = engine_path.read_bytes()
    if _sha256(engine) != manifest["engine"]["sha256"]:
        raise InputError("the engine that its manifest names", got="other bytes", remedy=rebuild)
    if onnx_path is not None and _sha256(_read(onnx_path)) != manifest["onnx"]["sha256"]:
        raise InputError(f"an engine built from {onnx_path.name}", got="one built from another file", remedy=rebuild)
    trt, cuda = import_tensorrt(), Cuda()
    reason = foreign(manifest, trt.__version__, cuda.gpu())
    if reason:
        raise EnvironmentLacks(
            "the TensorRT and GPU that the engine was built with", got=reason, consequence="not loaded", remedy=rebuild
        )
    log = _new_log(trt)
    runtime = _make(trt.Runtime, log)
    if manifest["options"]["version_compatible"]:
        runtime.engine_host_code_allowed = True
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        raise BarEdgeError("an engine that TensorRT loads", got=log.text(), consequence="not loaded", remedy=rebuild)
    return Engine(trt, runtime, loaded, log, cuda)


def foreign(manifest: dict[str, Any], version: str, gpu: Gpu) -> str:
    """Return why an engine does not belong to this TensorRT version and GPU; empty if it does."""
    options, built = manifest["options"], manifest["gpu"]
    newer = options["version_compatible"] and _numbers(version) >= _numbers(manifest["tensorrt"])
    if version != manifest["tensorrt"] and not newer:
        return f"TensorRT {version}; the engine was built by {manifest['tensorrt']}"
    same_capability = gpu.compute_capability == built["compute_capability"]
    fits = {
        "none": same_capability and gpu.name == built["name"],
        "same-compute-capability": same_capability,
        "ampere+": _numbers(gpu.compute_capability) >= (8, 0),
    }
    if not fits[options["hardware"]]:
        return f"{gpu.name} ({gpu.compute_capability}); built for {built['name']} ({built['compute_capability']})"
    return ""


def manifest_path(engine_path: Path) -> Path:
    """Return where an engine's manifest lies: beside it."""
    return engine_path.with_name(f"{engine_path.name}.json")


def import_tensorrt() -> Any:
    """Import TensorRT's Python bindings; raises EnvironmentLacks if they are missing or of an unknown major."""
    remedy = (
        "on a Jetson: apt install python3-libnvinfer (JetPack has it), elsewhere: pip install tensorrt; "
        "or export --target trt-bundle, which also builds with trtexec"
    )
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:  # OSError: bindings without the libraries
        raise EnvironmentLacks("TensorRT with its Python bindings", got=f"{error}", remedy=remedy) from error
    if _numbers(trt.__version__)[0] not in MAJORS:
        raise EnvironmentLacks("TensorRT 10 or 11", got=trt.__version__, remedy=remedy)
    return trt


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
        self._context = _given(engine.create_execution_context(), log)
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

        context, profiler = _given(self._engine.create_execution_context(), self._log), Profiler(self._trt)
        context.profiler = profiler
        for name, shape in zip(self.inputs, self._shapes, strict=True):
            _given(context.set_input_shape(name, tuple(shape)), self._log)
        for name, buffer in self._buffers.items():
            _given(context.set_tensor_address(name, buffer.device_address), self._log)
        for _ in range(LAYER_RUNS):
            _given(context.execute_async_v3(self._cuda.stream), self._log)
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
            _given(context.set_tensor_address(name, self._buffers[name].device_address), self._log)
        # the first run after new shapes prepares memory, which a graph must not contain
        _given(context.execute_async_v3(cuda.stream), self._log)
        cuda.wait()
        cuda.begin_capture()
        _given(context.execute_async_v3(cuda.stream), self._log)
        self._graph = cuda.end_capture()
        self._shapes = shapes

    def _release(self) -> None:
        for buffer in self._buffers.values():
            self._cuda.free(buffer)
        if self._graph:
            self._cuda.drop_graph(self._graph)
        self._buffers, self._graph, self._shapes = {}, 0, ()


# ------------------------------------------------------------------------------------------ building


def _new_log(trt: Any) -> Any:
    """Make a logger that keeps what TensorRT says instead of printing it."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg.strip())
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(msg.strip())

        def text(self) -> str:
            return " | ".join(dict.fromkeys(self.errors)) or "no reason given"

    return Log()


def _make(kind: Any, log: Any) -> Any:
    """Make a Builder, Runtime or parser; where TensorRT gives none, the bindings raise TypeError."""
    try:
        return kind(log)
    except TypeError as error:
        raise EnvironmentLacks(
            f"a TensorRT {kind.__name__}, which needs a working GPU and driver",
            got=log.text() if log.errors else f"{error}",
            remedy="check nvidia-smi (on a Jetson: tegrastats), and that driver and TensorRT fit together",
        ) from error


def _given(value: Any, log: Any) -> Any:
    """Return what TensorRT returned, unless that is None or False: its failure must not travel."""
    if value is None or value is False:
        raise BarEdgeError("TensorRT to answer", got=log.text(), consequence="nothing was built or run")
    return value


def _parse(trt: Any, network: Any, log: Any, model: bytes, name: str) -> None:
    parser = _make(lambda log: trt.OnnxParser(network, log), log)
    if parser.parse(model):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    found = [f"{e.node_operator()} '{e.node_name()}' (node {e.node()}): {e.code()}: {e.desc()}" for e in errors]
    text = " | ".join(found) or log.text()
    raise InputError(
        f"nodes that TensorRT {trt.__version__} has",
        got=f"{name}: {text}",
        consequence="no engine was built",
        remedy=_remedy(text),
    )


def _configure(trt: Any, config: Any, options: EngineOptions) -> None:
    config.builder_optimization_level = options.optimization_level
    # names and shapes of the layers stay readable in logs and profiles; costs nothing at run time
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware != "none":
        level = getattr(trt.HardwareCompatibilityLevel, HARDWARE[options.hardware], None)
        if level is None:
            raise EnvironmentLacks(
                f"a TensorRT with hardware compatibility {options.hardware}", got=trt.__version__, remedy="use ampere+"
            )
        config.hardware_compatibility_level = level


def _add_profile(builder: Any, network: Any, config: Any, options: EngineOptions, log: Any) -> dict[str, Any]:
    """Give every input whose batch is free the range of the options; returns name -> smallest, best, largest shape."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    profile, shapes = _given(builder.create_optimization_profile(), log), {}
    for tensor in inputs:
        first, *rest = tuple(tensor.shape)
        if -1 in rest:
            raise InputError(
                "inputs whose sizes are fixed, except for the batch",
                got=f"{tensor.name} {(first, *rest)}",
                consequence="no engine was built",
                remedy="export the network for one image size",
            )
        if first != -1 and set(options.batch) != {first}:
            raise InputError(
                f"batch {first}, which the file fixes", got=f"{options.batch}", consequence="no engine was built"
            )
        if first == -1:
            shapes[tensor.name] = [[batch, *rest] for batch in options.batch]
            profile.set_shape(tensor.name, *map(tuple, shapes[tensor.name]))
    if shapes and config.add_optimization_profile(profile) < 0:
        raise BarEdgeError("an optimisation profile that TensorRT accepts", got=log.text())
    return shapes


def _use_dla(trt: Any, builder: Any, network: Any, config: Any, options: EngineOptions) -> list[str]:
    """Build for a DLA core; returns the layers that fall back to the GPU."""
    cores = builder.num_DLA_cores
    if options.dla_core >= cores:
        raise EnvironmentLacks(
            f"DLA core {options.dla_core}",
            got=f"{cores} cores that TensorRT {trt.__version__} can use here",
            consequence="no engine was built",
            remedy="build for the GPU; DLA needs an Orin NX or AGX and TensorRT up to 10.7, or an AGX and 11.4.1",
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = options.dla_core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return [layer.name for layer in layers if not config.can_run_on_DLA(layer)]


@contextlib.contextmanager
def _timing_cache(config: Any, options: EngineOptions, identity: str, log: Any) -> Iterator[None]:
    """Build with the timing cache of this TensorRT version and GPU, and keep what the build added."""
    if not options.timing_caches:
        yield
        return
    path = Path(options.timing_caches) / f"timing-{re.sub(r'[^A-Za-z0-9.]+', '-', identity)}.cache"
    known = path.read_bytes() if path.is_file() else b""
    cache = _given(config.create_timing_cache(known), log)
    if not config.set_timing_cache(cache, False):  # written by another driver or device: begin anew
        cache = _given(config.create_timing_cache(b""), log)
        _given(config.set_timing_cache(cache, False), log)
    yield
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, bytes(_given(cache.serialize(), log)))


def _build_error(log: Any, network: Any, name: str) -> BarEdgeError:
    """Say which layers TensorRT's log names, with operator and shapes, and what to do."""
    text = log.text()
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    whole = r"(?<![\w/])(?<!\w\.){}(?![\w/]|\.\w)"  # /conv1 is not /conv10, nor layer1 in layer1.conv
    named = [layer for layer in layers if re.search(whole.format(re.escape(layer.name)), text)]
    described = "; ".join(_describe(layer) for layer in named[:8])
    return BarEdgeError(
        "an engine for every layer of the network",
        got=f"{name}: {text}" + (f" [{described}]" if described else ""),
        consequence="no engine was built",
        remedy=_remedy(text),
    )


def _describe(layer: Any) -> str:
    def shapes(tensors: list[Any]) -> str:
        return ", ".join("x".join(map(str, tuple(t.shape))) for t in tensors if t is not None)

    inputs = shapes([layer.get_input(i) for i in range(layer.num_inputs)])
    outputs = shapes([layer.get_output(i) for i in range(layer.num_outputs)])
    return f"{layer.type.name} '{layer.name}' {inputs} -> {outputs}"


def _remedy(text: str) -> str:
    found = (remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, text))
    return next(found, "run trtexec --verbose on the ONNX file for the whole log")


# ------------------------------------------------------------------------------------------ files


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


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError("an ONNX file", got=f"{path.name}: {error.strerror}", consequence="no engine") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _numbers(version: str) -> tuple[int, ...]:
    """Return (10, 3, 0) for 10.3.0 and 10.3.0.post1."""
    return tuple(int(n) for n in re.match(r"[\d.]*\d", version).group().split("."))  # type: ignore[union-attr]


def _bad_option(required: str, got: str) -> InputError:
    return InputError(required, got=got, consequence="no engine was built")
