"""What a manifest says of a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bar_edge.bench import Comparison, Measurement, save_measurement


def parity_of(measured: Measurement) -> dict[str, Any]:
    """Return the error of the outputs in the runtime that was measured."""
    parity = dict(measured.parity or {})
    return {"samples": parity.pop("n"), **parity}


def latency_of(folder: Path, measured: Measurement, comparison: Comparison | None = None) -> dict[str, Any]:
    """Save a measurement beside an artifact, and return its entry."""
    return {
        "p50_ms": measured.percentile_ms(50),
        "parts_p50_ms": {part: times["p50"] for part, times in (measured.parts_ms or {}).items()},
        "batch": measured.batch,
        "file": save_measurement(folder, measured, comparison=comparison).name,
    }
