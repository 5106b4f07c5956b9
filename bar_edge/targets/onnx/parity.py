"""Whether two runs of a network computed the same; needs no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from bar_edge.bench.runner.inputs import relative as relative
from bar_edge_calibration.session import cpu_options


def difference(expected: list[np.ndarray], got: list[np.ndarray]) -> tuple[float, float]:
    """Return max|a-b| and max|a| over all outputs; infinity where a value is not finite or a shape differs."""
    if [a.shape for a in expected] != [b.shape for b in got]:
        return float("inf"), 1.0
    error = max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in zip(expected, got, strict=True))
    scale = max(float(np.abs(a).max()) for a in expected)
    return (error, scale) if np.isfinite(error) and np.isfinite(scale) else (float("inf"), 1.0)


def cpu_session(path: Path, *, as_written: bool = False) -> onnxruntime.InferenceSession:
    """Open a file in ONNX Runtime on one CPU thread; as_written: as `cpu_options` has it."""
    options = cpu_options(as_written=as_written)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
