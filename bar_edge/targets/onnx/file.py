"""One network to one ONNX file, and the proof that the file computes the same."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim
import torch
from google.protobuf.message import Message
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bar_edge.errors import InputError
from bar_edge.files import write_bytes
from bar_edge.targets.onnx.padding import without_wrap, without_zeros_before_maxpool
from bar_edge.targets.onnx.parity import cpu_session, difference, relative

#: target -> opset. 18 is the one torch's exporter is written in (others go through converters that fail on
#: Pad); ONNX Runtime since 1.14, OpenVINO and TensorRT 10 and 11 read it.
OPSETS = {"onnx": 18}
#: the IR version that came with opset 18: older readers refuse newer ones, and the file needs nothing newer
IR_VERSION = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How an image of values 0..255 becomes a network's input: (x / 255 - mean) / std per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Preprocessed(nn.Module):
    """A network behind its normalisation: takes uint8 images (N, C, H, W) of values 0..255."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        mean, std = (
            torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (preprocessing.mean, preprocessing.std)
        )
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (mean / std).float())

    def forward(self, images: Tensor) -> Any:
        """Normalise and run the network."""
        return self.network(images.to(torch.float32) * self.scale - self.shift)


def export_onnx(
    module: nn.Module,
    input_shape: tuple[int, ...] | tuple[tuple[int, ...], ...],
    path: Path,
    *,
    opset: int = OPSETS["onnx"],
    preprocessing: Preprocessing | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the module in eval mode and float32 as one ONNX file with a free first axis called "batch".

    input_shape: of one image without N, or one shape per input; inputs are called `input` or `input_0`...,
    outputs `output` or `output_0`.... With `preprocessing` the one input is uint8 and is normalised inside.
    The same network gives the same bytes. Raises InputError if the exporter does not accept the module
    or the file cannot be written; `path` then keeps what it held.
    """
    shapes = _shapes(input_shape)
    if preprocessing is not None:
        _check_channels(shapes, preprocessing)
    dtype = torch.float32 if preprocessing is None else torch.uint8
    examples = tuple(torch.zeros(2, *shape, dtype=dtype) for shape in shapes)
    try:
        with quiet():
            model = _convert(_Flat(module, preprocessing), examples, opset)
            model, _ = onnxsim.simplify(model)
            without_wrap(model)
            without_zeros_before_maxpool(model)
            _count_axes_from_the_end(model)
            _clean(model, {"input_layout": "NCHW"[: len(shapes[0]) + 1], **(metadata or {})})
            onnx.checker.check_model(model, full_check=True)
            data = model.SerializeToString(deterministic=True)  # one file, which ends at 2 GB
    except Exception as error:  # the exporter raises many kinds; all mean that this module has no ONNX form
        raise _not_exportable(error) from error
    write_bytes(path, data)


def parity_onnx(
    module: nn.Module,
    onnx_path: Path,
    images: Tensor | tuple[Tensor, ...],
    *,
    preprocessing: Preprocessing | None = None,
    chunk: int = 64,
) -> float:
    """Return max|a-b| / max|a| between the module (a, eval mode) and the file (b) in ONNX Runtime, float32, CPU.

    images: (N, ...) as the file takes them; `preprocessing` is what the file has inside and the module has
    not. NaN or infinity in either gives infinity. The module is left as it was.
    """
    inputs = images if isinstance(images, tuple) else (images,)
    network, session = _Flat(module, preprocessing), cpu_session(onnx_path)
    largest_error = largest = 0.0
    for start in range(0, len(inputs[0]), chunk):
        part = tuple(x[start : start + chunk] for x in inputs)
        with torch.no_grad():
            expected = [tensor.numpy() for tensor in network(*part)]
        feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), part, strict=True)}
        error, scale = difference(expected, session.run(None, feed))
        largest_error, largest = max(largest_error, error), max(largest, scale)
    return relative(largest_error, largest)


def torch_outputs(
    module: nn.Module, inputs: tuple[Tensor, ...], *, preprocessing: Preprocessing | None = None
) -> list[np.ndarray]:
    """Run a copy of the module on the CPU in eval mode and float32; returns its outputs in order."""
    with torch.no_grad():
        return [tensor.numpy() for tensor in _Flat(module, preprocessing)(*inputs)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's prints, warnings and log lines from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# ------------------------------------------------------------------------------------------ inside


class _Flat(nn.Module):
    """A copy of a network as a file holds it: CPU, float32, eval mode, normalisation in front, flat outputs."""

    def __init__(self, module: nn.Module, preprocessing: Preprocessing | None) -> None:
        super().__init__()
        network = copy.deepcopy(module).cpu().float()
        self.network = network if preprocessing is None else Preprocessed(network, preprocessing)
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in pytree.tree_leaves(self.network(*inputs)) if isinstance(leaf, Tensor))


def _convert(network: nn.Module, examples: tuple[Tensor, ...], opset: int) -> onnx.ModelProto:
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        outputs = len(network(*examples))
    program = torch.onnx.export(
        network,
        examples,
        dynamo=True,
        opset_version=opset,
        input_names=_names("input", len(examples)),
        output_names=_names("output", outputs),
        dynamic_shapes=(tuple({0: batch} for _ in examples),),
        external_data=False,
        optimize=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    if model.opset_import[0].version != opset:
        raise ValueError(f"the network has no form in opset {opset}, only in {model.opset_import[0].version}")
    if any(
        value.type.tensor_type.shape.dim[0].dim_param != "batch" for value in [*model.graph.input, *model.graph.output]
    ):
        raise ValueError("the first axis of every input and output must be the batch")
    return model


def _count_axes_from_the_end(model: onnx.ModelProto) -> None:
    """Write the axis of every Gather as a negative number: the same operator, but one that OpenVINO lets be.

    OpenVINO (seen in 2026.4.1) takes a Gather of all channels in another order for one that swaps colours,
    removes it, and moves the weights of the next convolution by the order itself where its inverse is due.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = [*inferred.input, *inferred.value_info]
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    ranks |= {constant.name: len(constant.dims) for constant in inferred.initializer}
    for node in model.graph.node:
        axes = [a for a in node.attribute if node.op_type == "Gather" and a.name == "axis" and a.i >= 0]
        for axis in axes if ranks.get(node.input[0]) else []:
            axis.i -= ranks[node.input[0]]


def _clean(model: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Leave only what computes, and `metadata`: stack traces name the machine and differ from run to run."""
    _strip(model)  # onnxsim 0.8 drops them too; the promise must not hang on its version
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "bar-edge", ""
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))


def _strip(message: Message) -> None:
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif isinstance(value, Message):
            _strip(value)
        elif field.message_type is not None:
            for item in value:
                _strip(item)


def _shapes(input_shape: tuple[int, ...] | tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(s for s in input_shape if isinstance(s, tuple)) or (
        tuple(s for s in input_shape if isinstance(s, int)),
    )


def _names(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}_{i}" for i in range(count)]


def _check_channels(shapes: tuple[tuple[int, ...], ...], preprocessing: Preprocessing) -> None:
    if len(shapes) != 1 or not len(preprocessing.mean) == len(preprocessing.std) == shapes[0][0]:
        raise InputError(
            f"one image input, and a mean and a standard deviation for each of its {shapes[0][0]} channels",
            got=f"{len(shapes)} inputs, {len(preprocessing.mean)} means and {len(preprocessing.std)} deviations",
            consequence="no file was written",
            remedy="export without preprocessing, or give the data set's normalisation",
        )


def _not_exportable(error: Exception) -> InputError:
    # the exporter wraps the reason in pages of advice: the innermost cause is the one that names an operator
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return InputError(
        "a network that torch's ONNX exporter accepts with a free batch size",
        got=f"{type(cause).__name__}: {' | '.join(lines[:3])}"[:400],
        consequence="no file was written",
        remedy="replace the operation, or make it independent of the batch size",
    )
