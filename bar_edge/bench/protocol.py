"""One protocol for every latency: separate process, warm-up, raw samples, the environment with the number."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import bar_edge
from bar_edge.bench.runtimes import PRECISIONS, RUNTIMES
from bar_edge.bench.statistics import Comparison, drift, meets
from bar_edge.bench.worker import DOING
from bar_edge.errors import BarEdgeError, EnvironmentLacks, InputError
from bar_edge.records import Budget, Latency, write_json

_ERRORS = {"InputError": InputError, "EnvironmentLacks": EnvironmentLacks}
_SOURCE_ROOT = Path(bar_edge.__path__[0]).resolve().parent


def bench_onnx(
    files: list[Path],
    *,
    runtime: str = "onnxruntime-cpu",
    precision: str = "fp32",
    threads: int = 1,
    batch: int = 1,
    seconds: float = 3.0,
    seed: int = 0,
    timeout_s: float | None = None,
) -> list[Latency]:
    """Measure ONNX files (or artifact folders) on random inputs in a process of its own, one record per file.

    Several files are measured in interleaved rounds, so that `compare` may set them against each other.
    precision: of the arithmetic where the file leaves it open. seconds: of measuring, per file.
    timeout_s: of everything; default two minutes and thrice the measuring.
    Raises InputError for a bad file or an unknown runtime, EnvironmentLacks if the runtime is not installed,
    BarEdgeError if the process dies or does not end.
    """
    if runtime not in RUNTIMES:
        known = ", ".join(RUNTIMES)
        raise InputError(f"a runtime out of: {known}", got=runtime, consequence="nothing was measured")
    if precision not in PRECISIONS[runtime]:
        known = ", ".join(PRECISIONS[runtime])
        raise InputError(
            f"for {runtime} a precision out of: {known}", got=precision, consequence="nothing was measured"
        )
    if not files or threads < 1 or batch < 1 or not seconds > 0:
        got = f"{len(files)} files, threads={threads}, batch={batch}, seconds={seconds:g}"
        raise InputError("a file, and threads, batch and seconds above 0", got=got, consequence="nothing was measured")
    models = [_model_file(path) for path in files]
    request = {
        "files": [str(model.resolve()) for model in models],
        "runtime": runtime,
        "precision": precision,
        "threads": threads,
        "batch": batch,
        "seconds": seconds,
        "seed": seed,
    }
    answer = _ask(request, timeout_s or 120 + 3 * seconds * len(files))
    return [
        Latency(
            name=_name(model),
            samples_ms=tuple(samples),
            warmup_runs=warmup_runs,
            batch=batch,
            environment={**answer["environment"], "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest()},
        )
        for model, samples, warmup_runs in zip(models, answer["samples_ms"], answer["warmup_runs"], strict=True)
    ]


def summary(latency: Latency, *, budget: Budget | None = None, comparison: Comparison | None = None) -> dict[str, Any]:
    """Return a measurement as JSON data (schema 1) without the raw samples.

    A percentile that the samples cannot carry is null; `within` is the verdict against a budget in ms.
    """
    return {
        "schema": 1,
        "name": latency.name,
        "runtime": latency.environment["runtime"],
        "precision": latency.environment["precision"],
        "threads": latency.environment["threads"],
        "batch": latency.batch,
        "runs": len(latency.samples_ms),
        "warmup_runs": latency.warmup_runs,
        "percentiles_ms": {f"p{p}": latency.percentile_ms(p) for p in (50, 90, 99)},
        "min_ms": min(latency.samples_ms),
        "drift": drift(latency),
        "budget": {"text": budget.text, "limit_ms": budget.absolute, "within": meets(latency, budget)}
        if budget
        else None,
        "comparison": dataclasses.asdict(comparison) if comparison else None,
        "environment": latency.environment,
    }


def save_measurement(
    beside: Path, latency: Latency, *, budget: Budget | None = None, comparison: Comparison | None = None
) -> Path:
    """Write summary and raw samples beside a model file (or into an artifact folder) and return the path."""
    folder = _model_file(beside).parent
    environment = latency.environment
    fast = "" if environment["precision"] == "fp32" else f"-{environment['precision']}"
    path = folder / f"bench-{environment['runtime']}{fast}-t{environment['threads']}-b{latency.batch}.json"
    data = {**summary(latency, budget=budget, comparison=comparison), "samples_ms": list(latency.samples_ms)}
    try:
        write_json(path, data)
    except OSError as error:
        raise InputError(
            f"a place to write {path.name}", got=error.strerror or "", consequence="the measurement was not saved"
        ) from error
    return path


def _model_file(path: Path) -> Path:
    model = path / "model.onnx" if path.is_dir() else path
    if not model.is_file():
        raise InputError("an ONNX file or an artifact folder", got=path.name, consequence="nothing was measured")
    return model


def _name(model: Path) -> str:
    """Name an artifact by its folder and any other file by its own name: no path leaves the machine."""
    return model.resolve().parent.name if model.name == "model.onnx" else model.name


def _ask(request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    # the worker must find this very package; site-packages it finds itself, and there it may not precede the
    # standard library, as everything in PYTHONPATH does
    own = [] if str(_SOURCE_ROOT) == sysconfig.get_path("purelib") else [str(_SOURCE_ROOT)]
    search = [*own, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    command = [sys.executable, "-P", "-m", "bar_edge.bench.worker"]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=timeout_s, env=environment
        )
    except subprocess.TimeoutExpired as error:
        doing = _doing(str(error.stderr or b"", "utf-8", "replace"))
        raise _died(f"no answer within {timeout_s:g} s{doing}", "measure fewer seconds, or a smaller batch") from error
    if done.returncode < 0:
        killer = signal.Signals(-done.returncode).name
        raise _died(f"killed by {killer}{_doing(done.stderr)}", "try another runtime or lowering, or a smaller batch")
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise _died(f"exit status {done.returncode}: {last[:300]}", "run it again with --debug") from error
    if "error" in answer:
        fields = answer["error"]
        raise _ERRORS.get(fields.pop("kind"), BarEdgeError)(fields.pop("required"), **fields)
    return answer


def _doing(stderr: str) -> str:
    """Say what the process was at."""
    lines = [line.removeprefix(DOING) for line in stderr.splitlines() if line.startswith(DOING)]
    return f" while {lines[-1]}" if lines else ""


def _died(got: str, remedy: str) -> BarEdgeError:
    return BarEdgeError(
        "a measuring process that ends well", got=got, consequence="nothing was measured", remedy=remedy
    )
