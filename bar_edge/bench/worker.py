"""The process that measures: a JSON request on stdin, a JSON answer on stdout; needs numpy and the runtime only."""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bar_edge.bench.environment import environment
from bar_edge.bench.runtimes import RUNTIMES, Loaded, Settings
from bar_edge.errors import BarEdgeError, InputError

#: stderr's last line of this kind tells what the process was at
DOING = "doing: "
#: no measurement has fewer runs per model, however slow, nor more, however fast (enough for a p99.9)
MIN_RUNS, MAX_RUNS = 10, 10_000
#: warm-up goes in windows of at least so many runs and seconds, at least two of them ...
WINDOW_RUNS, WINDOW_SECONDS = 5, 0.1
#: ... until the median moves by less than this from one to the next, or time is up
STABLE, WARMUP_SECONDS = 0.05, 2.0


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Measure the request's files, interleaved in random order, and return samples and environment.

    Each round runs every file once; the order within a round is drawn anew from the seed.
    """
    paths = [Path(text) for text in request["files"]]
    settings = Settings(
        threads=request["threads"], batch=request["batch"], precision=request["precision"], alone=len(paths) == 1
    )
    models = []
    for path in paths:
        _doing("loading", path)
        models.append(RUNTIMES[request["runtime"]](path, settings))
    rng = np.random.default_rng(request["seed"])
    runs = [_bind(model, request["batch"], rng) for model in models]
    warmup_runs = []
    for path, run in zip(paths, runs, strict=True):
        _doing("warming up", path)
        warmup_runs.append(warm_up(run))
    _doing("measuring", *paths)
    samples = interleave(runs, request["seconds"] * len(runs), rng)
    return {
        "warmup_runs": warmup_runs,
        "samples_ms": samples,
        "environment": {
            "runtime": request["runtime"],
            "runtime_version": models[0].version,
            "precision": request["precision"],
            "threads": request["threads"],
            "interleaved": len(paths),
            "seed": request["seed"],
            **environment(),
        },
    }


def _doing(what: str, *paths: Path) -> None:
    """Note for whoever waits what a native library may die of, or hang in."""
    os.write(2, f"\n{DOING}{what} {', '.join(path.name for path in paths)}\n".encode())


def warm_up(run: Callable[[], object]) -> int:
    """Run until the time per run is stable, for at least 0.2 s and 10 runs; returns the number of runs."""
    runs, previous, start = 0, 0.0, time.perf_counter()
    while True:
        window: list[float] = []
        while len(window) < WINDOW_RUNS or sum(window) < WINDOW_SECONDS:
            window.append(_time(run))
        runs += len(window)
        median = statistics.median(window)
        stable = previous and abs(median / previous - 1) < STABLE
        if stable or (previous and time.perf_counter() - start > WARMUP_SECONDS):
            return runs
        previous = median


def interleave(runs: list[Callable[[], object]], seconds: float, rng: np.random.Generator) -> list[list[float]]:
    """Time rounds of one run each, in random order, for `seconds` in all; returns milliseconds per run and round."""
    samples: list[list[float]] = [[] for _ in runs]
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    while len(samples[0]) < MIN_RUNS or (time.perf_counter() - start < seconds and len(samples[0]) < MAX_RUNS):
        for i in rng.permutation(len(runs)):
            samples[i].append(round(_time(runs[i]) * 1e3, 6))
    gc.enable()
    return samples


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e9


def _bind(model: Loaded, batch: int, rng: np.random.Generator) -> Callable[[], object]:
    """Make random inputs by the file's own specification: float32 normal, uint8 uniform."""
    arrays = []
    for dtype, (first, *rest) in model.inputs:
        if isinstance(first, int) and first != batch:
            raise InputError(
                f"batch {first}, which the file fixes", got=f"batch {batch}", remedy=f"use --batch {first}"
            )
        sizes = [size for size in rest if isinstance(size, int)]
        if len(sizes) != len(rest):
            raise InputError(
                "inputs whose sizes are fixed except for the batch", got=f"{rest}", remedy="export it again"
            )
        shape = (batch, *sizes)
        image = rng.integers(0, 256, shape, np.uint8) if dtype == "uint8" else rng.standard_normal(shape, np.float32)
        arrays.append(image)
    return lambda: model.run(arrays)


def main() -> None:
    """Answer one request; a user's mistake is an answer too."""
    # a runtime that prints must not break the JSON: hand it stderr instead of stdout
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        answer: dict[str, Any] = measure(json.load(sys.stdin))
    except BarEdgeError as error:
        fields = {name: getattr(error, name) for name in ("required", "got", "consequence", "remedy")}
        answer = {"error": {"kind": type(error).__name__, **fields}}
    with os.fdopen(answer_fd, "w", encoding="utf-8") as stream:
        json.dump(answer, stream)


if __name__ == "__main__":
    main()
