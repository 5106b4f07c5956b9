"""Whether two runs of a network computed the same; needs no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

#: precision -> the largest max|a-b| / max|a| that counts as equal: between torch in float32 and the file, or for int8
#: between what the file means, computed in float, and the same file in a runtime
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2, "int8": 5e-2}


def difference(expected: list[np.ndarray], got: list[np.ndarray]) -> tuple[float, float]:
    """Return max|a-b| and max|a| over all outputs; infinity where a value is not finite or a shape differs."""
    if [a.shape for a in expected] != [b.shape for b in got]:
        return float("inf"), 1.0
    error = max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in zip(expected, got, strict=True))
    scale = max(float(np.abs(a).max()) for a in expected)
    return (error, scale) if np.isfinite(error) and np.isfinite(scale) else (float("inf"), 1.0)


def relative(error: float, scale: float) -> float:
    """Return error / scale, where no error on an output of zeros is none."""
    return 0.0 if error == 0 else error / scale if scale else float("inf")


def cpu_session(path: Path, *, as_written: bool = False) -> onnxruntime.InferenceSession:
    """Open a file in ONNX Runtime on one CPU thread.

    as_written: every operator of the file runs as it stands there, none is replaced. An INT8 file is then computed in
    float (DequantizeLinear, Conv, QuantizeLinear), which is what it means, whatever integers the processor multiplies.
    """
    options = onnxruntime.SessionOptions()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
