"""Timed runs of an artifact."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Timed runs of one artifact on one device, raw samples kept; percentiles are derived.

    samples_ms: one entry per inference, in order of measurement; environment: runtime and its
    version, threads, device, operating system, whatever the verdict depends on.
    """

    name: str
    samples_ms: tuple[float, ...]
    warmup_runs: int
    batch: int
    environment: dict[str, str | int | float | None]

    def percentile_ms(self, p: float) -> float | None:
        """Return the p-th percentile (nearest rank), or None if too few samples carry it.

        A percentile needs 1/(1 - p/100) samples beyond it tenfold, but at least 64 for p90 and
        662 for p99 (MLPerf's early-stopping floors); the median needs 5.
        """
        needed = 5 if p <= 50 else {90: 64, 99: 662}.get(int(p), math.ceil(10 / (1 - p / 100)))
        if len(self.samples_ms) < needed:
            return None
        ordered = sorted(self.samples_ms)
        return ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)]
