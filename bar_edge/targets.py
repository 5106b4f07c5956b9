"""What `export` writes: an artifact in float32, and what becomes of it for a target and a precision."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from bar_edge.bench import bench_onnx, compare, measurement, runner, save_measurement
from bar_edge.bench.ssh import Device, Target
from bar_edge.data import DataSource, Split
from bar_edge.data.memory import RANDOM
from bar_edge.errors import BarEdgeError, EnvironmentLacks, InputError
from bar_edge.export.artifact import convert_artifact
from bar_edge.export.bundle import SCRIPT, write_bundle
from bar_edge.export.device_build import ENGINE, build_and_check
from bar_edge.export.lowering import folded, lower
from bar_edge.export.onnx import Preprocessing, export_onnx
from bar_edge.export.parity import cpu_session
from bar_edge.export.precision import to_half
from bar_edge.export.tensorrt import EngineOptions, import_tensorrt, manifest_path
from bar_edge.export.verify import MANIFEST, MODEL, file_hash
from bar_edge.models.zoo import parse_arguments
from bar_edge.network import Network
from bar_edge.network.network import unflatten
from bar_edge.records import write_json
from bar_edge.training import Task, evaluate
from bar_edge_calibration.collect import random_images
from bar_edge_calibration.finetune import finetune
from bar_edge_calibration.quantize import Promise, quantize
from bar_edge_calibration.recipe import load_recipe

#: target -> the precisions that it can have
TARGETS = {
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "int8"),
    "trt": ("fp32", "fp16", "bf16", "int8"),
    "trt-bundle": ("fp32", "fp16", "bf16", "int8"),
    "torch": ("fp32",),
}
#: target -> the runtime here that runs its file
RUNTIMES = {"onnx": "onnxruntime-cpu", "openvino": "openvino-cpu"}
#: lowerings where nothing can be measured: TensorRT fuses convolution and addition (unverified there)
UNMEASURED = {"int8": "regular:32", "fp16": "regular:8", "bf16": "regular:8", "fp32": "regular:4"}
#: target -> how INT8 is laid out
RECIPES = {"onnx": "onnxruntime-cpu", "openvino": "openvino-cpu", "trt": "tensorrt"}
#: images that ranges are taken of, and that a bundle carries
CALIBRATION_IMAGES, BUNDLE_SAMPLES = 512, 256
BATCH = 64
#: batches of the last rung
FINETUNE_STEPS = 200
#: how long an engine's build on another device may take, in seconds
BUILD_S = 3600.0


def check_target(target: str, precision: str, on: str) -> None:
    """Raise EnvironmentLacks unless the target exists in this precision and here, InputError for a useless device."""
    if precision not in TARGETS.get(target, ()):
        known = "; ".join(f"{name} in {', '.join(precisions)}" for name, precisions in TARGETS.items())
        raise EnvironmentLacks(f"one of: {known}", got=f"{target} in {precision}", consequence="nothing was written")
    if target == "trt" and on == "local":
        import_tensorrt()
    if on != "local" and target != "trt":
        raise InputError("--on for --target trt, which is built on the device", got=f"--target {target}")


def engine_options(texts: tuple[str, ...]) -> EngineOptions:
    """Read `batch=1,4,8`, `batch=4` or other fields of EngineOptions; raises InputError for anything else."""
    defaults = dataclasses.asdict(EngineOptions())
    defaults.pop("timing_caches")  # where the engine is built
    given: dict[str, Any] = dict(parse_arguments(texts))
    if "batch" in given:
        sizes = tuple(int(size) for size in str(given["batch"]).split(",") if size.isdigit())
        given["batch"] = {1: 3 * sizes, 3: sizes}.get(len(sizes))
    if any(type(value) is not type(defaults.get(name, type)) for name, value in given.items()):
        known = ", ".join(f"{name}={value}" for name, value in (defaults | {"batch": "1,1,1"}).items())
        raise InputError(
            f"options of an engine out of {known}", got=", ".join(texts), consequence="nothing was written"
        )
    return EngineOptions(**given)


def for_speed(target: str, precision: str) -> Callable[[Path], None] | None:
    """Return what turns a file in float32 into one of the precision, in place, for measuring its speed alone."""

    def int8(file: Path) -> None:
        images = random_images(onnx.load(file), 2 * BATCH, 0)
        quantize(file, file, images=images, data="random", recipe=load_recipe(RECIPES[target]))

    return {"int8": int8, "fp16": lambda file: to_half(file, file, "fp16")}.get(precision)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """A data set as a file takes it in: batches of arrays that can be read again and again."""

    split: Split
    number: int
    #: from normalised images to what the file's input is
    as_input: Callable[[Tensor], Tensor]

    def __iter__(self) -> Iterator[np.ndarray]:
        left = self.number
        for images, _ in self.split.batches(BATCH, train=False, seed=0, epoch=0, device="cpu", augment="none"):
            yield self.as_input(images[:left]).numpy()
            left -= len(images)
            if left <= 0:
                return


def write_converted(
    source: Path,
    folder: Path,
    *,
    target: str,
    precision: str,
    data: DataSource,
    task: Task,
    structure: Any,
    as_input: Callable[[Tensor], Tensor],
    max_drop: float | None,
    tuned: Callable[[Path], None],
    on: str,
    engine: EngineOptions,
) -> dict[str, Any]:
    """Write the artifact of a target from one in float32, and return its manifest."""
    on_device = target.startswith("trt")
    with tempfile.TemporaryDirectory() as scratch:
        if precision == "int8":
            whole = Path(scratch) / "int8" if on_device else folder
            manifest = write_int8(
                source,
                whole,
                target=target,
                data=data,
                task=task,
                structure=structure,
                as_input=as_input,
                max_drop=max_drop,
                tuned=tuned,
            )
            if not (on_device and manifest["parity"]["within"]):
                return manifest
            source = whole
        elif not on_device:
            return convert_artifact(source, folder, target=target, precision=precision, convert=_to_fp16)
        return write_trt(source, folder, target=target, precision=precision, on=on, engine=engine)


def finetuned(
    network: Network, lowering: str, data: DataSource, preprocessing: Preprocessing | None
) -> Callable[[Path], None]:
    """Return what writes a network's float file anew, with weights that learned under rounding on training images."""

    def write(file: Path) -> None:
        batches = data.fit.batches(BATCH, train=True, seed=0, epoch=0, device="cpu", augment="none")
        learned = finetune(folded(network), (images for images, _ in itertools.islice(batches, FINETUNE_STEPS)))
        export_onnx(lower(learned, lowering), network.input_shapes, file, preprocessing=preprocessing)

    return write


def _to_fp16(model: Path, new: Path) -> None:
    to_half(model, new, "fp16")


def write_int8(
    source: Path,
    folder: Path,
    *,
    target: str,
    data: DataSource,
    task: Task,
    structure: Any,
    as_input: Callable[[Tensor], Tensor],
    max_drop: float | None,
    tuned: Callable[[Path], None],
) -> dict[str, Any]:
    """Write an artifact in INT8 from one in float32, calibrated on training images; returns the manifest.

    `conversion` holds what was done, the metric on held-out training images before and after, and whether it
    fell by at most max_drop points; tuned: writes the float file anew, see `finetuned`; structure: of the
    network's outputs. Raises InputError for too few images.
    """
    sign = 1.0 if task.higher_is_better else -1.0

    def score(model: Path) -> float:
        module = _Session(model, structure, as_input)
        return sign * evaluate(module, data.held_out, task, batch=256, device="cpu", precision="fp32")

    def convert(model: Path, new: Path) -> dict[str, Any]:
        record = quantize(
            model,
            new,
            images=Images(split=data.fit, number=CALIBRATION_IMAGES, as_input=as_input),
            data=data.name,
            recipe=load_recipe(RECIPES["trt" if target.startswith("trt") else target]),
            promise=Promise(score=score, max_drop=max_drop, finetune=tuned) if max_drop is not None else None,
        )
        if data.name == RANDOM:
            warning = "random images: the ranges mean nothing, the file is for measuring speed"
            return {**record, "warnings": [*record["warnings"], warning]}
        before, after = sign * score(model), sign * score(new)
        return {
            **record,
            "held_out": {
                "fp32": before,
                "int8": after,
                "drop_points": 100 * sign * (before - after),
                "max_drop": max_drop,
            },
        }

    return convert_artifact(source, folder, target=target, precision="int8", convert=convert, own_outputs=True)


def in_runtime(folder: Path, source: Path, target: str, threads: int) -> dict[str, Any]:
    """Compare an artifact in its target's runtime, and measure it in turn with the one in float32 that it was made of.

    Returns `parity` and, unless both are the same, `speedup`; nothing where no runtime here runs it.
    """
    if target not in RUNTIMES:
        return {}
    # a file of another recipe may kill a runtime: that is a process of its own
    files = list(dict.fromkeys([folder / MODEL, source / MODEL]))
    found = bench_onnx(files, runtime=RUNTIMES[target], threads=threads, seconds=1.0)
    answer: dict[str, Any] = {"parity": found[0].parity}
    if len(found) > 1:
        comparison = compare(found[0], found[1])
        answer["speedup"] = {name: getattr(comparison, name) for name in ("speedup", "low", "high")}
    return answer


def write_engine(bundle: Path, on: str) -> dict[str, Any]:
    """Build the engine of a bundle here or on a device, beside it, and return what its build script says of it.

    The engine is compared with the expected outputs and measured where it was built; a wrong one is removed. Raises
    EnvironmentLacks without TensorRT's Python bindings or GPU, BarEdgeError if the build fails.
    """
    if on == "local":
        return build_and_check(bundle)
    kept = f"no engine was brought here; its bundle is {bundle.name}"
    with Device(Target.parse(on)) as device:
        device.send({path.name: path for path in bundle.iterdir() if path.is_file()})
        done = device.run(["sh", SCRIPT], stdin=MANIFEST, timeout_s=BUILD_S)
        said = done.stderr.strip()[-300:]
        if done.timed_out:
            raise BarEdgeError(f"an engine within {BUILD_S:g} s", got="none yet", consequence=kept)
        if done.returncode == 3 or (done.returncode == 0 and not done.stdout.strip()):
            remedy = f"apt install python3-libnvinfer python3-numpy there (JetPack), or sh {SCRIPT} by hand"
            raise EnvironmentLacks("TensorRT with its Python bindings there", got=said, consequence=kept, remedy=remedy)
        if done.returncode not in (0, 1):
            raise BarEdgeError("an engine that builds and runs", got=said, consequence=kept)
        answer: dict[str, Any] = json.loads(done.stdout)
        if answer["models"][0]["parity"]["within"]:
            device.fetch([ENGINE, manifest_path(Path(ENGINE)).name], bundle)
    return answer


def write_trt(
    source: Path, folder: Path, *, target: str, precision: str, on: str, engine: EngineOptions
) -> dict[str, Any]:
    """Write a bundle from an artifact, for `trt` with the engine that it builds; returns the manifest."""
    manifest = write_bundle(source, folder, precision=precision, options=engine, runner=Path(runner.__file__))
    if target == "trt" and manifest["parity"]["within"]:
        answer = write_engine(folder, on)
        parity = answer["models"][0]["parity"]
        if parity["within"]:
            measured = measurement(folder / MODEL, answer["models"][0], answer, on)
            manifest["latency"] = {
                "p50_ms": measured.percentile_ms(50),
                "parts_p50_ms": {part: times["p50"] for part, times in (measured.parts_ms or {}).items()},
                "batch": measured.batch,
                "file": save_measurement(folder, measured).name,
            }
            manifest["files"][ENGINE] = {"sha256": file_hash(folder / ENGINE)}
        manifest |= {"target": "trt", "parity": {"samples": parity.pop("n"), **parity}}
        write_json(folder / MANIFEST, manifest)
    return manifest


class _Session(nn.Module):
    """An ONNX file as a module, on the CPU."""

    def __init__(self, model: Path, structure: Any, as_input: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.session, self.structure, self.as_input = cpu_session(model), structure, as_input

    def forward(self, images: Tensor) -> Any:
        feed = {self.session.get_inputs()[0].name: self.as_input(images).numpy()}
        return unflatten(tuple(map(torch.from_numpy, self.session.run(None, feed))), self.structure)
