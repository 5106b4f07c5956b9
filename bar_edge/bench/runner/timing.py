"""When a file is warm, and how long its runs take beside those of others."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable

#: no measurement has fewer runs per model, however slow, nor more, however fast (enough for a p99.9)
MIN_RUNS, MAX_RUNS = 10, 10_000
#: of several files each runs so often in a row, and the first runs of a row are not timed
BURST, UNTIMED = 6, 2
#: warm-up goes in windows of at least so many runs and seconds, at least two of them ...
WINDOW_RUNS, WINDOW_SECONDS = 5, 0.1
#: ... until the median moves by less than this from one to the next, or time is up
STABLE, WARMUP_SECONDS = 0.05, 2.0


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


def _time(run: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of one run by the clock, and of processor time."""
    cpu_start, start = time.process_time_ns(), time.perf_counter_ns()
    run()
    end, cpu_end = time.perf_counter_ns(), time.process_time_ns()
    return (end - start) / 1e9, (cpu_end - cpu_start) / 1e9
