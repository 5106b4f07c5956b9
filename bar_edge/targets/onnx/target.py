"""ONNX files for ONNX Runtime."""

from __future__ import annotations

from bar_edge.targets.convert import convert
from bar_edge.targets.row import Forms, Target

ONNX = Target(
    name="onnx",
    files=("model.onnx",),
    precisions=("fp32", "fp16", "int8"),
    convert=convert,
    runtime="onnxruntime-cpu",
    forms={
        "fp32": Forms.of("gather:4", "pointwise:16", "slices:4", "regular:16", "regular"),
        "int8": Forms.of(
            *("pointwise:16", "deferred:4", "deferred:16", "gather:16", "slices:16"),
            *("gather:4", "regular:16", "regular"),
            packings=((2, 2), (1, 2)),
        ),
    },
    recipes=("onnxruntime-cpu", "onnxruntime-amx"),
)
