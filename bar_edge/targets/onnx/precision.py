"""An ONNX file in half precision, for runtimes that take precision from the file (strongly typed TensorRT)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bar_edge.errors import EnvironmentLacks, InputError
from bar_edge.files import write_bytes

Half = Literal["fp16", "bf16"]
ONNX_TYPE = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
#: largest finite value
LARGEST = {"fp16": 65504.0, "bf16": 3.38e38}
#: convolutions take bfloat16 from this opset on, and it came with this IR version
BF16_OPSET, BF16_IR_VERSION = 22, 10
#: operator -> inputs that are float32 whatever the data is
FLOAT_INPUTS = {"Resize": (1, 2), "Upsample": (1,)}


def to_half(onnx_path: Path, out_path: Path, precision: Half) -> None:
    """Write a file that computes in fp16 or bf16; its inputs and outputs stay float32 (Cast nodes at both ends).

    Weights are rounded once, everything between the casts is half. bf16 takes the file to opset 22, which
    TensorRT 10.3 does not read; on a CPU only ONNX's reference implementation computes it. Raises InputError
    if the file is quantised or a weight does not fit into the type.
    """
    half = ONNX_TYPE[precision]
    model = onnx.load(str(onnx_path))
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        raise InputError(
            "a float32 ONNX file", got=f"{onnx_path.name}, which is quantised", remedy="use --precision int8"
        )
    if precision == "bf16":
        model = onnx.version_converter.convert_version(model, BF16_OPSET)
        model.ir_version = BF16_IR_VERSION
    graph = model.graph
    kept = {
        node.input[i]
        for node in graph.node
        for i in FLOAT_INPUTS.get(node.op_type, ())
        if len(node.input) > i and node.input[i]
    }
    for tensor in graph.initializer:
        if tensor.name not in kept:
            _round(tensor, precision)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = half
            elif attribute.type == onnx.AttributeProto.TENSOR and not set(node.output) & kept:
                _round(attribute.t, precision)
    casts_in, casts_out = _cast_ends(graph, half)
    nodes = [*casts_in, *graph.node, *casts_out]
    graph.ClearField("node")
    graph.node.extend(nodes)
    graph.ClearField("value_info")
    onnx.checker.check_model(model, full_check=True)
    write_bytes(out_path, model.SerializeToString(deterministic=True))


def require_native_bf16() -> None:
    """Raise EnvironmentLacks unless OpenVINO computes in bf16 on this CPU: on others it ignores its hint, unsaid."""
    try:
        openvino = importlib.import_module("openvino")
    except ImportError as error:
        required, remedy = "the package openvino, for bf16", 'pip install "bar-edge[openvino]"'
        raise EnvironmentLacks(required, got="none", consequence="nothing was written", remedy=remedy) from error
    found = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in found:
        raise EnvironmentLacks(
            "a CPU that OpenVINO computes bf16 on (AVX512-BF16, AMX)",
            got=f"one with {', '.join(found)}, where the same file would run in fp32",
            consequence="nothing was written",
            remedy="use --precision fp32 or int8, or export on the machine that will run the file",
        )


def _round(tensor: onnx.TensorProto, precision: Half) -> None:
    if tensor.data_type != TensorProto.FLOAT:
        return
    values = numpy_helper.to_array(tensor)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= LARGEST[precision] and np.isfinite(values).all():
        raise InputError(
            f"weights up to {LARGEST[precision]:g} for {precision}",
            got=f"{largest:g} in {tensor.name}",
            consequence="no file was written",
            remedy="use bf16 or fp32",
        )
    rounded = helper.make_tensor(tensor.name, ONNX_TYPE[precision], values.shape, values.flatten())
    tensor.CopyFrom(rounded)


def _cast_ends(graph: onnx.GraphProto, half: int) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """Rename the float32 inputs and outputs inside the graph, and return the casts that join the names."""
    inside = {
        value.name: f"{value.name}_half"
        for value in [*graph.input, *graph.output]
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = inside.get(name, name)

    def cast(source: str, target: str, to: int) -> onnx.NodeProto:
        return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=to)

    casts_in = [cast(v.name, inside[v.name], half) for v in graph.input if v.name in inside]
    casts_out = [cast(inside[v.name], v.name, TensorProto.FLOAT) for v in graph.output if v.name in inside]
    return casts_in, casts_out
