"""ONNX files for OpenVINO, which rounds to bf16 by itself."""

from __future__ import annotations

from bar_edge.targets.convert import convert
from bar_edge.targets.onnx.precision import require_native_bf16
from bar_edge.targets.row import Forms, Target

OPENVINO = Target(
    name="openvino",
    files=("model.onnx",),
    precisions=("fp32", "fp16", "bf16", "int8"),
    convert=convert,
    runtime="openvino-cpu",
    forms={
        "fp32": Forms.of(
            *("slices", "pointwise", "slices:4", "pointwise:16", "regular:16", "regular"), packings=((2, 2),)
        ),
        "int8": Forms.of(
            *("zero-filled:32", "zero-filled:16", "pointwise:4-16", "zero-filled:4-16"),
            *("regular:16", "pointwise:16", "slices:16", "regular"),
            packings=((2, 2),),
        ),
        "bf16": Forms.of(
            *("pointwise:16", "pointwise:4-16", "zero-filled:32", "slices:16"),
            *("zero-filled:16", "regular:16", "pointwise:32", "regular"),
            packings=((2, 2),),
        ),
    },
    recipes=("openvino-cpu",),
    hinted=("bf16",),
    needs=lambda precision: require_native_bf16() if precision == "bf16" else None,
)
