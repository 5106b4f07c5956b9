"""Prices of operations from whole engines: what TensorRT's own profile says of every layer of many of them."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bar_edge.latency_budget.operation_prices import monotone
from bar_edge.records.latency_table import Kind, Prices, knots

#: operators that have a price by two widths, or by one
HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: weight of what is known without measuring, (constant + rate x multiplications), beside one sample's
PRIOR = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """What one operation of an engine took."""

    kind: Kind
    widths: tuple[int, ...]
    ms: float


def layer_samples(model: Path, layers_ms: Mapping[str, float], kinds: Collection[Kind]) -> tuple[list[Sample], float]:
    """Return what the operations of these kinds took in a file's engine, and the ms of all other layers together.

    A layer of TensorRT is named after the nodes that are fused in it; one with several operations is shared out by
    their multiplications. What only puts channels in their places or sums them (a convolution in which every input
    goes to one output) is no operation.
    """
    known = {name: operation for name, operation in _operations(model).items() if operation[0] in kinds}
    samples, rest = list[Sample](), 0.0
    for layer, ms in layers_ms.items():
        copies = layer.startswith("Reformatting")
        inside = [known[name] for name in known if not copies and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", layer)]
        work = sum(multiplications for *_, multiplications in inside)
        samples += [Sample(kind, widths, ms * own / work) for kind, widths, own in inside]
        rest += 0.0 if inside else ms
    return samples, rest


def fitted_prices(samples: Sequence[Sample], largest: Mapping[Kind, tuple[int, ...]]) -> dict[str, Prices]:
    """Return the prices of every kind of operation with weights, over a grid up to its largest widths; monotone.

    Least squares of relative errors of the interpolation, held weakly to a constant and a rate per multiplication,
    which also says what no sample does.
    """
    found = {}
    for kind, widths in largest.items():
        own = [sample for sample in samples if sample.kind == kind and sample.ms > 0]
        if own:
            axes = tuple((0, *knots(n, kind.groups)) for n in widths)
            found[str(kind)] = Prices(widths=axes, ms=tuple(round(float(v), 7) for v in _grid(own, axes).ravel()))
    return found


def _grid(samples: list[Sample], axes: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Return the prices at the knots of the axes; none where a width is 0."""
    ms = np.array([sample.ms for sample in samples])
    inner = [np.array(axis[1:], float) for axis in axes]
    work = np.array([[1.0, np.prod(sample.widths)] for sample in samples])
    constant, rate = np.linalg.lstsq(work / ms[:, None], np.ones(len(ms)), rcond=None)[0].clip(0)
    points = np.array(list(itertools.product(*inner)))
    prior = (constant + rate * points.prod(1)).clip(ms.min() / 10)
    rows = np.stack([_weights(axes, sample.widths) for sample in samples])
    held = PRIOR / prior
    values: np.ndarray = np.linalg.lstsq(
        np.vstack([rows / ms[:, None], np.diag(held)]), np.concatenate([np.ones(len(ms)), held * prior]), rcond=None
    )[0]
    return np.pad(monotone(values.clip(0).reshape([len(axis) for axis in inner])), [(1, 0)] * len(inner))


def _weights(axes: tuple[tuple[int, ...], ...], widths: tuple[int, ...]) -> np.ndarray:
    """Return the share of every knot but those at 0 in the interpolation; what is narrower costs as the first one."""
    shares = np.ones(1)
    for axis, width in zip(axes, widths, strict=True):
        own = [np.interp(width, axis[1:], row) for row in np.eye(len(axis) - 1)]
        shares = np.multiply.outer(shares, np.array(own)).ravel()
    return shares


def _operations(model: Path) -> dict[str, tuple[Kind, tuple[int, ...], int]]:
    """Return for every node with weights its kind, widths and multiplications."""
    import onnx
    from onnx import numpy_helper

    proto = onnx.shape_inference.infer_shapes(onnx.load(str(model)))
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    values = [*proto.graph.input, *proto.graph.value_info, *proto.graph.output]
    shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
    found: dict[str, tuple[Kind, tuple[int, ...], int]] = {}
    for node in proto.graph.node:
        if node.name and node.op_type in HEAVY and node.input[1] in weights:
            weight = numpy_helper.to_array(weights[node.input[1]])
            moves = len(weight) > 1 and np.count_nonzero(weight, axis=0).max() <= 1
            if not moves:
                attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                kind, widths = _described(node.op_type, weight.shape, shapes[node.input[0]], attributes)
                pixels = int(np.prod(shapes[node.output[0]][2:]))
                found[node.name] = kind, widths, weight.size * pixels
    return found


def _described(
    operator: str, weight: tuple[int, ...], data: tuple[int, ...], attributes: dict[str, Any]
) -> tuple[Kind, tuple[int, ...]]:
    """Return a node's kind and widths, as `bar_edge.network.priced_operations` has them."""
    if operator in ("Gemm", "MatMul"):
        flipped = operator == "Gemm" and attributes.get("transB", 0)
        return Kind(op="linear"), (weight[1], weight[0]) if flipped else (weight[0], weight[1])
    groups = int(attributes.get("group", 1))
    depthwise = operator == "Conv" and groups > 1 and weight[1] == 1
    transposed = operator == "ConvTranspose"
    kind = Kind(
        op="depthwise" if depthwise else "transposed" if transposed else "conv",
        kernel=weight[2:],
        stride=max(attributes.get("strides", [1])),
        dilation=max(attributes.get("dilations", [1])),
        groups=1 if depthwise else groups,
        shape=data[2:],
    )
    return kind, (data[1],) if depthwise else (data[1], weight[1] * groups if transposed else weight[0])
