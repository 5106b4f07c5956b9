"""Cross-layer equalisation: channels that differ much in size share one grid badly."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto

from bar_edge_calibration.graph import Graph, attribute, channel_axes

_ROUNDS = 10


def equalise(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Return an equal network whose layers in a row have channels of like size, and how many rows there were.

    Of two layers with nothing but Relu between them, output channel i of the first and input channel i of
    the second get the same largest weight (Nagel et al., Data-Free Quantization, 2019, equation 11).
    """
    graph = Graph(model)
    pairs = [pair for node in graph.nodes if (pair := _follower(graph, node)) is not None]
    for first, second in pairs:  # a constant that others share must not change under them
        for node in (first, second):
            for position in (1, 2):
                if len(node.input) > position and node.input[position]:
                    own = f"{node.output[0]}/{position}"
                    graph.set_array(own, graph.array(node.input[position]))
                    node.input[position] = own
    for _ in range(_ROUNDS):
        for first, second in pairs:
            _balance(graph, first, second)
    graph.replace_nodes(graph.nodes)
    return graph.model, len(pairs)


def _follower(graph: Graph, node: NodeProto) -> tuple[NodeProto, NodeProto] | None:
    name = node.output[0]
    while name not in graph.outputs:
        readers = graph.consumers.get(name, [])
        if len(readers) != 1 or not _equalisable(graph, node):
            return None
        if _equalisable(graph, readers[0]) and readers[0].input[0] == name:
            return node, readers[0]
        if readers[0].op_type != "Relu":
            return None
        name = readers[0].output[0]
    return None


def _equalisable(graph: Graph, node: NodeProto) -> bool:
    if node.op_type != "Conv" or not graph.is_layer(node):
        return False
    inputs_of_group = graph.array(node.input[1]).shape[1]
    return attribute(node, "group", 1) == 1 or inputs_of_group == 1


def _balance(graph: Graph, first: NodeProto, second: NodeProto) -> None:
    one, other = graph.array(first.input[1]), graph.array(second.input[1])
    # a depthwise convolution has its channels on the first axis
    axis = 0 if attribute(second, "group", 1) > 1 else channel_axes(second, other)[1]
    sizes = [np.abs(w).max(tuple(i for i in range(w.ndim) if i != a)) for w, a in ((one, 0), (other, axis))]
    if sizes[0].shape != sizes[1].shape:  # a depthwise convolution that multiplies its channels
        return
    alive = (sizes[0] > 0) & (sizes[1] > 0)
    factor = np.sqrt(np.divide(sizes[1], sizes[0], where=alive, out=np.ones_like(sizes[0])))
    graph.set_array(first.input[1], one * factor.reshape(-1, *[1] * (one.ndim - 1)))
    if bias := graph.bias(first):
        graph.set_array(bias, graph.array(bias) * factor)
    graph.set_array(second.input[1], other / factor.reshape([-1 if i == axis else 1 for i in range(other.ndim)]))
