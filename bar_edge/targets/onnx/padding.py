"""Paddings as every runtime computes them: circular ones in pieces, zeros in front of a MaxPool as nearly zeros."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

#: the least number above 0 in float16 and in float32 alike
NEARLY_ZERO = 2.0**-24


def without_zeros_before_maxpool(model: onnx.ModelProto) -> None:
    """Let every Pad of zeros that a MaxPool reads pad with 2**-24, in place.

    ONNX Runtime (seen in 1.31.1) merges a Pad of zeros into the MaxPool behind it, which pads with minus infinity:
    wrong wherever a window holds nothing but negative numbers and padding.
    """
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pooled = {node.input[0] for node in graph.node if node.op_type == "MaxPool"}
    for node in graph.node:
        if node.op_type != "Pad" or node.output[0] not in pooled or _mode(node) != "constant":
            continue
        value = constants.get(node.input[2], np.float32(1)) if len(node.input) > 2 and node.input[2] else np.float32(0)
        if not np.any(value):
            name = f"{node.output[0]}/nearly_zero"
            graph.initializer.append(numpy_helper.from_array(np.array(NEARLY_ZERO, np.float32), name))
            inputs = [*node.input, "", ""][:2] + [name] + list(node.input[3:])
            del node.input[:]
            node.input.extend(inputs)


def without_wrap(model: onnx.ModelProto) -> None:
    """Replace every circular Pad of constant width, in place: ends are cut off and joined to the other side."""
    graph, made = model.graph, list[NodeProto]()
    if not any(_mode(node) == "wrap" for node in graph.node if node.op_type == "Pad"):
        return
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    known = onnx.shape_inference.infer_shapes(model).graph
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in [*known.input, *known.value_info]
        if value.type.tensor_type.HasField("shape")
    }
    for node in graph.node:
        constant = len(node.input) > 1 and node.input[1] in constants
        if not (node.op_type == "Pad" and _mode(node) == "wrap" and constant and node.input[0] in ranks):
            made.append(node)
            continue
        rank, pads = ranks[node.input[0]], constants[node.input[1]].tolist()
        axes = constants[node.input[3]].tolist() if len(node.input) > 3 and node.input[3] else range(rank)
        made += _joined(graph, node, dict(zip([int(axis) % rank for axis in axes], _pairs(pads), strict=True)))
    del graph.node[:]
    graph.node.extend(made)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _mode(node: NodeProto) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == "mode"), "constant")


def _pairs(pads: list[int]) -> list[tuple[int, int]]:
    half = len(pads) // 2
    return list(zip(pads[:half], pads[half:], strict=True))


def _joined(graph: onnx.GraphProto, node: NodeProto, widths: dict[int, tuple[int, int]]) -> list[NodeProto]:
    """Return the nodes of a circular Pad: axis by axis, as the corners want it."""
    padded = [(axis, *width) for axis, width in widths.items() if any(width)]
    name, made = node.input[0], list[NodeProto]()
    for i, (axis, before, after) in enumerate(padded):
        out = node.output[0] if i == len(padded) - 1 else f"{node.output[0]}/axis{axis}"
        parts = [name]
        if before:
            parts.insert(0, f"{out}/end")
            made.append(_slice(graph, name, parts[0], axis, -before, np.iinfo(np.int64).max))
        if after:
            parts.append(f"{out}/start")
            made.append(_slice(graph, name, parts[-1], axis, 0, after))
        made.append(helper.make_node("Concat", parts, [out], out, axis=axis))
        name = out
    return made or [helper.make_node("Identity", [name], node.output[:1])]


def _slice(graph: onnx.GraphProto, source: str, out: str, axis: int, start: int, end: int) -> NodeProto:
    names = [f"{out}/{what}" for what in ("starts", "ends", "axes")]
    for name, value in zip(names, (start, end, axis), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    return helper.make_node("Slice", [source, *names], [out], out)
