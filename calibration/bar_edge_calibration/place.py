"""Q/DQ pairs where a runtime fuses them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import NodeProto, helper

from bar_edge_calibration.graph import BOUNDS, MOVERS, Graph, attribute, channel_axes
from bar_edge_calibration.ranges import Range
from bar_edge_calibration.recipe import Recipe

#: weights of a convolution that is large, in 1x1 convolutions twice as many: from here on a matrix product is faster in
#: ONNX Runtime with AMX
LARGE = 1 << 13
#: bits of weights -> the largest integer
LARGEST_WEIGHT = {7: 64, 8: 127}
#: a bias that changes nothing, but that no runtime takes for 0 and removes
NO_BIAS = 1e-30
#: a bias keeps below half of what int32 holds
_BIAS_LIMIT = 2.0**30


def place(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    recipe: Recipe,
    *,
    float_layers: frozenset[str] = frozenset(),
    means: Mapping[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """Return a prepared model with Q/DQ pairs on activations and integer weights, by the recipe.

    ranges: of every tensor in `observed(model)`; float_layers: names of layers that stay in float;
    means: per channel of what layers read: biases then make up for what the rounding of weights adds on
    average (Nagel et al., Data-Free Quantization, 2019, section 4.2).
    """
    return _Placer(Graph(model), ranges, recipe, float_layers, means or {}).run()


def observed(model: onnx.ModelProto) -> list[str]:
    """Return the activations whose ranges a placement can need, in the order of the file."""
    graph = Graph(model)
    nodes, tensors = _on_grid(graph, {n.name for n in graph.nodes if graph.is_layer(n)}, everywhere=True)
    moved = {name for node in nodes if node.op_type in MOVERS for name in graph.results(node)}
    names = [*graph.inputs, *(name for node in graph.nodes for name in node.output)]
    return [name for name in names if name in tensors - moved]


def _on_grid(graph: Graph, layers: set[str], everywhere: bool) -> tuple[list[NodeProto], set[str]]:
    """Return the nodes that run in INT8, and the tensors that must be rounded for them."""
    nodes, tensors = [], set[str]()
    for node in graph.nodes:
        data = graph.data(node)
        between = everywhere and graph.has_integer_form(node) and any(name in tensors for name in data)
        if node.name not in layers and not between:
            continue
        nodes.append(node)
        tensors.update(data)
        if everywhere:
            tensors.update(name for name in graph.results(node) if name not in graph.outputs)
    return nodes, tensors


class _Placer:
    def __init__(
        self,
        graph: Graph,
        ranges: Mapping[str, Range],
        recipe: Recipe,
        float_layers: frozenset[str],
        means: Mapping[str, np.ndarray],
    ) -> None:
        self.graph, self.ranges, self.recipe, self.means = graph, ranges, recipe, means
        layers = {node.name for node in graph.nodes if graph.is_layer(node)}
        assert float_layers <= layers, f"no layers: {sorted(float_layers - layers)}"
        self.layers, self.float_layers = layers - float_layers, float_layers
        self.nodes, self.tensors = _on_grid(graph, self.layers, recipe.pairs == "everywhere")
        uint8 = recipe.activations == "uint8"
        self.padded = [n for n in self.nodes if uint8 and n.op_type == "Pad" and n.output[0] in self.tensors]
        self.parent: dict[str, str] = {}

    def run(self) -> onnx.ModelProto:
        for node in self.nodes:
            self._unite(node)
        self.grids = self._grids()
        made: list[NodeProto] = []
        for name in self.graph.inputs:
            made += self._pair(name)
        for node in self.graph.nodes:
            layer = self._integers(node) if node.name in self.layers else []
            for i, name in enumerate(node.input):
                if name in self.grids:
                    node.input[i] = f"{name}/rounded"
            if node.name in self.float_layers and node.input[0].endswith("/rounded"):
                layer = [self._shield(node)]
            if node in self.padded:
                made += self._pad(node)
            else:
                made += [*layer, node, *(part for name in node.output for part in self._pair(name))]
        read = {name for node in made for name in node.input}  # nobody reads the float behind what is only padded
        self.graph.replace_nodes(n for n in made if n.op_type != "DequantizeLinear" or n.output[0] in read)
        return self.graph.model

    # -------------------------------------------------------------------------------- grids

    def _unite(self, node: NodeProto) -> None:
        graph, (first, *others) = self.graph, self.graph.data(node)
        if node.op_type in MOVERS:
            others = graph.results(node)
        elif node.op_type not in ("Add", "Concat"):
            return
        else:
            others += graph.results(node) if node.op_type == "Concat" else []
            if self.recipe.grids == "signed" and any(self._is_bounded(name) for name in (first, *others)):
                return
        for name in others:
            if name in self.tensors:
                self.parent[self._root(name)] = self._root(first)

    def _is_bounded(self, name: str) -> bool:
        """Tell whether a tensor's values come out of a Relu or Clip, moved or not."""
        producer = self.graph.producers.get(name)
        while producer is not None and producer.op_type in MOVERS:
            producer = self.graph.producers.get(self.graph.data(producer)[0])
        return producer is not None and producer.op_type in BOUNDS

    def _root(self, name: str) -> str:
        while self.parent.get(name, name) != name:
            name = self.parent[name]
        return name

    def _origin(self, name: str) -> str:
        """Return the observed tensor whose values were moved to make this one."""
        while name not in self.ranges:
            name = self.graph.data(self.graph.producers[name])[0]
        return name

    def _grids(self) -> dict[str, tuple[str, str]]:
        """Return the names of scale and zero point of every tensor that is rounded."""
        members: dict[str, list[Range]] = {}
        for name in sorted(self.tensors):
            members.setdefault(self._root(name), []).append(self.ranges[self._origin(name)])
        for root, found in members.items():
            scale, zero = grid(min(r[0] for r in found), max(r[1] for r in found), self.recipe.activations)
            self.graph.set_array(f"{root}/scale", scale)
            self.graph.set_array(f"{root}/zero_point", zero)
        return {n: (f"{self._root(n)}/scale", f"{self._root(n)}/zero_point") for n in self.tensors}

    # -------------------------------------------------------------------------------- nodes

    def _pair(self, name: str) -> list[NodeProto]:
        if name not in self.grids:
            return []
        between, after, names = f"{name}/int8", f"{name}/rounded", self.grids[name]
        return [
            helper.make_node("QuantizeLinear", [name, *names], [between], f"{name}/quantize"),
            helper.make_node("DequantizeLinear", [between, *names], [after], f"{name}/dequantize"),
        ]

    def _pad(self, node: NodeProto) -> list[NodeProto]:
        """Pad integers by their zero point: between pairs ONNX Runtime would pad in float."""
        source, name = node.input[0].removesuffix("/rounded"), node.output[0]
        inputs = [f"{source}/int8", node.input[1], self.grids[source][1], *node.input[3:]]
        del node.input[:]
        node.input.extend(inputs)
        node.output[0] = f"{name}/int8"
        names = [node.output[0], *self.grids[name]]
        return [node, helper.make_node("DequantizeLinear", names, [f"{name}/rounded"], f"{name}/dequantize")]

    def _shield(self, node: NodeProto) -> NodeProto:
        """Return bounds that change nothing, before a float layer: ONNX Runtime quantises what stands between pairs."""
        name = node.input[0]
        scale, zero = (self.graph.array(constant) for constant in self.grids[name.removesuffix("/rounded")])
        levels = np.iinfo(zero.dtype)
        bounds = [f"{node.output[0]}/lowest", f"{node.output[0]}/highest"]
        for bound, level in zip(bounds, (levels.min, levels.max), strict=True):
            self.graph.set_array(bound, np.array((level - float(zero)) * scale, np.float32))
        node.input[0] = f"{node.output[0]}/bounded"
        return helper.make_node("Clip", [name, *bounds], [node.input[0]], f"{node.output[0]}/bound")

    def _integers(self, node: NodeProto) -> list[NodeProto]:
        """Give a layer integer weights, and the bias that goes with them."""
        graph, weight, bias = self.graph, self.graph.array(node.input[1]), self.graph.bias(node)
        out_axis, _ = channel_axes(node, weight)
        least = LARGE if weight[0, 0].size > 1 else 2 * LARGE
        large = node.op_type == "Conv" and attribute(node, "group", 1) == 1 and weight.size >= least
        zero_point = int(large and self.recipe.weights == "shifted")
        highest = np.float32(LARGEST_WEIGHT[self.recipe.weight_bits] - zero_point)
        if node.op_type == "ConvTranspose" and attribute(node, "group", 1) > 1:
            scale = np.array(np.abs(weight).max() / highest)  # an axis that holds the channels of one group only
        else:
            scale = np.abs(weight).max(tuple(i for i in range(weight.ndim) if i != out_axis)) / highest
        input_scale = graph.array(self.grids[node.input[0]][0])
        shift: np.ndarray = graph.array(bias) if bias else np.zeros(len(weight), np.float32)
        if bias and self.recipe.bias == "int32":
            scale = np.maximum(scale, np.abs(shift) / (input_scale * _BIAS_LIMIT))
        scale = np.asarray(np.where(scale > 0, scale, 1), np.float32)
        shape = [-1 if i == out_axis else 1 for i in range(weight.ndim)] if scale.ndim else []
        integers: np.ndarray = np.clip(np.round(weight / scale.reshape(shape)), -highest, highest).astype(np.int8)
        made = [self._constant(node, 1, integers, scale, out_axis, zero_point)]
        if node.input[0] in self.means and (bias or node.op_type == "Conv"):
            error = integers * scale.reshape(shape) - weight
            shift = shift - mean_response(node, error, self.means[node.input[0]])
        elif not (bias or (self.recipe.bias == "every" and node.op_type == "Conv")):
            return made
        if self.recipe.bias == "every" and not shift.any():
            shift = np.full_like(shift, NO_BIAS)
        if self.recipe.bias == "int32":
            bias_scale = np.broadcast_to(scale * input_scale, shift.shape).astype(np.float32)
            limits = np.iinfo(np.int32)
            rounded = np.clip(np.round(shift.astype(np.float64) / bias_scale), limits.min, limits.max)
            return [*made, self._constant(node, 2, rounded.astype(np.int32), bias_scale, 0)]
        name = f"{node.output[0]}/bias"
        graph.set_array(name, shift.astype(np.float32))
        _set_input(node, 2, name)
        return made

    def _constant(
        self, node: NodeProto, position: int, integers: np.ndarray, scale: np.ndarray, axis: int, zero_point: int = 0
    ) -> NodeProto:
        stem = f"{node.output[0]}/{'weight' if position == 1 else 'bias'}"
        names = [f"{stem}/int", f"{stem}/scale", f"{stem}/zero_point"]
        integers = integers + np.asarray(zero_point, integers.dtype)
        for name, values in zip(
            names, (integers, scale, np.full(scale.shape, zero_point, integers.dtype)), strict=True
        ):
            self.graph.set_array(name, values)
        _set_input(node, position, stem)
        made = helper.make_node("DequantizeLinear", names, [stem], f"{stem}/dequantize")
        if scale.ndim:
            made.attribute.append(helper.make_attribute("axis", axis))
        return made


def grid(low: float, high: float, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and zero point of eight bits over a range, which is widened to hold 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    if kind == "int8":
        return np.array(max(-low, high) / 127 or 1.0, np.float32), np.array(0, np.int8)
    scale = np.float32((high - low) / 255) or np.float32(1.0)
    return np.array(scale, np.float32), np.array(round(-low / float(scale)), np.uint8)


def mean_response(node: NodeProto, weight: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return what a layer of this weight gives on average per output channel for inputs of this mean per channel."""
    out_axis, in_axis = channel_axes(node, weight)
    by_channel = np.moveaxis(weight, (out_axis, in_axis), (0, 1))
    flat = by_channel.reshape(*by_channel.shape[:2], -1).sum(2).astype(np.float64)
    groups = attribute(node, "group", 1)
    outputs, inputs = flat.shape
    by_group = flat.reshape(groups, outputs // groups, inputs) * mean.reshape(groups, 1, inputs)
    response: np.ndarray = by_group.sum(2).reshape(-1)
    return response


def _set_input(node: NodeProto, position: int, name: str) -> None:
    if position < len(node.input):
        node.input[position] = name
    else:
        assert position == len(node.input)
        node.input.append(name)
