"""What ONNX Runtime makes of a Q/DQ file: does anything between two INT8 convolutions run in float?"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime
from onnx import NodeProto

from bar_edge_calibration.session import cpu_options


def float_islands(path: Path) -> list[str]:
    """Return the operations that ONNX Runtime runs in float on the CPU between two of its INT8 convolutions.

    path: a Q/DQ file. Each is named by operator and first output, in the order of the optimised file.
    """
    graph = optimised(path).graph
    after = _reached([(node, node.input, node.output) for node in graph.node])
    before = _reached([(node, node.output, node.input) for node in reversed(graph.node)])
    constants = {tensor.name for tensor in graph.initializer}
    floats = {value.name for value in graph.input}
    islands = []
    for node in graph.node:
        from_int8 = node.op_type == "DequantizeLinear" and node.input[0] not in constants
        to_int8 = node.op_type == "QuantizeLinear" or node.op_type.startswith("QLinear")
        if from_int8 or (not to_int8 and any(name in floats for name in node.input)):
            floats.update(node.output)
            if node.output[0] in after & before and not from_int8:
                islands.append(f"{node.op_type} {node.output[0]}")
    return islands


def optimised(path: Path) -> onnx.ModelProto:
    """Return the file as ONNX Runtime's CPU provider runs it."""
    with tempfile.TemporaryDirectory() as folder:
        options = cpu_options()
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def _reached(nodes: list[tuple[NodeProto, Sequence[str], Sequence[str]]]) -> set[str]:
    """Return the first outputs of the nodes behind an INT8 convolution; nodes: (node, near ends, far ends)."""
    tensors, found = set[str](), set[str]()
    for node, near, far in nodes:
        reached = any(name in tensors for name in near)
        if reached:
            found.add(node.output[0])
        if reached or node.op_type == "QLinearConv":
            tensors.update(filter(None, far))
    return found
