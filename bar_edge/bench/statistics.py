"""From timed runs to statements: does it meet the budget, which is faster, did the device drift."""

from __future__ import annotations

import dataclasses

import numpy as np

from bar_edge.errors import InputError
from bar_edge.records import Budget, Latency


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How many times faster one artifact is than another, both measured in interleaved rounds."""

    against: str
    #: median of the other over the median of this one; above 1 this one is faster
    speedup: float
    #: bootstrap 95 % interval of the speedup
    low: float
    high: float


def median_ms(latency: Latency) -> float:
    """Return the median; raises InputError for fewer than five runs."""
    median = latency.percentile_ms(50)
    if median is None:
        raise InputError("at least 5 runs for a median", got=f"{len(latency.samples_ms)}", remedy="measure longer")
    return median


def meets(latency: Latency, budget: Budget) -> bool:
    """Tell whether the median is at most the budget; raises InputError for a budget that is not a time."""
    if budget.metric != "ms" or budget.absolute is None:
        raise InputError("a budget in milliseconds, such as 8ms", got=budget.text, consequence="no verdict")
    return median_ms(latency) <= budget.absolute


def drift(latency: Latency) -> float:
    """Return by which share the median of the second half of the runs exceeds that of the first half."""
    half = len(latency.samples_ms) // 2
    return float(np.median(latency.samples_ms[half:]) / np.median(latency.samples_ms[:half])) - 1


def compare(latency: Latency, other: Latency, *, seed: int = 0, resamples: int = 1000) -> Comparison:
    """Compare two measurements of the same interleaved rounds.

    Whole blocks of consecutive rounds are drawn (moving-block bootstrap, Künsch 1989), because neighbouring
    runs share the machine's mood: single runs would give an interval that is too narrow.
    """
    rounds = len(latency.samples_ms)
    if rounds != len(other.samples_ms):
        raise InputError("two measurements of the same rounds", got=f"{rounds} and {len(other.samples_ms)} runs")
    ours, theirs = np.array(latency.samples_ms), np.array(other.samples_ms)
    block = max(1, round(rounds**0.5))
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(resamples):
        starts = rng.integers(0, rounds - block + 1, -(-rounds // block))
        picked = (starts[:, None] + np.arange(block)).ravel()[:rounds]
        ratios.append(np.median(theirs[picked]) / np.median(ours[picked]))
    low, high = np.percentile(ratios, [2.5, 97.5])
    speedup = median_ms(other) / median_ms(latency)
    return Comparison(against=other.name, speedup=speedup, low=float(low), high=float(high))
