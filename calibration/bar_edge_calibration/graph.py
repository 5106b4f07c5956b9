"""An ONNX graph with its producers and consumers at hand, and the rewritings that quantisation wants first."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

#: operators that multiply by constant weights
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: operators that only move values: what comes out lies on the grid of what went in
MOVERS = ("Slice", "Split", "Pad", "Gather", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "MaxPool")
#: operators that runtimes have in INT8 besides
ARITHMETIC = ("Add", "Concat", "AveragePool", "GlobalAveragePool")
#: activations that only bound the range: the rounding of the operator before them does that for nothing
BOUNDS = ("Relu", "Clip")


class Graph:
    """A model to be read and rewritten; `model` is a copy of its own."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self._index()

    def _index(self) -> None:
        graph = self.model.graph
        self.constants = {t.name: t for t in graph.initializer}
        self.inputs = [v.name for v in graph.input if v.name not in self.constants]
        self.outputs = {v.name for v in graph.output}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(filter(None, node.input)):
                self.consumers.setdefault(name, []).append(node)

    @property
    def nodes(self) -> list[NodeProto]:
        """Return the operations in the order in which they run."""
        return list(self.model.graph.node)

    def array(self, name: str) -> np.ndarray:
        """Return a constant."""
        return numpy_helper.to_array(self.constants[name])

    def set_array(self, name: str, values: np.ndarray) -> None:
        """Add a constant, or replace its values."""
        if name not in self.constants:
            self.constants[name] = self.model.graph.initializer.add()
        self.constants[name].CopyFrom(numpy_helper.from_array(np.asarray(values, order="C"), name))

    def is_layer(self, node: NodeProto) -> bool:
        """Tell whether a node multiplies by constant weights."""
        return node.op_type in LAYERS and node.input[1] in self.constants

    def bias(self, node: NodeProto) -> str | None:
        """Return the name of a layer's constant bias, if it has one."""
        name = node.input[2] if len(node.input) > 2 else ""
        return name if name in self.constants else None

    def data(self, node: NodeProto) -> list[str]:
        """Return the activations that an operator of the tables above reads."""
        names = node.input if node.op_type in ("Add", "Concat") else node.input[:1]
        return [name for name in names if name not in self.constants]

    def results(self, node: NodeProto) -> list[str]:
        """Return the tensors that an operator of the tables above gives to be rounded."""
        if node.op_type in MOVERS:
            return list(node.output) if node.op_type == "Split" else [node.output[0]]
        return [self.settled(node.output[0])]

    def has_integer_form(self, node: NodeProto) -> bool:
        """Tell whether an operator without weights can run in INT8: all it joins is computed, all it adds is 0."""
        if node.op_type in ("Add", "Concat"):
            return len(self.data(node)) == len(node.input)
        if node.op_type == "Pad" and len(node.input) > 2 and node.input[2]:
            return node.input[2] in self.constants and not self.array(node.input[2]).any()
        return node.op_type in MOVERS or node.op_type in ARITHMETIC

    def settled(self, name: str) -> str:
        """Return the tensor behind the bounds that follow: the one whose range a runtime rounds to."""
        while name not in self.outputs:
            readers = self.consumers.get(name, [])
            if len(readers) != 1 or readers[0].op_type not in BOUNDS:
                break
            name = readers[0].output[0]
        return name

    def replace_nodes(self, nodes: Iterable[NodeProto]) -> None:
        """Put other operations in place of all, and drop the constants that none of them reads."""
        kept = list(nodes)
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)
        used = {name for node in kept for name in node.input} | self.outputs
        constants = [t for t in self.model.graph.initializer if t.name in used]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(constants)
        self._index()


def attribute(node: NodeProto, name: str, default: int) -> int:
    """Return an integer attribute."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def channel_axes(node: NodeProto, weight: np.ndarray) -> tuple[int, int]:
    """Return the axes of a layer's weight along which its output and its input channels lie."""
    if node.op_type == "MatMul":
        return weight.ndim - 1, weight.ndim - 2
    if node.op_type == "ConvTranspose" or (node.op_type == "Gemm" and not attribute(node, "transB", 0)):
        return 1, 0
    return 0, 1


def prepare(model: onnx.ModelProto, *, batchnorm_as_convolution: bool) -> onnx.ModelProto:
    """Return an equal model whose nodes have names of their own, and whose global means are GlobalAveragePool.

    Layers are called as their weights. batchnorm_as_convolution: what BatchNorm is left (in front of a
    pre-activation block it folds into no convolution) becomes a depthwise 1x1 convolution, which has an INT8
    kernel and one exact weight per channel.
    """
    graph, made, taken = Graph(model), list[NodeProto](), set[str]()
    known = onnx.shape_inference.infer_shapes(model).graph.value_info
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in known}
    for number, node in enumerate(graph.nodes):
        node.name = _layer_name(graph, node, taken) or f"{node.op_type}_{number}"
        taken.add(node.name)
        if batchnorm_as_convolution and node.op_type == "BatchNormalization" and ranks.get(node.input[0]) == 4:
            node = _depthwise(graph, node)
        elif node.op_type == "ReduceMean" and ranks.get(node.input[0]) == 4 and _is_global(graph, node):
            node = helper.make_node("GlobalAveragePool", node.input[:1], node.output, node.name)
        made.append(node)
    graph.replace_nodes(made)
    return graph.model


def _layer_name(graph: Graph, node: NodeProto, taken: set[str]) -> str | None:
    """Return the module's name that a layer's weight bears, as far as nobody has it yet."""
    if not graph.is_layer(node):
        return None
    # the exporter's wrapper is no part of the user's network
    name = node.input[1].removesuffix(".weight").removeprefix("network.").removeprefix("body.")
    return name if name not in taken else None


def _depthwise(graph: Graph, node: NodeProto) -> NodeProto:
    gamma, beta, mean, variance = (graph.array(name).astype(np.float64) for name in node.input[1:5])
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    factor = gamma / np.sqrt(variance + epsilon)
    weight, bias = f"{node.output[0]}/factor", f"{node.output[0]}/shift"
    graph.set_array(weight, factor.astype(np.float32).reshape(-1, 1, 1, 1))
    graph.set_array(bias, (beta - mean * factor).astype(np.float32))
    inputs = [node.input[0], weight, bias]
    return helper.make_node("Conv", inputs, node.output[:1], node.name, group=len(factor), kernel_shape=[1, 1])


def _is_global(graph: Graph, node: NodeProto) -> bool:
    if not attribute(node, "keepdims", 1):
        return False
    axes = next((list(a.ints) for a in node.attribute if a.name == "axes"), None)
    if axes is None and len(node.input) > 1 and node.input[1] in graph.constants:
        axes = graph.array(node.input[1]).tolist()
    return axes is not None and sorted(int(a) % 4 for a in axes) == [2, 3]
