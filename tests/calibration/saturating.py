"""What a processor without VNNI computes with an INT8 file, in numpy.

ONNX Runtime and OpenVINO multiply bytes by `vpmaddubsw` there: products of u8 and s8 are summed two by two in 16 bits,
and what does not fit is cut off (Intel's manual, PMADDUBSW). The rest of the file is computed as it is written.
tests/avx2_only.c runs the libraries themselves as on such a processor, where the kernel lets it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

#: onnx's reference implementation has Q/DQ from 19 on
OPSET = 21


def run(model: onnx.ModelProto, images: np.ndarray, *, bits: int = 16) -> list[np.ndarray]:
    """Return the outputs (N, ...) of a Q/DQ file whose layers multiply integers.

    bits: in which two products are summed.
    """
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (given,) = [value.name for value in model.graph.input if value.name not in values]
    values[given] = images
    integers: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for node in model.graph.node:
        arrays = [values[name] if name else None for name in node.input]
        if node.op_type == "DequantizeLinear":
            integers[node.output[0]] = tuple(values[name] for name in node.input)  # type: ignore[assignment]
        if node.op_type in ("Conv", "Gemm") and all(name in integers for name in node.input[:2]):
            data, weight = (integers[name] for name in node.input[:2])
            found = [_layer(node, data, weight, arrays[2] if len(arrays) > 2 else None, bits)]
        else:
            single = helper.make_graph([node], "one", [_value(n) for n in node.input if n], _values(node.output))
            one = helper.make_model(single, opset_imports=[helper.make_opsetid("", OPSET)])
            found = ReferenceEvaluator(one).run(None, {n: values[n] for n in node.input if n})
        values |= dict(zip(node.output, found, strict=False))
    return [values[value.name] for value in model.graph.output]


def _value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None)


def _values(names: Any) -> list[onnx.ValueInfoProto]:
    return [_value(name) for name in names if name]


def _layer(node: NodeProto, data: Any, weight: Any, bias: np.ndarray | None, bits: int) -> np.ndarray:
    (x, x_scale, x_zero), (w, w_scale, w_zero) = data, weight
    flip = 128 if x.dtype == np.int8 else 0  # signed activations become unsigned ones, and their zero point with them
    x, x_zero, w, w_zero = x.astype(np.int64) + flip, int(x_zero) + flip, w.astype(np.int64), int(w_zero.flat[0])
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    groups = attributes.get("group", 1)
    if node.op_type == "Gemm":
        columns, w = x[:, None], w if attributes.get("transB") else w.T
    else:
        # a depthwise convolution has a kernel of its own, which widens first
        bits = 32 if groups > 1 and w.shape[1] == 1 else bits
        columns = _columns(x, x_zero, w.shape, groups, attributes)
        w = np.moveaxis(w, 1, -1).reshape(len(w), -1)  # channels last, as in the columns
    depth, parts = w.shape[1], []
    for a, b in zip(np.moveaxis(columns, -2, 0), np.split(w, groups), strict=True):
        shift = a.sum(-1, keepdims=True) * w_zero + b.sum(-1) * x_zero - depth * x_zero * w_zero
        parts.append(_paired(a, b.T, bits) - shift)
    found = np.concatenate(parts, -1) * (x_scale * w_scale) + (0 if bias is None else bias)
    return np.asarray(found if node.op_type == "Gemm" else np.moveaxis(found, -1, 1), np.float32)


def _columns(x: np.ndarray, zero: int, shape: Any, groups: int, attributes: dict[str, Any]) -> np.ndarray:
    """Return what each output pixel multiplies: (N, H, W, groups, kernel * channels of a group)."""
    rows, cols = shape[2:]
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=zero)
    windows = np.lib.stride_tricks.sliding_window_view(x, (rows, cols), (2, 3))
    down, across = attributes.get("strides", (1, 1))
    windows = np.moveaxis(windows[:, :, ::down, ::across], 1, -1)  # (N, H, W, rows, cols, C)
    n, height, width = windows.shape[:3]
    by_group = windows.reshape(n, height, width, rows, cols, groups, -1)
    return np.moveaxis(by_group, 5, 3).reshape(n, height, width, groups, -1)


def _paired(a: np.ndarray, b: np.ndarray, bits: int) -> np.ndarray:
    """Return a @ b where every two neighbouring products are added in so many bits first."""
    odd = a.shape[-1] % 2
    a, b = np.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, odd)]), np.pad(b, ((0, odd), (0, 0)))
    total = np.zeros((*a.shape[:-1], b.shape[1]), np.int64)
    for i in range(0, a.shape[-1], 2):
        pair = a[..., i : i + 1] * b[i] + a[..., i + 1 : i + 2] * b[i + 1]
        total += np.clip(pair, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return total
