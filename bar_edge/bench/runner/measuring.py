"""One request measured: outputs checked, warm-up, rounds in random order, the environment beside."""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .device import device, state
from .inputs import LEAST_TOLERANCE, check_inputs, parity, random_inputs
from .interference import counters, interference, peak_rss_mb
from .records import Loaded, Problem, Settings
from .runtimes import RUNTIMES
from .telling import doing, library_says, package
from .timing import interleave, warm_up

#: what a latency is bound to: measurements that differ in one of these say nothing about each other's files
IDENTITY = (
    *("cpu", "machine", "cores", "affinity", "governor", "power_mode", "clocks"),
    *("gpu_name", "gpu_driver", "gpu_power_limit"),
    *("runtime", "runtime_version", "precision", "threads", "batch"),
)


class _Model(NamedTuple):
    """A file of a request, ready to run."""

    file: dict[str, Any]
    precision: str
    loaded: Loaded
    #: what is found out about it
    facts: dict[str, Any]


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Check the outputs of the request's files, measure them interleaved in random order, and return what was found.

    Each round runs every file once; the order within a round is drawn anew from the seed.
    """
    package("numpy")
    batch, seed, on_gpu = request["batch"], request["seed"], RUNTIMES[request["runtime"]].gpu
    models = [_loaded(request, file) for file in request["files"]]
    environment = {
        **{name: request[name] for name in ("runtime", "threads", "batch", "seed")},
        "precision": models[0].precision,
        "runtime_version": models[0].loaded.version,
        "interleaved": len(models),
        **device(on_gpu),
    }
    _expect(request.get("expect"), environment)
    runs = [_checked(model, batch, seed) for model in models]
    for model, run in zip(models, runs):
        doing("warming up", model.file)
        model.facts["warmup_runs"], model.facts["warmup_stable"] = warm_up(run)
    conditions = _timed(models, runs, request, on_gpu)
    for model in models:
        if request.get("layers") and model.loaded.layers:
            doing("timing the layers of", model.file)
            model.facts["layers_ms"] = model.loaded.layers(random_inputs(model.loaded, batch, seed))
    return {"models": [model.facts for model in models], "environment": environment, "conditions": conditions}


def _loaded(request: dict[str, Any], file: dict[str, Any]) -> _Model:
    doing("loading", file)
    precision = file.get("precision", request["precision"])
    settings = Settings(
        request["threads"],
        request["batch"],
        precision,
        len(request["files"]) == 1,
        request.get("modules", ""),
        request.get("caches", ""),
    )
    loaded = RUNTIMES[request["runtime"]].load(Path(file["path"]), file["name"], settings)
    check_inputs(loaded, request["batch"])
    return _Model(file, precision, loaded, {"precision": precision, "parity": None})


def _checked(model: _Model, batch: int, seed: int) -> Callable[[], object]:
    """Compare the outputs with those that lie beside the file, if any; returns what runs it on random inputs."""
    doing("checking", model.file)
    if model.file.get("samples"):
        model.facts["parity"] = parity(model.loaded, model.file, batch, LEAST_TOLERANCE[model.precision])
    run = functools.partial(model.loaded.run, random_inputs(model.loaded, batch, seed))
    try:
        run()
    except Exception as error:  # of a native library, which took the file when it loaded it
        got = f"{model.file['name']}: {library_says(error)}"
        raise Problem("InputError", "an ONNX file that runs", got) from error
    return run


def _timed(
    models: list[_Model], runs: list[Callable[[], object]], request: dict[str, Any], on_gpu: bool
) -> dict[str, Any]:
    """Time the files in turn, and return under which conditions."""
    for model in models:
        if model.loaded.parts is not None:
            model.loaded.parts.clear()
    doing("measuring", *(model.file for model in models))
    before, before_state = counters(), state(on_gpu)
    start = time.perf_counter()
    samples, cpu_samples = interleave(runs, request["seconds"] * len(runs), random.Random(request["seed"]))
    others = interference(before, counters(), time.perf_counter() - start)
    after_state = state(on_gpu)
    for model, times, cpu_times in zip(models, samples, cpu_samples):
        model.facts["samples_ms"], model.facts["cpu_samples_ms"] = times, cpu_times
        model.facts["parts_ms"] = _quantiles(model.loaded.parts) if model.loaded.parts else None
        model.facts["layers_ms"] = None
    return {
        "peak_rss_mb": peak_rss_mb(),
        "interference": others,
        "before": before_state,
        "after": after_state,
    }


def _quantiles(parts: list[Any]) -> dict[str, dict[str, float]]:
    """Return the median and the 90th percentile of each part of a run."""
    found = {}
    for part in vars(parts[0]):
        values = [getattr(one, part) for one in parts]
        found[part] = {"p50": statistics.median(values), "p90": statistics.quantiles(values, n=10)[-1]}
    return found


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
