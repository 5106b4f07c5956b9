"""From timed runs to statements: how sure the median is, does it meet the budget, which is faster, did it drift."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from bar_edge.errors import InputError
from bar_edge.records import Budget, Latency


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A 95 % confidence interval of the median."""

    low_ms: float
    high_ms: float
    #: blocks of consecutive runs that it rests on; as many as there are runs where these are independent
    blocks: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How many times faster one artifact is than another."""

    against: str
    #: median of the other over the median of this one; above 1 this one is faster
    speedup: float
    #: bootstrap 95 % interval of the speedup
    low: float
    high: float
    #: both were measured in turn, so that what disturbed one disturbed the other
    interleaved: bool


def median_ms(latency: Latency) -> float:
    """Return the median; raises InputError for fewer than five runs."""
    median = latency.percentile_ms(50)
    if median is None:
        raise InputError("at least 5 runs for a median", got=f"{len(latency.samples_ms)}", remedy="measure longer")
    return median


def meets(latency: Latency, budget: Budget) -> bool:
    """Tell whether the median is at most the budget; raises InputError for a budget that is not a time."""
    if not budget.cost.of_device or budget.absolute is None:
        raise InputError("a budget in milliseconds, such as 8ms", got=budget.text, consequence="no verdict")
    return median_ms(latency) <= budget.absolute


def drift(latency: Latency) -> float:
    """Return by which share the median of the second half of the runs exceeds that of the first half."""
    half = len(latency.samples_ms) // 2
    return float(np.median(latency.samples_ms[half:]) / np.median(latency.samples_ms[:half])) - 1


def median_interval(latency: Latency) -> Interval | None:
    """Return the median's 95 % confidence interval by order statistics, or None for fewer than six runs.

    Runs that resemble their neighbours say less than their number: they are then replaced by the medians of at
    least six blocks, as long as the resemblance reaches. Source: David and Nagaraja, Order Statistics, 2003, 7.1.
    """
    if len(latency.samples_ms) < 6:
        return None
    samples = np.array(latency.samples_ms)
    blocks = max(6, _independent_blocks(samples))
    ordered = np.sort([np.median(block) for block in np.array_split(samples, blocks)])
    # the binomial distribution of how many values lie below the median, by its normal approximation
    rank = max(1, math.floor((blocks - 1.96 * blocks**0.5) / 2))
    return Interval(low_ms=float(ordered[rank - 1]), high_ms=float(ordered[blocks - rank]), blocks=blocks)


def compare(latency: Latency, other: Latency, *, seed: int = 0, resamples: int = 1000) -> Comparison:
    """Compare two measurements: of the same interleaved rounds, or of the same settings at another time.

    Whole blocks of consecutive rounds are drawn (moving-block bootstrap, Künsch 1989), because neighbouring
    runs share the machine's mood: single runs would give an interval that is too narrow. What two measurements
    of different times differ in besides the file, their spread cannot tell: read their interval with that in mind.
    """
    interleaved = latency.environment.get("interleaved", 1) != 1
    ours, theirs = np.array(latency.samples_ms), np.array(other.samples_ms)
    if interleaved and len(ours) != len(theirs):
        raise InputError("two measurements of the same rounds", got=f"{len(ours)} and {len(theirs)} runs")
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(resamples):
        picked = _blocks(len(ours), rng)
        others = picked if interleaved else _blocks(len(theirs), rng)
        ratios.append(np.median(theirs[others]) / np.median(ours[picked]))
    low, high = np.percentile(ratios, [2.5, 97.5])
    speedup = median_ms(other) / median_ms(latency)
    return Comparison(against=other.name, speedup=speedup, low=float(low), high=float(high), interleaved=interleaved)


def _blocks(runs: int, rng: np.random.Generator) -> np.ndarray:
    block = max(1, round(runs**0.5))
    starts = rng.integers(0, runs - block + 1, -(-runs // block))
    picked: np.ndarray = (starts[:, None] + np.arange(block)).ravel()[:runs]
    return picked


def _independent_blocks(samples: np.ndarray) -> int:
    """Return into how many blocks the runs fall that know nothing of each other.

    Judged by the signs about the median, which no outlier moves: blocks are twice as long as neighbours
    resemble each other significantly.
    """
    runs, signs = len(samples), np.sign(samples - np.median(samples))
    variance = float(signs @ signs) or 1.0
    reach = 0
    while reach < runs // 2 and float(signs[reach + 1 :] @ signs[: -reach - 1]) / variance > 2 / runs**0.5:
        reach += 1
    return runs if reach == 0 else runs // (2 * reach)
