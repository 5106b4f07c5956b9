"""One protocol for every latency: separate process, outputs checked, warm-up, raw samples, the environment beside."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bar_edge
from bar_edge.bench.packed import packed, packed_runner
from bar_edge.bench.runner.runtimes import RUNTIMES
from bar_edge.bench.runner.telling import DOING
from bar_edge.bench.ssh import Device, Finished, Target
from bar_edge.bench.statistics import Comparison, drift, median_interval, meets
from bar_edge.errors import BarEdgeError, EnvironmentLacks, InputError
from bar_edge.files import file_hash, read_json, write_json
from bar_edge.records import Budget, Latency

_ERRORS = {"InputError": InputError, "EnvironmentLacks": EnvironmentLacks, "BarEdgeError": BarEdgeError}
#: that the building of an engine may take, per file
_BUILD_SECONDS = 1200.0
_NOTHING = "nothing was measured"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measurement(Latency):
    """Timed runs, and what else was seen while they ran."""

    #: processor time of each run, over all threads: what one thread would have taken undisturbed
    cpu_samples_ms: tuple[float, ...] = ()
    #: p50 and p90 of the parts of a run in ms, where the runtime tells them: h2d, compute, d2h, enqueue, total
    parts_ms: dict[str, Any] | None = None
    #: median ms of each layer by its name, where they were asked for and the runtime tells
    layers_ms: dict[str, float] | None = None
    #: error against the outputs that the artifact carries, tolerance, within, n; None for a file without samples
    parity: dict[str, Any] | None = None
    #: whether the time per run had settled when the measuring began
    warmup_stable: bool = True
    #: peak memory of the process in MB, interference by others, the device before and after (see runner/)
    conditions: dict[str, Any] = dataclasses.field(default_factory=dict)


def bench_onnx(
    files: list[Path],
    *,
    runtime: str = "onnxruntime-cpu",
    precision: str | None = None,
    threads: int = 1,
    batch: int = 1,
    seconds: float = 3.0,
    seed: int = 0,
    on: str = "local",
    expect: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    layers: bool = False,
    caches: str = "",
) -> list[Measurement]:
    """Measure ONNX files (or artifact folders) on random inputs in a process of its own, one record per file.

    An artifact's outputs on the samples that it carries are compared first (`parity`). Several files are measured
    in interleaved rounds, so that `compare` may set them against each other.
    precision: of the arithmetic where the file leaves it open; by default an artifact's hint, or fp32. seconds: of
    measuring, per file. on: local, or ssh://[user@]host[:port]. expect: environment of an older measurement that
    this one must resemble. timeout_s: of everything; default two minutes and thrice the measuring. layers: whether
    to time TensorRT's layers one by one too. caches: folder of the timing caches that its engines share; on another
    machine only those of this call do. Raises InputError for a bad file or option, EnvironmentLacks if the device,
    the runtime or the likeness is missing, or the process dies there.
    """
    models = [_model_file(path) for path in files]
    described = [_describe(model, precision) for model in models]
    _check(described, runtime, threads, batch, seconds)
    request = {
        "runtime": runtime,
        "precision": precision or "fp32",
        "threads": threads,
        "batch": batch,
        "seconds": seconds,
        "seed": seed,
        "expect": dict(expect) if expect is not None else None,
        "layers": layers,
        "caches": caches,
    }
    build_s = _BUILD_SECONDS if RUNTIMES[runtime].builds else 0
    limit = timeout_s or 120 + (3 * seconds + build_s) * len(files)
    if on == "local":
        finished = _run_here({**request, "files": described}, limit)
    else:
        finished = _run_there(Target.parse(on), request, described, limit)
    answer = _answer(finished, "" if on == "local" else f" on {on}", limit)
    try:
        _check_answer(answer, request)
        return [measurement(model, found, answer, on) for model, found in zip(models, answer["models"], strict=True)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _died(
            f"an answer that is none: {type(error).__name__}: {error}"[:300], "look what answers there"
        ) from error


def measurement(model: Path, found: dict[str, Any], answer: dict[str, Any], on: str) -> Measurement:
    """Return one model's part of the runner's answer as a record."""
    return Measurement(
        name=_name(model),
        samples_ms=tuple(found["samples_ms"]),
        cpu_samples_ms=tuple(found["cpu_samples_ms"]),
        batch=answer["environment"]["batch"],
        environment={
            "on": on.partition(":")[0],  # not the host's name: it stays here
            **answer["environment"],
            "precision": found["precision"],
            "model_sha256": file_hash(model),
        },
        conditions=answer["conditions"],
        **{name: found[name] for name in ("warmup_runs", "warmup_stable", "parity", "parts_ms", "layers_ms")},
    )


def summary(
    latency: Measurement, *, budget: Budget | None = None, comparison: Comparison | None = None
) -> dict[str, Any]:
    """Return a measurement as JSON data (schema 1) without the raw samples.

    A percentile that the samples cannot carry is null, and so is their median's 95 % confidence interval for
    fewer than six runs; `within` is the verdict against a budget in ms.
    """
    interval = median_interval(latency)
    return {
        "schema": 1,
        "name": latency.name,
        **{key: latency.environment[key] for key in ("on", "runtime", "precision", "threads")},
        "batch": latency.batch,
        "runs": len(latency.samples_ms),
        "warmup_runs": latency.warmup_runs,
        "percentiles_ms": {f"p{p}": latency.percentile_ms(p) for p in (50, 90, 99)},
        "median_interval_ms": dataclasses.asdict(interval) if interval else None,
        "cpu_median_ms": statistics.median(latency.cpu_samples_ms) if latency.cpu_samples_ms else None,
        "min_ms": min(latency.samples_ms),
        "parts_ms": latency.parts_ms,
        "throughput_per_s": 1e3 * latency.batch * len(latency.samples_ms) / sum(latency.samples_ms),
        "drift": drift(latency),
        "budget": {"text": budget.text, "limit_ms": budget.absolute, "within": meets(latency, budget)}
        if budget
        else None,
        "comparison": dataclasses.asdict(comparison) if comparison else None,
        "parity": latency.parity,
        "environment": latency.environment,
        "conditions": latency.conditions,
        "warnings": warnings(latency),
    }


def warnings(latency: Measurement) -> list[str]:
    """Name what speaks against a measurement: wrong outputs, neighbours, drift, throttling, too few runs."""
    others, found = latency.conditions.get("interference", {}), []
    before, after = (latency.conditions.get(when, {}) for when in ("before", "after"))
    if latency.parity is not None and not latency.parity["within"]:
        error, tolerance = latency.parity["error"], latency.parity["tolerance"]
        wrong = "not finite, or of another shape" if error is None else f"off by {error:.1e}, at most {tolerance:g}"
        found.append(f"the outputs are wrong ({wrong}): whatever the latency, this file does not do the work")
    waited, busy, stolen = (others.get(key) or 0 for key in ("waited_for_core", "cores_busy_elsewhere", "cores_stolen"))
    if waited > 0.02 or busy > 0.2 or stolen > 0.02:
        found.append(
            f"disturbed: other processes kept {busy:.2f} cores busy, the hypervisor took {stolen:.2f}, this process "
            f"waited for a core {100 * waited:.0f} % of the time: measure again when the device is quiet"
        )
    if not latency.warmup_stable:
        found.append("the time per run had not settled when the measuring began")
    if abs(drift(latency)) > 0.03:
        found.append(f"the second half of the runs took {100 * drift(latency):+.1f} % more time than the first half")
    if (before.get("cpu_mhz") or 0) > 1.05 * (after.get("cpu_mhz") or float("inf")):
        found.append(f"the clock fell from {before['cpu_mhz']} to {after['cpu_mhz']} MHz")
    if (after.get("throttle_count") or 0) > (before.get("throttle_count") or 0):
        found.append("the processor was throttled for its temperature")
    interval = median_interval(latency)
    if interval is None or interval.high_ms - interval.low_ms > 0.05 * (latency.percentile_ms(50) or 0):
        found.append("the median is known to no better than 5 %: measure longer")
    return found


def save_measurement(
    beside: Path, latency: Measurement, *, budget: Budget | None = None, comparison: Comparison | None = None
) -> Path:
    """Write summary and raw samples beside a model file (or into an artifact folder) and return the path."""
    environment = latency.environment
    words = ["bench", environment["runtime"]]
    words += [] if environment["precision"] == "fp32" else [environment["precision"]]
    words += [f"t{environment['threads']}", f"b{latency.batch}"]
    words += [] if environment["on"] == "local" else [_slug(str(environment["cpu"] or environment["machine"]))]
    path = _model_file(beside).parent / f"{'-'.join(map(str, words))}.json"
    data = {
        **summary(latency, budget=budget, comparison=comparison),
        "samples_ms": latency.samples_ms,
        "cpu_samples_ms": latency.cpu_samples_ms,
    }
    write_json(path, data)
    return path


def load_measurement(path: Path) -> Latency:
    """Read what `save_measurement` wrote; raises InputError for anything else."""
    data = read_json(path)
    try:
        if data["schema"] != 1:
            raise ValueError(f"schema {data['schema']}")
        if not data["samples_ms"] or not all(0 < float(ms) < math.inf for ms in data["samples_ms"]):
            raise ValueError("samples that are no times")
        return Latency(
            name=str(data["name"]),
            samples_ms=tuple(float(ms) for ms in data["samples_ms"]),
            warmup_runs=int(data["warmup_runs"]),
            batch=int(data["batch"]),
            environment=dict(data["environment"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            "a measurement that `bar-edge bench` wrote", got=f"{path.name}: {type(error).__name__}: {error}"
        ) from error


def runtimes_here() -> dict[str, str]:
    """Tell for each runtime whether it runs a tiny network here, each in a process of its own, or why not."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny.onnx"
        model.write_bytes(_tiny_model())
        for runtime in RUNTIMES:
            try:
                (measured,) = bench_onnx([model], runtime=runtime, seconds=0.01)
                found[runtime] = f"works, version {measured.environment['runtime_version']}"
            except BarEdgeError as error:
                found[runtime] = f"needs {error.required}; got: {error.got}" + (
                    f"; remedy: {error.remedy}" if error.remedy else ""
                )
    return found


# ------------------------------------------------------------------------------------------ inside


def _check(files: list[dict[str, Any]], runtime: str, threads: int, batch: int, seconds: float) -> None:
    if runtime not in RUNTIMES:
        raise InputError(f"a runtime out of: {', '.join(RUNTIMES)}", got=runtime, consequence=_NOTHING)
    known = RUNTIMES[runtime].precisions
    others = [file["precision"] for file in files if file["precision"] not in known]
    if others:
        raise InputError(f"for {runtime} a precision out of: {', '.join(known)}", got=others[0], consequence=_NOTHING)
    if not files or threads < 1 or batch < 1 or not seconds > 0:
        got = f"{len(files)} files, threads={threads}, batch={batch}, seconds={seconds:g}"
        raise InputError("a file, and threads, batch and seconds above 0", got=got, consequence=_NOTHING)


def _model_file(path: Path) -> Path:
    model = path / "model.onnx" if path.is_dir() else path
    if not model.is_file():
        raise InputError("an ONNX file or an artifact folder", got=path.name, consequence=_NOTHING)
    return model


def _name(model: Path) -> str:
    """Name an artifact by its folder and any other file by its own name: no path leaves the machine."""
    return model.resolve().parent.name if model.name == "model.onnx" else model.name


def _describe(model: Path, precision: str | None) -> dict[str, Any]:
    """Say to the runner where a model is, and what it must compute if an artifact's samples lie beside it."""
    described: dict[str, Any] = {"name": model.name, "path": str(model.resolve()), "precision": precision or "fp32"}
    samples, manifest = model.with_name("samples.safetensors"), model.with_name("manifest.json")
    if model.name != "model.onnx" or not manifest.is_file():
        return described
    data = read_json(manifest)
    try:
        described["precision"] = precision or data.get("precision_hint") or "fp32"
        described["tolerance"] = float(data["parity"]["tolerance"])
        for side in ("inputs", "outputs"):
            described[side] = [str(value["name"]) for value in data[side]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "a manifest of schema 1", got=f"{type(error).__name__}: {error}", consequence=_NOTHING
        ) from error
    return {**described, "samples": str(samples.resolve())}


def _run_here(request: dict[str, Any], timeout_s: float) -> Finished:
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "runner.pyz"
        archive.write_bytes(packed_runner())
        return _finished([sys.executable, "-P", str(archive)], request, timeout_s)


def _finished(command: list[str], request: dict[str, Any], timeout_s: float) -> Finished:
    try:
        done = subprocess.run(
            command,
            input=json.dumps({**request, "modules": str(Path(bar_edge.__file__).parents[1])}),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        stderr = error.stderr or b""
        said = stderr.decode("utf-8", "replace") if isinstance(stderr, bytes) else stderr
        return Finished(returncode=-signal.SIGKILL, stdout="", stderr=said, timed_out=True)
    return Finished(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)


def _run_there(target: Target, request: dict[str, Any], described: list[dict[str, Any]], timeout_s: float) -> Finished:
    files: dict[str, Path | bytes] = {"runner.pyz": packed_runner()}
    if request["runtime"] == "tensorrt":
        files["build.pyz"] = packed()
    there = []
    request = {**request, "caches": "caches" if request["caches"] else ""}
    for i, file in enumerate(described):
        moved = dict(file)
        for key, suffix in (("path", "onnx"), ("samples", "safetensors")):
            if key in file:
                moved[key] = f"{i}.{suffix}"
                files[moved[key]] = Path(file[key])
        for suffix in (".engine", ".engine.json"):
            beside = Path(file["path"]).with_suffix(suffix)
            if request["runtime"] == "tensorrt" and beside.is_file():
                files[f"{i}{suffix}"] = beside
        there.append(moved)
    files["request.json"] = json.dumps({**request, "files": there, "modules": "build.pyz"}).encode()
    with Device(target) as device:
        device.send(files)
        return device.run(["python", "runner.pyz"], stdin="request.json", timeout_s=timeout_s)


def _answer(finished: Finished, where: str, timeout_s: float) -> dict[str, Any]:
    lines = finished.stderr.splitlines()
    doing = [line.removeprefix(DOING) for line in lines if line.startswith(DOING)]
    at = (f" while {doing[-1]}" if doing else "") + where
    if finished.timed_out:
        raise _died(f"no answer within {timeout_s:g} s{at}", "measure fewer seconds, or a smaller batch")
    if finished.returncode < 0:
        killer = signal.Signals(-finished.returncode).name
        raise _died(f"killed by {killer}{at}", "try another runtime or lowering, or a smaller batch")
    with contextlib.suppress(ValueError, RecursionError):
        answer: dict[str, Any] = json.loads(finished.stdout)
        if not isinstance(answer, dict):
            raise ValueError("no object")
        if "error" not in answer:
            return answer
        raise _said(answer["error"])
    last = [line for line in lines if line.strip() and not line.startswith(DOING)] or ["no output"]
    raise _died(f"exit status {finished.returncode}{at}: {last[-1][:300]}", "run it again with --debug")


def _said(fields: dict[str, Any]) -> BarEdgeError:
    """Return the error that an answer describes; raises ValueError if it describes none."""
    kind = fields.get("kind") if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in _ERRORS:
        raise ValueError("an error of another kind")
    texts = {name: str(fields.get(name, ""))[:2000] for name in ("required", "got", "consequence", "remedy")}
    return _ERRORS[kind](texts.pop("required"), **texts)


def _check_answer(answer: dict[str, Any], request: dict[str, Any]) -> None:
    """Raise ValueError unless an answer is about what was asked, and its times are times: a device is not trusted."""
    for name in ("runtime", "threads", "batch"):
        if answer["environment"][name] != request[name]:
            raise ValueError(f"{name} {answer['environment'][name]!r}"[:100])
    for found in answer["models"]:
        times = [*found["samples_ms"], *found["cpu_samples_ms"]]
        if not found["samples_ms"] or not all(isinstance(ms, float | int) and 0 <= ms < math.inf for ms in times):
            raise ValueError("times that are none")
        if found["parity"] is not None and not isinstance(found["parity"]["within"], bool):
            raise ValueError("a parity that is none")


def _died(got: str, remedy: str) -> EnvironmentLacks:
    return EnvironmentLacks("a measuring process that ends well", got=got, consequence=_NOTHING, remedy=remedy)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _tiny_model() -> bytes:
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", 4)) for name in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["output"])], "tiny", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data
