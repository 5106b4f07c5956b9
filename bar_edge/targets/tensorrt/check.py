"""What TensorRT will reject in an ONNX file, or run slowly, and why: told without it, from its published tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from bar_edge.errors import InputError
from bar_edge.targets.tensorrt.operators import CONSTANT_INPUTS, IR_VERSIONS, OPSETS, VERSIONS, types_of

RESIZE_MODES = {"nearest", "linear"}
RESIZE_COORDINATES = {
    "half_pixel",
    "pytorch_half_pixel",
    "tf_half_pixel_for_nn",
    "asymmetric",
    "align_corners",
}
#: tensor cores take channels in groups of so many (8 of fp16 and bf16, 32 of int8)
CHANNEL_GROUP = {"FLOAT16": 8, "BFLOAT16": 8, "INT8": 32}
#: operators that take their inputs only in one type, which a strongly typed network does not mend
SAME_TYPES = {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Concat", "MatMul", "Gemm", "Conv", "PRelu"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One node (or the file itself) that some TensorRT versions do not like."""

    kind: Literal["rejected", "slow"]
    #: empty for the file itself
    node: str
    operator: str
    #: inputs -> outputs, such as 1x16x32x32 -> 1x8x32x32
    shapes: str
    #: TensorRT versions out of 10.3, 10.16, 11
    versions: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        where = f"{self.operator} '{self.node}' ({self.shapes})" if self.operator else "the file"
        return f"{where}: {self.kind} by TensorRT {', '.join(self.versions)}: {self.reason}"


def check_onnx(path: Path, versions: tuple[str, ...] = VERSIONS) -> list[Finding]:
    """List every node of an ONNX file that one of the TensorRT versions rejects or runs slowly.

    Rejected: it is not in the version's operator table, or breaks a restriction there. Slow: it runs, but
    without fusion or tensor cores. Raises InputError for an unknown version or a file that is no ONNX model.
    """
    if not set(versions) <= set(VERSIONS):
        raise InputError(f"TensorRT versions out of {', '.join(VERSIONS)}", got=", ".join(versions))
    try:
        model = onnx.load(str(path), load_external_data=False)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except Exception as error:  # protobuf, file and inference errors: all mean that this is no sound model
        raise InputError("a sound ONNX file", got=f"{path.name}: {error}"[:300]) from error
    file = _File(model)
    found = [f for version in versions for f in [*_check_file(file, version), *_check_nodes(file, version)]]
    # one finding for all the versions that say the same
    grouped: dict[Finding, tuple[str, ...]] = {}
    for finding in found:
        key = dataclasses.replace(finding, versions=())
        grouped[key] = (*grouped.get(key, ()), *finding.versions)
    return [dataclasses.replace(finding, versions=said) for finding, said in grouped.items()]


def require_accepted(path: Path, versions: tuple[str, ...] = VERSIONS) -> list[Finding]:
    """Return what is slow; raises InputError if one of the versions rejects a node."""
    found = check_onnx(path, versions)
    rejected = [finding for finding in found if finding.kind == "rejected"]
    if rejected:
        more = f" | and {len(rejected) - 5} more" if len(rejected) > 5 else ""
        raise InputError(
            f"a graph that TensorRT {', '.join(versions)} takes",
            got=" | ".join(str(finding) for finding in rejected[:5]) + more,
            consequence="no engine can be built from it",
            remedy="export with --lowering regular, zero-filled or slices, in fp32 or fp16",
        )
    return found


# ------------------------------------------------------------------------------------------ inside


class _File:
    """A model with its tensors' types, shapes, constants and makers by name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.constants = {t.name: t for t in self.graph.initializer}
        for node in self.graph.node:
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if node.op_type == "Constant" and value is not None:
                self.constants[node.output[0]] = value
        values = [*self.graph.input, *self.graph.value_info, *self.graph.output]
        self.types = {v.name: TensorProto.DataType.Name(v.type.tensor_type.elem_type) for v in values}
        self.types |= {name: TensorProto.DataType.Name(t.data_type) for name, t in self.constants.items()}
        self.shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        self.shapes |= {name: list(t.dims) for name, t in self.constants.items()}
        self.maker = {name: node for node in self.graph.node for name in node.output}
        self.inputs = {v.name for v in self.graph.input} - set(self.constants)
        self.read = {name for node in self.graph.node for name in node.input} | {v.name for v in self.graph.output}

    def constant(self, name: str) -> np.ndarray | None:
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def finding(self, node: onnx.NodeProto, kind: Literal["rejected", "slow"], version: str, reason: str) -> Finding:
        inputs, outputs = (
            ", ".join("x".join(map(str, self.shapes.get(name, ["?"]))) or "scalar" for name in names if name)
            for names in ([n for n in node.input if n not in self.constants], node.output)
        )
        return Finding(
            kind=kind,
            node=node.name or node.output[0],
            operator=node.op_type,
            shapes=f"{inputs} -> {outputs}",
            versions=(version,),
            reason=reason,
        )


def _check_file(file: _File, version: str) -> Iterator[Finding]:
    def rejected(reason: str) -> Finding:
        return Finding(kind="rejected", node="", operator="", shapes="", versions=(version,), reason=reason)

    low, high = OPSETS[version]
    opset = next((o.version for o in file.model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not low <= opset <= high:
        yield rejected(f"opset {opset}; its operator table is for {low} to {high}")
    if file.model.ir_version > IR_VERSIONS[version]:
        yield rejected(f"IR version {file.model.ir_version}; it reads up to {IR_VERSIONS[version]}")
    for value in file.graph.input:
        dims = file.shapes[value.name]
        if value.name in file.inputs and any(isinstance(d, str) or d == 0 for d in dims[1:]):
            yield rejected(f"input {value.name} {dims}: only the batch may be free")
    if any(t.data_location == TensorProto.EXTERNAL for t in file.graph.initializer):
        yield rejected("weights outside the file: an engine is built from one file")


def _check_nodes(file: _File, version: str) -> Iterator[Finding]:
    for node in file.graph.node:
        for reason in _rejections(file, node, version):
            yield file.finding(node, "rejected", version, reason)
        for reason in _slowness(file, node):
            yield file.finding(node, "slow", version, reason)


def _rejections(file: _File, node: onnx.NodeProto, version: str) -> Iterator[str]:
    types = types_of(node.op_type, version) if node.domain in ("", "ai.onnx") else frozenset()
    if not types:
        yield f"no operator {node.domain + '::' if node.domain else ''}{node.op_type} in its table"
        return
    data = next(iter([*node.input, *node.output]))  # the other inputs are of the same type, or say where and how much
    if data in file.types and file.types[data] not in types:
        yield f"{data} is {file.types[data]}, it takes {', '.join(sorted(types))}"
    if file.types.get(data) == "UINT8" and data not in file.inputs:
        yield f"{data} is UINT8, which only inputs and outputs of the network may be"
    if node.op_type in SAME_TYPES and len({file.types[n] for n in node.input if n in file.types}) > 1:
        yield "inputs of different types in a strongly typed network"
    for i in CONSTANT_INPUTS.get(node.op_type, ()):
        if len(node.input) > i and node.input[i] and node.input[i] not in file.constants:
            yield f"input {i} ({node.input[i]}) must be a constant"
    if node.op_type in RESTRICTIONS:
        yield from RESTRICTIONS[node.op_type](file, node)


def _attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    found = next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
    return found.decode() if isinstance(found, bytes) else found


def _scatter_nd(file: _File, node: onnx.NodeProto) -> Iterator[str]:
    if _attribute(node, "reduction", "none") != "none":
        yield "reduction other than none (8.6 ignored it and computed something else)"


def _scatter_elements(file: _File, node: onnx.NodeProto) -> Iterator[str]:
    if _attribute(node, "reduction", "none") != "none":
        yield "a reduction needs the ScatterElements plugin (no BF16, no INT8), which is not loaded"


def _pool(file: _File, node: onnx.NodeProto) -> Iterator[str]:
    if len(file.shapes.get(node.input[0], [0] * 4)) not in (4, 5):
        yield "2-D or 3-D pooling only"
    if any(d != 1 for d in _attribute(node, "dilations", [])):  # type: ignore[attr-defined]
        yield "dilated pooling"
    if len(node.output) > 1 and node.output[1] in file.read:
        yield "the output of indices is not supported"


def _quantize(file: _File, node: onnx.NodeProto) -> Iterator[str]:
    zero_point = file.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if zero_point is not None and np.any(zero_point.astype(np.int64) != 0):
        yield "zero point other than 0: quantisation must be symmetric"
    made = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
    if file.types.get(made) not in (None, "INT8"):
        yield f"quantised to {file.types[made]}: only INT8"


def _resize(file: _File, node: onnx.NodeProto) -> Iterator[str]:
    mode = _attribute(node, "mode", "nearest")
    coordinates = _attribute(node, "coordinate_transformation_mode", "half_pixel")
    if mode not in RESIZE_MODES:
        yield f"mode {mode}; only nearest and linear"
    if coordinates not in RESIZE_COORDINATES:
        yield f"coordinates {coordinates}"
    if _attribute(node, "antialias", 0) or _attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        yield "antialiasing, or an aspect ratio policy other than stretch"


def _layer_norm(file: _File, node: onnx.NodeProto) -> Iterator[str]:
    if any(name in file.read for name in node.output[1:]):
        yield "only the first output is supported"


#: operator -> what its table entry restricts
RESTRICTIONS: dict[str, Callable[[_File, onnx.NodeProto], Iterator[str]]] = {
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "LpPool": _pool,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _quantize,
    "Resize": _resize,
    "LayerNormalization": _layer_norm,
}


def _slowness(file: _File, node: onnx.NodeProto) -> Iterator[str]:
    if node.op_type == "Gather" and node.input[0] not in file.constants:
        rank = len(file.shapes.get(node.input[0], []))
        axis = _attribute(node, "axis", 0)
        if rank and isinstance(axis, int) and axis % rank == 1:
            yield "a gather of channels: a copy that nothing fuses with; order the channels, or lower to slices"
    if node.op_type in ("ScatterND", "ScatterElements"):
        yield "a scatter: a copy that nothing fuses with; lower to slices or zero-filled"
    if node.op_type in ("If", "Loop", "Scan", "NonZero", "NonMaxSuppression"):
        yield "shapes or control flow that depend on data: no CUDA graph"
    if node.op_type == "Conv" and _attribute(node, "group", 1) == 1:
        yield from _uneven_channels(file, node)
    if node.op_type == "Add" and len(node.input) == 2:
        makers = [file.maker.get(name) for name in node.input]
        quantised = [maker is not None and maker.op_type == "DequantizeLinear" for maker in makers]
        if any(quantised) and not all(quantised) and not set(node.input) & set(file.constants):
            yield "only one input of the addition is quantised: it runs in float"


def _uneven_channels(file: _File, node: onnx.NodeProto) -> Iterator[str]:
    maker = file.maker.get(node.input[0])
    quantised = maker is not None and maker.op_type == "DequantizeLinear"
    precision = "INT8" if quantised else file.types.get(node.input[0], "")
    group = CHANNEL_GROUP.get(precision)
    weight = file.shapes.get(node.input[1], [])
    # an image's few input channels are as they are
    if group and len(weight) > 1 and (weight[0] % group or (weight[1] % group and weight[1] > 4)):
        yield f"{weight[1]} to {weight[0]} channels in {precision}: tensor cores take multiples of {group}"
