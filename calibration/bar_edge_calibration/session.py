"""How a file runs in ONNX Runtime where it is compared and not measured."""

from __future__ import annotations

import onnxruntime


def cpu_options(threads: int = 1, *, as_written: bool = False) -> onnxruntime.SessionOptions:
    """Return options of a session on so many CPU threads, silent but for errors.

    as_written: every operator of the file runs as it stands there, none is replaced. An INT8 file is then computed in
    float (DequantizeLinear, Conv, QuantizeLinear), which is what it means, whatever integers the processor multiplies.
    """
    options = onnxruntime.SessionOptions()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return options
