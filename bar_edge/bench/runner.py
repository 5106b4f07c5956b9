"""Measures model files in a process of its own: a JSON request on stdin, a JSON answer on stdout.

This one file is what runs, on this machine and on a device: Python 3.8, numpy and the runtime, nothing of bar_edge.
"""

from __future__ import annotations

import functools
import gc
import glob
import importlib
import importlib.util
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

#: stderr's last line of this kind tells what the process was at, should a native library die of it
DOING = "doing: "
#: no measurement has fewer runs per model, however slow, nor more, however fast (enough for a p99.9)
MIN_RUNS, MAX_RUNS = 10, 10_000
#: of several files each runs so often in a row, and the first runs of a row are not timed
BURST, UNTIMED = 6, 2
#: warm-up goes in windows of at least so many runs and seconds, at least two of them ...
WINDOW_RUNS, WINDOW_SECONDS = 5, 0.1
#: ... until the median moves by less than this from one to the next, or time is up
STABLE, WARMUP_SECONDS = 0.05, 2.0
#: what a latency is bound to: measurements that differ in one of these say nothing about each other's files
IDENTITY = (
    *("cpu", "machine", "cores", "affinity", "governor", "power_mode", "clocks"),
    *("gpu_name", "gpu_driver", "gpu_power_limit"),
    *("runtime", "runtime_version", "precision", "threads", "batch"),
)

#: of a CPU in low precision, in Linux's words: x86, then Arm
ABILITIES = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "avx512_bf16", "amx_bf16"),
    *("asimddp", "i8mm", "bf16"),
)


class Problem(Exception):
    """What is answered instead of a measurement; kind names a class of bar_edge.errors."""

    def __init__(self, kind: str, required: str, got: str, remedy: str = "") -> None:
        consequence = "nothing was measured"
        self.fields = {"kind": kind, "required": required, "got": got, "consequence": consequence, "remedy": remedy}
        super().__init__(required)


class Settings(NamedTuple):
    """How a file is run."""

    threads: int
    #: inputs per inference
    batch: int
    #: of the arithmetic where the file leaves it open: fp32 or bf16
    precision: str
    #: no other model runs in this process
    alone: bool
    #: where Python finds the modules of bar-edge that build and run an engine, for TensorRT
    modules: str = ""
    #: folder of the timing caches that the building of TensorRT's engines shares; empty for none
    caches: str = ""


class Loaded(NamedTuple):
    """A model file that is ready to run."""

    #: runs once on one array per input and returns the outputs, both in the file's order; the next run may
    #: overwrite what it returned
    run: Callable[[list[Any]], Sequence[Any]]
    #: (numpy dtype, shape) of each input; an axis of free size is a text or None
    inputs: list[tuple[str, list[Any]]]
    version: str
    #: of every run, in order: milliseconds by its parts; None where the runtime does not tell
    parts: list[Any] | None = None
    #: times its layers one by one: inputs -> milliseconds by a layer's name; None where the runtime cannot
    layers: Callable[[list[Any]], dict[str, float]] | None = None


# ---------------------------------------------------------------------------------------- runtimes


def load_onnxruntime_cpu(path: Path, name: str, settings: Settings) -> Loaded:
    """Load an ONNX file in ONNX Runtime on the CPU; operators run one after the other."""
    return _load_onnxruntime(path, name, settings, "CPUExecutionProvider", {})


def load_onnxruntime_cuda(path: Path, name: str, settings: Settings) -> Loaded:
    """Load an ONNX file in ONNX Runtime on an NVIDIA GPU; a run copies the inputs there and the outputs back."""
    return _load_onnxruntime(path, name, settings, "CUDAExecutionProvider", {"use_tf32": "0"})


def load_onnxruntime_tensorrt(path: Path, name: str, settings: Settings) -> Loaded:
    """Load an ONNX file in ONNX Runtime with TensorRT; its engines are kept beside the file.

    What TensorRT does not take runs on the CUDA provider. The cache's folder is named after what is in the file and
    ONNX Runtime's version: the provider itself knows an engine by its file's name only.
    """
    import hashlib

    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # fp32 means fp32; the provider has no option for it
    version = str(package("onnxruntime", "onnxruntime-gpu").__version__)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    cache = str(path.parent / f"engines-{digest}-{version}")
    allowed = [] if settings.precision == "fp32" else [f"trt_{settings.precision}_enable"]
    flags = ("trt_engine_cache_enable", "trt_timing_cache_enable", *allowed)
    options = {"trt_engine_cache_path": cache, "trt_timing_cache_path": cache, **dict.fromkeys(flags, "True")}
    return _load_onnxruntime(path, name, settings, "TensorrtExecutionProvider", options)


def load_tensorrt(path: Path, name: str, settings: Settings) -> Loaded:
    """Load the engine beside an ONNX file, or build one for this batch; a run copies inputs there and outputs back."""
    package("numpy")
    if sys.version_info < (3, 10):
        raise Problem("EnvironmentLacks", "Python 3.10 for TensorRT", f"Python {platform.python_version()}")
    sys.path.insert(0, settings.modules)
    ours, builder = (importlib.import_module(f"bar_edge.targets.tensorrt.{name}") for name in ("engine", "build"))
    engine_path = path.with_suffix(".engine")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if not engine_path.is_file():
                doing("building the engine of", {"name": name})
                engine_path = Path(scratch) / "model.engine"
                options = builder.EngineOptions(batch=(settings.batch,) * 3, timing_caches=settings.caches)
                builder.build(path, engine_path, options)
            engine = ours.load(engine_path, path)
        inputs = [(str(engine.dtypes[n]), [s if s > 0 else None for s in shape]) for n, shape in engine.inputs.items()]
        parts: list[Any] = []
        version = str(package("tensorrt").__version__)
        layers = functools.partial(_layer_times, ours, engine)
        loaded = Loaded(functools.partial(_timed_run, engine, parts), inputs, version, parts, layers)
        loaded.run(random_inputs(loaded, settings.batch, 0))  # says at once whether the engine takes the batch
    except ours.BarEdgeError as error:
        raise _told(error) from error
    return loaded


def _timed_run(engine: Any, parts: list[Any], arrays: list[Any]) -> Sequence[Any]:
    outputs: Sequence[Any] = engine.run(arrays)
    parts.append(engine.timing)
    return outputs


def _told(error: Any) -> Problem:
    """Return one of bar_edge's errors as an answer."""
    return Problem(type(error).__name__, error.required, error.got, error.remedy)


def _layer_times(ours: Any, engine: Any, arrays: list[Any]) -> dict[str, float]:
    try:
        return dict(engine.layers_ms(arrays))
    except ours.BarEdgeError as error:
        raise _told(error) from error


def load_openvino_cpu(path: Path, name: str, settings: Settings) -> Loaded:
    """Load an ONNX file in OpenVINO on the CPU, compiled for one stream and a fixed batch."""
    openvino = package("openvino")
    core = openvino.Core()
    try:
        model = core.read_model(path)
        sizes = [[s.get_length() if s.is_static else None for s in value.partial_shape] for value in model.inputs]
        inputs = [(str(v.element_type.to_dtype()), shape) for v, shape in zip(model.inputs, sizes)]
        # a batch that is left open would have every shape inferred anew at every run
        model.reshape({v: [settings.batch, *shape[1:]] for v, shape in zip(model.inputs, sizes) if shape[0] is None})
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": settings.threads,
                "NUM_STREAMS": 1,
                # it would bind the thread to one core, and wait there for whatever else runs on it
                "ENABLE_CPU_PINNING": False,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[settings.precision],
            },
        )
    except RuntimeError as error:
        raise _refused(name, "OpenVINO", error) from error
    used = str(compiled.get_property("INFERENCE_PRECISION_HINT"))
    if settings.precision == "bf16" and "bfloat16" not in used:  # it ignores the hint where the CPU has no bf16
        raise Problem("EnvironmentLacks", "a CPU that OpenVINO computes bf16 on", f"one where it takes {used}")
    request = compiled.create_infer_request()
    return Loaded(
        run=lambda arrays: request.infer(arrays, share_inputs=True, share_outputs=True).to_tuple(),
        inputs=inputs,
        version=str(openvino.__version__),
    )


def _load_onnxruntime(path: Path, name: str, settings: Settings, provider: str, provider_options: Any) -> Loaded:
    install = "onnxruntime" if provider == "CPUExecutionProvider" else "onnxruntime-gpu"
    onnxruntime = package("onnxruntime", install)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = settings.threads, 1
    options.log_severity_level = 3
    if not settings.alone:  # idle threads of one session would spin on the cores that the other one is measured on
        options.add_session_config_entry("session.force_spinning_stop", "1")
    providers, libraries = [(provider, provider_options)], "CUDA, cuDNN"
    if provider == "TensorrtExecutionProvider":
        providers.append(("CUDAExecutionProvider", {"use_tf32": "0"}))
        libraries += ", TensorRT"
    remedy = f"install {install} with {libraries} of the versions that it names"
    lacks = functools.partial(Problem, "EnvironmentLacks", f"{install} with a GPU that it can use", remedy=remedy)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class
        _, please, advice = str(error).partition("Please install")
        if please:
            raise lacks(got=f"{please}{advice}".strip()[:200]) from error
        raise _refused(name, "ONNX Runtime", error) from error
    if provider not in session.get_providers():  # it warns and falls back to the CPU
        raise lacks(got=f"{', '.join(session.get_providers())} only")
    values, dtypes = session.get_inputs(), {"tensor(float)": "float32", "tensor(uint8)": "uint8"}
    names = [value.name for value in values]
    return Loaded(
        run=lambda arrays: session.run(None, dict(zip(names, arrays))),
        inputs=[(dtypes.get(value.type, value.type), list(value.shape)) for value in values],
        version=str(onnxruntime.__version__),
    )


RUNTIMES: dict[str, Callable[[Path, str, Settings], Loaded]] = {
    "onnxruntime-cpu": load_onnxruntime_cpu,
    "onnxruntime-cuda": load_onnxruntime_cuda,
    "onnxruntime-tensorrt": load_onnxruntime_tensorrt,
    "openvino-cpu": load_openvino_cpu,
    "tensorrt": load_tensorrt,
}
#: what a runtime can compute in where the file leaves it open; bf16 rounds by itself, without calibration. ONNX
#: Runtime's TensorRT must be allowed the types that are in a file of fp16, bf16 or int8.
PRECISIONS = {
    "onnxruntime-cpu": ("fp32",),
    "onnxruntime-cuda": ("fp32",),
    "onnxruntime-tensorrt": ("fp32", "fp16", "bf16", "int8"),
    "openvino-cpu": ("fp32", "bf16"),
    "tensorrt": ("fp32",),
}
#: runtimes that build an engine before the first run, which takes minutes
BUILDERS = ("onnxruntime-tensorrt", "tensorrt")
#: the least tolerance of the outputs: bf16 keeps 8 bits of each number, layer after layer
LEAST_TOLERANCE = {"fp32": 0.0, "fp16": 0.02, "bf16": 0.05, "int8": 0.05}


def package(name: str, install: str = "") -> Any:
    """Import a package that the device must have."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        python = f"Python {platform.python_version()} on {platform.machine()}"
        known = _is_installed(name)
        required = f"{name}, built for {python}" if known else f"the package {name} for {python}"
        raise Problem("EnvironmentLacks", required, str(error)[:300], f"pip install {install or name}") from error


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _refused(name: str, runtime: str, error: Exception) -> Problem:
    return Problem("InputError", f"an ONNX file that {runtime} loads", f"{name}: {str(error).strip()[:200]}")


# --------------------------------------------------------------------------------------- measuring


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Check the outputs of the request's files, measure them interleaved in random order, and return what was found.

    Each round runs every file once; the order within a round is drawn anew from the seed.
    """
    package("numpy")
    files, batch = request["files"], request["batch"]
    alone, on_gpu = len(files) == 1, not request["runtime"].endswith("-cpu")
    precisions = [file.get("precision", request["precision"]) for file in files]
    models: list[Loaded] = []
    found: list[dict[str, Any]] = []
    runs: list[Callable[[], object]] = []
    for file, precision in zip(files, precisions):
        doing("loading", file)
        folders = request.get("modules", ""), request.get("caches", "")
        settings = Settings(request["threads"], batch, precision, alone, *folders)
        models.append(RUNTIMES[request["runtime"]](Path(file["path"]), file["name"], settings))
        _check_inputs(models[-1], batch)
    environment = {
        **{name: request[name] for name in ("runtime", "threads", "batch", "seed")},
        "precision": precisions[0],
        "runtime_version": models[0].version,
        "interleaved": len(files),
        **device(on_gpu),
    }
    _expect(request.get("expect"), environment)
    for file, model, precision in zip(files, models, precisions):
        doing("checking", file)
        right = parity(model, file, batch, LEAST_TOLERANCE[precision]) if file.get("samples") else None
        found.append({"precision": precision, "parity": right})
        runs.append(functools.partial(model.run, random_inputs(model, batch, request["seed"])))
    for file, run, facts in zip(files, runs, found):
        doing("warming up", file)
        facts["warmup_runs"], facts["warmup_stable"] = warm_up(run)
    for model in models:
        if model.parts is not None:
            model.parts.clear()
    doing("measuring", *files)
    before, before_state = _counters(), state(on_gpu)
    start = time.perf_counter()
    samples, cpu_samples = interleave(runs, request["seconds"] * len(runs), random.Random(request["seed"]))
    interference = _interference(before, _counters(), time.perf_counter() - start)
    after_state = state(on_gpu)
    for model, facts, times, cpu_times in zip(models, found, samples, cpu_samples):
        facts["samples_ms"], facts["cpu_samples_ms"] = times, cpu_times
        facts["parts_ms"] = _quantiles(model.parts) if model.parts else None
        facts["layers_ms"] = None
    for file, model, facts in zip(files, models, found):
        if request.get("layers") and model.layers:
            doing("timing the layers of", file)
            facts["layers_ms"] = model.layers(random_inputs(model, batch, request["seed"]))
    return {
        "models": found,
        "environment": environment,
        "conditions": {
            "peak_rss_mb": _peak_rss_mb(),
            "interference": interference,
            "before": before_state,
            "after": after_state,
        },
    }


def _quantiles(parts: list[Any]) -> dict[str, dict[str, float]]:
    """Return the median and the 90th percentile of each part of a run."""
    found = {}
    for part in vars(parts[0]):
        values = [getattr(one, part) for one in parts]
        found[part] = {"p50": statistics.median(values), "p90": statistics.quantiles(values, n=10)[-1]}
    return found


def warm_up(run: Callable[[], object]) -> tuple[int, bool]:
    """Run until the time per run is stable, for at least 0.2 s and 10 runs; returns the runs, and whether it was."""
    runs, previous, start = 0, 0.0, time.perf_counter()
    while True:
        window: list[float] = []
        while len(window) < WINDOW_RUNS or sum(window) < WINDOW_SECONDS:
            window.append(_time(run)[0])
        runs += len(window)
        median = statistics.median(window)
        stable = bool(previous) and abs(median / previous - 1) < STABLE
        if stable or (previous and time.perf_counter() - start > WARMUP_SECONDS):
            return runs, stable
        previous = median


def interleave(
    runs: list[Callable[[], object]], seconds: float, rng: random.Random
) -> tuple[list[list[float]], list[list[float]]]:
    """Time rounds, in random order, for `seconds` in all.

    One file: a run per round. Several: each has a burst of runs per round, the first of which are not timed. After
    another network's run neither caches nor branch predictors know this one: it would look up to 1.7 times slower.
    Returns milliseconds per run and round, by the clock and of processor time. The latter, over all threads, is
    what one thread would have taken had nobody disturbed it.
    """
    samples: list[list[float]] = [[] for _ in runs]
    cpu_samples: list[list[float]] = [[] for _ in runs]
    order = list(range(len(runs)))
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    while len(samples[0]) < MIN_RUNS or (time.perf_counter() - start < seconds and len(samples[0]) < MAX_RUNS):
        rng.shuffle(order)
        for i in order:
            burst = [_time(runs[i]) for _ in range(1 if len(runs) == 1 else BURST)]
            for wall, cpu in burst[UNTIMED:] or burst:
                samples[i].append(round(wall * 1e3, 6))
                cpu_samples[i].append(round(cpu * 1e3, 6))
    gc.enable()
    return samples, cpu_samples


def parity(model: Loaded, file: dict[str, Any], batch: int, least: float) -> dict[str, Any]:
    """Run the file's samples and return max|a-b| / max|a| against the outputs that it carries, with the verdict.

    The last samples are repeated to fill a batch. Not a number, or another shape, is as wrong as can be.
    """
    import numpy as np

    tensors = read_safetensors(Path(file["samples"]))
    inputs, expected = ([tensors[name] for name in file[side]] for side in ("inputs", "outputs"))
    n, error, scale = len(inputs[0]), 0.0, 0.0
    for start in range(0, n, batch):
        rows = [min(start + i, n - 1) for i in range(batch)]
        outputs = model.run([np.ascontiguousarray(array[rows]) for array in inputs])
        for a, b in zip(expected, outputs):
            a, b = a[start : start + batch].astype(np.float64), np.asarray(b)[: n - start]
            same = a.shape == b.shape and np.isfinite(a - b).all()
            error = max(error, float(np.abs(a - b).max())) if same else float("inf")
            scale = max(scale, float(np.abs(a).max()))
    relative = 0.0 if error == 0 else error / scale if scale else float("inf")
    tolerance = max(file["tolerance"], least)
    within = relative <= tolerance
    return {"error": relative if relative < float("inf") else None, "tolerance": tolerance, "within": within, "n": n}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file: 8 bytes of length, a JSON header, raw little-endian buffers."""
    import numpy as np

    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8", "BOOL": "?"}
    try:
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = {name: entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
        return {
            name: np.frombuffer(
                data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]], kind
            ).reshape(entry["shape"])
            for name, entry in header.items()
            for kind in [kinds[entry["dtype"]]]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"{type(error).__name__}: {str(error)[:200]}"
        raise Problem("InputError", "a whole samples.safetensors in the artifact", got, "export it again") from error


def random_inputs(model: Loaded, batch: int, seed: int) -> list[np.ndarray]:
    """Make random inputs by the file's own specification: float32 normal, uint8 uniform."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 256, (batch, *shape[1:]), np.uint8)
        if dtype == "uint8"
        else rng.standard_normal((batch, *shape[1:]), np.float32)
        for dtype, shape in model.inputs
    ]


def doing(what: str, *files: dict[str, Any]) -> None:
    """Note for whoever waits what a native library may die of, or hang in."""
    os.write(2, f"\n{DOING}{what} {', '.join(file['name'] for file in files)}\n".encode("utf-8", "replace"))


def _check_inputs(model: Loaded, batch: int) -> None:
    for dtype, (first, *rest) in model.inputs:
        if dtype not in ("float32", "uint8"):
            raise Problem("InputError", "inputs of float32 or uint8", str(dtype))
        if isinstance(first, int) and first != batch:
            raise Problem(
                "InputError", f"batch {first}, which the file fixes", f"batch {batch}", f"use --batch {first}"
            )
        if not all(isinstance(size, int) for size in rest):
            raise Problem(
                "InputError", "inputs whose sizes are fixed except for the batch", f"{rest}", "export it again"
            )


def _expect(expected: dict[str, Any] | None, environment: dict[str, Any]) -> None:
    """Refuse, before anything is measured, what could not be set against an older measurement."""
    different = [
        f"{name.replace('_', ' ')} {environment.get(name)} here, {expected[name]} there"
        for name in IDENTITY
        if expected is not None and name in expected and expected[name] != environment.get(name)
    ]
    if different:
        raise Problem(
            "EnvironmentLacks",
            "the device, settings and versions of the older measurement",
            "; ".join(different),
            "give the other file itself to --against: both are then measured here, in turn",
        )


def _time(run: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of one run by the clock, and of processor time."""
    cpu_start, start = time.process_time_ns(), time.perf_counter_ns()
    run()
    end, cpu_end = time.perf_counter_ns(), time.process_time_ns()
    return (end - start) / 1e9, (cpu_end - cpu_start) / 1e9


# -------------------------------------------------------------------------------------- the device


def device(with_gpu: bool) -> dict[str, Any]:
    """Describe the device and its settings, without host or user names; None where it does not tell."""
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    clocks = _tool("jetson_clocks", "--show")
    return {
        "cpu": _cpu(),
        "machine": platform.machine(),
        "abilities": _abilities(),
        "cores": os.cpu_count(),
        "affinity": ",".join(map(str, affinity)) if affinity else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "power_mode": _power_mode(),
        # of a Jetson: each cluster's and the GPU's limits, without what they are at the moment
        "clocks": "; ".join(re.findall(r"^(?:cpu\d+|GPU|EMC)\b.*?Max\w*=\d+", clocks, re.MULTILINE)) or None,
        **(_gpu("name", "driver_version", "power.limit") if with_gpu else {}),
        # the numbers of the kernel's release only: the rest may name whoever built or hosts it
        "os": f"{platform.system()} {''.join(re.findall(r'^[0-9.]+', platform.release()))}".strip(),
        "python": platform.python_version(),
    }


def state(with_gpu: bool) -> dict[str, Any]:
    """Read what changes while one measures: load, clocks, temperatures, throttling."""
    khz = _numbers("/sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq")
    mhz = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo") or "", re.MULTILINE)
    millicelsius = _numbers("/sys/class/thermal/thermal_zone*/temp")
    throttled = _numbers("/sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")
    return {
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cpu_mhz": round(statistics.mean(khz) / 1e3 if khz else statistics.mean(map(float, mhz)))
        if khz or mhz
        else None,
        "hottest_c": max(millicelsius) / 1e3 if millicelsius else None,
        "throttle_count": sum(throttled) if throttled else None,
        "tegrastats": _tegrastats(),
        **(_gpu("clocks.sm", "temperature.gpu", "clocks_throttle_reasons.active") if with_gpu else {}),
    }


def _cpu() -> str | None:
    names = re.findall(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    board = (_read("/proc/device-tree/model") or "").strip("\0")  # ARM boards name themselves here
    return board or (names[0].strip() if names else platform.processor()) or None


def _abilities() -> str | None:
    """Return those of ABILITIES that the CPU has, as Linux tells; None where it does not."""
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return " ".join(sorted(set(listed.group(1).split()) & set(ABILITIES))) if listed else None


def overflows(environment: Mapping[str, Any]) -> bool:
    """Tell whether a CPU adds products of INT8 two by two in 16 bits: one of x86 that is known to lack VNNI and AMX."""
    known = environment.get("abilities")
    return (
        known is not None
        and environment["machine"] in ("x86_64", "AMD64", "i686")
        and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(known.split())
    )


def _power_mode() -> str | None:
    jetson = re.search(r"^NV Power Mode:\s*(.+)$", _tool("nvpmodel", "-q"), re.MULTILINE)
    return jetson.group(1).strip() if jetson else _read("/sys/firmware/acpi/platform_profile")


def _tegrastats() -> str | None:
    """Take one line of a Jetson's tegrastats, which itself never ends."""
    program = shutil.which("tegrastats")
    if program is None:
        return None
    process = subprocess.Popen([program, "--interval", "100"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        return process.stdout.readline().decode(errors="replace").strip() or None
    finally:
        process.kill()
        process.communicate()


def _gpu(*fields: str) -> dict[str, str | None]:
    command = ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0")
    values = [value.strip() for value in _tool(*command).split(",")]
    names = ["gpu_" + re.sub(r"_version|[.]gpu", "", field).replace(".", "_") for field in fields]
    return dict(zip(names, values)) if len(values) == len(fields) else dict.fromkeys(names)


def _tool(name: str, *arguments: str) -> str:
    """Return what a program of the device prints, or nothing where it is not there or fails."""
    program = shutil.which(name)
    if program is None:
        return ""
    try:
        return subprocess.check_output([program, *arguments], stderr=subprocess.DEVNULL, timeout=10).decode(
            errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return ""


def _counters() -> dict[str, float | None]:
    """Read what grows: seconds of this process and of the machine, and forced task switches."""
    waited_ns = [int(line.split()[1]) for line in _read_all("/proc/self/task/*/schedstat")]
    forced = re.findall(r"^nonvoluntary_ctxt_switches:\s*(\d+)", "\n".join(_read_all("/proc/self/task/*/status")), re.M)
    ticks = re.findall(r"\d+", (_read("/proc/stat") or "").partition("\n")[0])
    busy = stolen = None
    if len(ticks) >= 8:
        user, nice, system, _, _, irq, softirq, steal = (int(n) / os.sysconf("SC_CLK_TCK") for n in ticks[:8])
        busy, stolen = user + nice + system + irq + softirq, steal
    return {
        "own": time.process_time(),
        "waited": sum(waited_ns) / 1e9 if waited_ns else None,
        "forced": sum(map(int, forced)) if forced else None,
        "busy": busy,
        "stolen": stolen,
    }


def _interference(
    before: dict[str, float | None], after: dict[str, float | None], seconds: float
) -> dict[str, float | None]:
    """Say per second of measuring how much others took; None where the system does not tell."""

    def rate(name: str) -> float | None:
        old, new = before[name], after[name]
        return None if old is None or new is None else round((new - old) / seconds, 4)

    own, busy = rate("own"), rate("busy")
    return {
        # seconds of computing by this process
        "cpu_per_wall": own,
        # seconds that its threads were ready to run and waited for a core
        "waited_for_core": rate("waited"),
        "forced_switches_per_s": rate("forced"),
        # cores that everything else kept busy; the kernel counts in hundredths of a second
        "cores_busy_elsewhere": None if busy is None or own is None else round(max(0.0, busy - own), 2),
        # cores that the hypervisor took away
        "cores_stolen": rate("stolen"),
    }


def _peak_rss_mb() -> float | None:
    peak = re.search(r"^VmHWM:\s*(\d+) kB", _read("/proc/self/status") or "", re.MULTILINE)
    return round(int(peak.group(1)) / 1024, 1) if peak else None


def _numbers(pattern: str) -> list[int]:
    return [int(text) for text in _read_all(pattern) if re.fullmatch(r"-?\d+", text)]


def _read_all(pattern: str) -> list[str]:
    return [text for text in map(_read, glob.glob(pattern)) if text]


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def main() -> None:
    """Answer one request; a user's mistake is an answer too."""
    # a runtime that prints must not break the JSON: hand it stderr instead of stdout
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        answer = measure(json.load(sys.stdin))
    except Problem as problem:
        answer = {"error": problem.fields}
    with os.fdopen(answer_fd, "w", encoding="utf-8") as stream:
        json.dump(answer, stream)


if __name__ == "__main__":
    main()
