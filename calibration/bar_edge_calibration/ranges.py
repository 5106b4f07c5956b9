"""From a histogram to the range that eight bits shall cover."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bar_edge.errors import InputError
from bar_edge_calibration.histogram import Histogram

Range = tuple[float, float]
#: share of the values that `percentile` covers
PERCENTILE = 0.9999
#: shares of the whole range that `mse` and `entropy` try
_SHARES = np.linspace(0.1, 1.0, 91)
_LEVELS = 255
#: share of the largest value up to which `entropy` takes a value for zero
_ZERO = 1 / 4096


def minmax(histogram: Histogram) -> Range:
    """Return the smallest and the largest value."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram) -> Range:
    """Return the range that leaves half of 1 - PERCENTILE of the values out on each side."""
    cumulated = np.cumsum(histogram.counts) / histogram.counts.sum()
    outside, edges = (1 - PERCENTILE) / 2, histogram.edges
    low = edges[np.searchsorted(cumulated, outside, side="right")]
    high = edges[np.searchsorted(cumulated, 1 - outside) + 1]
    return _within((float(low), float(high)), histogram)


def mse(histogram: Histogram) -> Range:
    """Return the share of the range that loses least to rounding and clipping together, in squares."""
    counts, centres = _occupied(histogram)

    def loss(low: float, high: float) -> float:
        step = (high - low) / _LEVELS
        clipped = np.clip(centres, low, high)
        # what lies within is rounded to within half a step; evenly spread there
        inside = counts[(centres >= low) & (centres <= high)].sum() * step**2 / 12
        return float(inside + counts @ (centres - clipped) ** 2)

    return _best(histogram, loss)


def entropy(histogram: Histogram) -> Range:
    """Return the share of the range that keeps most of the distribution: least Kullback-Leibler divergence.

    Szymon Migacz, 8-bit Inference with TensorRT (2017), on both sides of zero.
    """
    counts, centres = _occupied(histogram)
    zero = np.abs(centres) < np.abs(centres).max() * _ZERO  # what is zero stays zero in every range
    counts, centres = counts[~zero], centres[~zero]

    def loss(low: float, high: float) -> float:
        clipped = np.clip(centres, low, high)
        inside = (centres >= low) & (centres <= high)
        if not inside.any():
            return np.inf
        levels = np.round((clipped - low) / (high - low) * _LEVELS).astype(np.int64)
        # the reference: outliers on the last bin of their side
        reference = np.where(inside, counts, 0.0)
        reference[inside.argmax()] += counts[centres < low].sum()
        reference[len(inside) - 1 - inside[::-1].argmax()] += counts[centres > high].sum()
        # the quantised: every level spread evenly over the bins that it stands for
        members = np.bincount(levels[inside], minlength=_LEVELS + 1)
        mass = np.bincount(levels[inside], weights=counts[inside], minlength=_LEVELS + 1)
        quantised = mass[levels[inside]] / members[levels[inside]]
        p, q = reference[inside] / reference.sum(), quantised / quantised.sum()
        return float((p * np.log(p / q)).sum())

    return _best(histogram, loss)


#: name -> range of a histogram
METHODS: dict[str, Callable[[Histogram], Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}


def range_of(histogram: Histogram, method: str) -> Range:
    """Return the range by a method's name; raises InputError for an unknown one."""
    if method not in METHODS:
        raise InputError(f"a method out of {', '.join(METHODS)}", got=repr(method), remedy="choose one of these")
    return METHODS[method](histogram)


def _occupied(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    edges, occupied = histogram.edges, histogram.counts > 0
    centres = (edges[:-1] + edges[1:]) / 2
    return histogram.counts[occupied].astype(np.float64), centres[occupied]


def _within(found: Range, histogram: Histogram) -> Range:
    return max(found[0], histogram.low), min(found[1], histogram.high)


def _best(histogram: Histogram, loss: Callable[[float, float], float]) -> Range:
    """Try shares of the whole range on both sides alike, then of each side alone."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if low == high:
        return low, high
    share = min(_SHARES, key=lambda s: loss(s * low, s * high))
    best = (float(share * low), float(share * high))
    if low < 0 < high:
        best = min(((float(s * low), best[1]) for s in _SHARES), key=lambda r: loss(*r))
        best = min(((best[0], float(s * high)) for s in _SHARES), key=lambda r: loss(*r))
    return best
