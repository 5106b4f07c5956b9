"""All runtimes: one line each."""

from __future__ import annotations

from . import on_onnxruntime, on_openvino, on_tensorrt

RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        on_onnxruntime.CPU,
        on_onnxruntime.CUDA,
        on_onnxruntime.TENSORRT,
        on_openvino.CPU,
        on_tensorrt.TENSORRT,
    )
}
