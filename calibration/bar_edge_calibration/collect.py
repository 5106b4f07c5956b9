"""Ranges of activations, observed in one pass over real images."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from bar_edge.errors import InputError
from bar_edge.files import file_hash, write_bytes
from bar_edge_calibration.graph import Graph
from bar_edge_calibration.histogram import Histogram
from bar_edge_calibration.place import observed
from bar_edge_calibration.ranges import Range, range_of
from bar_edge_calibration.session import cpu_options

#: fewer images are refused; fewer than ADVISED are reported
REQUIRED, ADVISED = 64, 300
#: activations held at a time
_CHUNK_BYTES = 128 * 2**20
_CHUNK_IMAGES = 64


@dataclasses.dataclass(kw_only=True, slots=True)
class Calibration:
    """What a network's activations were on a set of images."""

    #: SHA-256 of the ONNX file that was run
    onnx_sha256: str
    #: name of the images' data set; never a path
    data: str
    #: that drew the images
    seed: int
    images: int
    #: tensor -> its values
    histograms: dict[str, Histogram]
    #: tensor -> sum of the mean over each channel's pixels, over images: (C,) float64; where a layer reads
    sums: dict[str, np.ndarray]

    @property
    def warnings(self) -> list[str]:
        """Return what a user should know about these images."""
        few = f"{self.images} images: ranges from fewer than {ADVISED} may be too narrow"
        return [few] if self.images < ADVISED else []

    @property
    def means(self) -> dict[str, np.ndarray]:
        """Return the mean per channel of what layers read."""
        return {name: total / self.images for name, total in self.sums.items()}

    def ranges(self, method: str) -> dict[str, Range]:
        """Return the range of every tensor by the name of a method in `ranges.METHODS`."""
        return {name: range_of(histogram, method) for name, histogram in self.histograms.items()}

    def merge(self, other: Calibration) -> None:
        """Add what was observed on other images; raises InputError unless the ONNX file is the same."""
        _check_file(other, self.onnx_sha256, "another part")
        for name, histogram in other.histograms.items():
            self.histograms[name].merge(histogram)
        self.sums = {name: total + other.sums[name] for name, total in self.sums.items()}
        self.images += other.images

    def save(self, path: Path) -> None:
        """Write a .npz file without pickles, to a temporary name first."""
        described = {
            "schema": 1,
            **{name: getattr(self, name) for name in ("onnx_sha256", "data", "seed", "images")},
            "tensors": {n: {"exponent": h.exponent, "low": h.low, "high": h.high} for n, h in self.histograms.items()},
            "sums": list(self.sums),
        }
        arrays: dict[str, Any] = {f"counts_{i}": h.counts for i, h in enumerate(self.histograms.values())}
        arrays |= {f"sums_{i}": total for i, total in enumerate(self.sums.values())}
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays, description=np.array(json.dumps(described)))
        write_bytes(path, stream.getbuffer())

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote; raises InputError for anything else."""
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                described: dict[str, Any] = json.loads(str(file["description"]))
                if described.pop("schema") != 1:
                    raise ValueError("another schema")
                histograms = {
                    name: Histogram(counts=file[f"counts_{i}"], **fields)
                    for i, (name, fields) in enumerate(described.pop("tensors").items())
                }
                sums = {name: file[f"sums_{i}"] for i, name in enumerate(described.pop("sums"))}
            return cls(histograms=histograms, sums=sums, **described)
        except Exception as error:  # the file may be anybody's: numpy and zipfile raise a dozen kinds
            got = f"{path.name}: {type(error).__name__}: {str(error)[:100]}"
            raise InputError("a calibration that bar-edge saved", got=got, remedy="calibrate again") from error


def collect(
    path: Path, model: onnx.ModelProto, batches: Iterable[np.ndarray], *, data: str, seed: int = 0, threads: int = 1
) -> Calibration:
    """Run the images once through the model and return histograms of every tensor that may be rounded.

    path: the ONNX file whose hash the result carries; model: the same function, prepared. batches:
    (N, ...) in shape and dtype of the file's input, all of it one input. Memory depends on the network
    and the batch, not on the number of images. Raises InputError for no or fewer than REQUIRED images,
    for images that the file does not take, and for activations that are not finite.
    """
    names, session = observed(model), _session(model, threads)
    graph = Graph(model)
    read_by_layers = {node.input[0] for node in graph.nodes if graph.is_layer(node)}
    found = Calibration(onnx_sha256=file_hash(path), data=data, seed=seed, images=0, histograms={}, sums={})
    found.histograms = {name: Histogram() for name in names}
    for chunk in _chunks(batches, session):
        feed = {session.get_inputs()[0].name: chunk}
        values = dict(zip(names, session.run([f"{n}/observed" for n in names], feed), strict=True))
        for name, value in values.items():
            try:
                found.histograms[name].add(value)
            except ValueError as error:
                got = f"{error} in {name} of {path.name}, images {found.images} and after"
                raise InputError("finite activations", got=got, remedy="check the network and the images") from error
            if name in read_by_layers:
                axes = tuple(range(2, value.ndim))
                total = value.mean(axes, dtype=np.float64).sum(0)
                found.sums[name] = found.sums[name] + total if name in found.sums else total
        found.images += len(chunk)
    if found.images < REQUIRED:
        raise InputError(
            f"at least {REQUIRED} images to calibrate on",
            got=f"{found.images} of {data}",
            consequence="nothing was quantised",
            remedy="give more images: 500 are enough",
        )
    return found


def random_images(model: onnx.ModelProto, count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield images without meaning, for measuring speed; ranges from them are worth nothing."""
    (value,) = [v for v in model.graph.input if v.name not in {t.name for t in model.graph.initializer}]
    _, *shape = (d.dim_value for d in value.type.tensor_type.shape.dim)
    rng = np.random.default_rng(seed)
    for _ in range(count):
        if value.type.tensor_type.elem_type == TensorProto.UINT8:
            yield rng.integers(0, 256, (1, *shape), np.uint8)
        else:
            yield rng.standard_normal((1, *shape), np.float32)


def check_file(calibration: Calibration, path: Path) -> None:
    """Raise InputError unless the calibration was made on this ONNX file."""
    _check_file(calibration, file_hash(path), path.name)


# ------------------------------------------------------------------------------------------ inside


def _check_file(calibration: Calibration, sha256: str, name: str) -> None:
    if calibration.onnx_sha256 != sha256:
        raise InputError(
            f"a calibration of {name} (SHA-256 {sha256[:12]})",
            got=f"one of another ONNX file ({calibration.onnx_sha256[:12]})",
            consequence="nothing was quantised",
            remedy="calibrate this file",
        )


def _session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    """Open a model that returns what is observed, behind copies: inputs cannot be outputs."""
    observing = onnx.ModelProto()
    observing.CopyFrom(model)
    names = observed(model)
    for name in names:
        observing.graph.node.append(helper.make_node("Identity", [name], [f"{name}/observed"]))
    del observing.graph.output[:]
    outputs = [helper.make_tensor_value_info(f"{name}/observed", TensorProto.FLOAT, None) for name in names]
    observing.graph.output.extend(outputs)
    options = cpu_options(threads)
    # the arena would keep the largest of every size it ever gave
    options.enable_cpu_mem_arena = False
    return onnxruntime.InferenceSession(observing.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _chunks(batches: Iterable[np.ndarray], session: onnxruntime.InferenceSession) -> Iterator[np.ndarray]:
    """Yield the images in parts whose activations fit in memory; the first image alone tells their size."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise InputError("a network with one input", got=f"{len(inputs)} inputs", consequence="nothing was quantised")
    fixed, *shape = inputs[0].shape
    dtype = np.dtype({"tensor(float)": np.float32, "tensor(uint8)": np.uint8}.get(inputs[0].type))
    size = fixed if isinstance(fixed, int) else 0
    for batch in batches:
        if batch.dtype != dtype or list(batch.shape[1:]) != shape or (isinstance(fixed, int) and len(batch) % fixed):
            raise InputError(
                f"{dtype} images {inputs[0].shape}, as the file takes them",
                got=f"{batch.dtype} {list(batch.shape)}",
                consequence="nothing was quantised",
                remedy="calibrate on the data that the network was trained for, normalised as the file expects it",
            )
        if not size:
            outputs = session.run(None, {inputs[0].name: batch[:1]})
            size = max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // sum(value.nbytes for value in outputs)))
        for start in range(0, len(batch), size):
            yield batch[start : start + size]
