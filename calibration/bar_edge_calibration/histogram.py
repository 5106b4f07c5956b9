"""Histograms of tensors whose range nobody knows beforehand: bounded, exact to merge."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

#: bins of one histogram; half of them lie below zero
BINS = 4096
_HALF = BINS // 2


@dataclasses.dataclass(kw_only=True, slots=True)
class Histogram:
    """Counts of values in bins of width 2^exponent, with zero on an edge.

    A value outside doubles the width, which joins bins in pairs; so the counts depend neither on the order
    of the values nor on how they were split into parts.
    """

    #: (BINS,) int64; bin i holds [(i - BINS / 2) * width, (i + 1 - BINS / 2) * width)
    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(BINS, np.int64))
    #: of the width; None until a value other than zero came
    exponent: int | None = None
    #: smallest and largest value
    low: float = math.inf
    high: float = -math.inf

    @property
    def edges(self) -> np.ndarray:
        """Return the (BINS + 1,) edges of the bins."""
        return (np.arange(BINS + 1) - _HALF) * 2.0 ** (self.exponent or 0)

    def add(self, values: np.ndarray) -> None:
        """Count float32 values of any shape; raises ValueError unless all are finite."""
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("values that are not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        exponent = _exponent(low, high)
        if exponent is not None:
            self._widen(exponent)
        if self.exponent is None:  # zeros only
            self.counts[_HALF] += values.size
            return
        # a power of two: the product is exact, and so is the bin
        bins = np.floor(values.ravel() * np.float32(2.0**-self.exponent)).astype(np.int32)
        bins += _HALF
        self.counts += np.bincount(bins, minlength=BINS)

    def merge(self, other: Histogram) -> None:
        """Add another histogram's counts, as if its values had been added here."""
        other = dataclasses.replace(other, counts=other.counts.copy())
        if other.exponent is not None:
            self._widen(other.exponent)
        if self.exponent is not None:
            other._widen(self.exponent)
        self.counts += other.counts
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def _widen(self, exponent: int) -> None:
        if self.exponent is not None:
            for _ in range(exponent - self.exponent):
                pairs = self.counts.reshape(_HALF, 2).sum(1)
                self.counts = np.zeros(BINS, np.int64)
                self.counts[_HALF // 2 : _HALF // 2 + _HALF] = pairs
        self.exponent = exponent if self.exponent is None else max(self.exponent, exponent)


def _exponent(low: float, high: float) -> int | None:
    """Return the smallest exponent whose bins hold low and high; None if both are zero."""
    largest = max(abs(low), abs(high))
    if largest == 0:
        return None
    exponent = math.frexp(largest)[1] - int(math.log2(_HALF))
    # the smallest float32 times 2^126 is still exact
    return max(exponent, -126)
