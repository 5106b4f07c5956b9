"""What `export` writes: an artifact in float32, and what becomes of it for a target and a precision."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from bar_edge.bench import Comparison, Measurement, bench_onnx, compare, measurement, runner, save_measurement
from bar_edge.bench.ssh import Device, Target
from bar_edge.data import DataSource, Split
from bar_edge.data.memory import RANDOM
from bar_edge.errors import BarEdgeError, EnvironmentLacks, InputError
from bar_edge.files import write_json
from bar_edge.lowering.lower import folded, lower
from bar_edge.models.zoo import parse_arguments
from bar_edge.network import Network
from bar_edge.network.network import unflatten
from bar_edge.targets.artifact import convert_artifact
from bar_edge.targets.onnx.file import Preprocessing, export_onnx
from bar_edge.targets.onnx.parity import cpu_session
from bar_edge.targets.onnx.precision import require_native_bf16, to_half
from bar_edge.targets.tensorrt.bundle import SCRIPT, write_bundle
from bar_edge.targets.tensorrt.device_build import ENGINE, build_and_check
from bar_edge.targets.tensorrt.engine import EngineOptions, import_tensorrt, manifest_path
from bar_edge.targets.verify import MANIFEST, MODEL, file_hash
from bar_edge.training import Task, evaluate
from bar_edge_calibration.collect import random_images
from bar_edge_calibration.finetune import finetune
from bar_edge_calibration.quantize import Promise, quantize
from bar_edge_calibration.recipe import Recipe, load_recipe

#: target -> the precisions that it can have
TARGETS = {
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
    "trt": ("fp32", "fp16", "bf16", "int8"),
    "trt-bundle": ("fp32", "fp16", "bf16", "int8"),
    "torch": ("fp32",),
}
#: target -> the runtime here that runs its file
RUNTIMES = {"onnx": "onnxruntime-cpu", "openvino": "openvino-cpu"}
#: (target, precision) that the runtime computes in by itself, told by a hint: the file stays in fp32
HINTED = {("openvino", "bf16")}
#: (target, precision) of files that nothing here computes but ONNX's reference implementation, image by image
UNSCORED = {("trt", "bf16"), ("trt-bundle", "bf16")}
#: lowerings where nothing can be measured: TensorRT fuses convolution and addition (unverified there)
UNMEASURED = {"int8": "regular:32", "fp16": "regular:8", "bf16": "regular:8", "fp32": "regular:4"}
#: target -> how INT8 can be laid out: what is measured where there is more than one
RECIPES = {
    "onnx": ("onnxruntime-cpu", "onnxruntime-amx"),
    "openvino": ("openvino-cpu",),
    "trt": ("tensorrt",),
    "trt-bundle": ("tensorrt",),
}
#: images that ranges are taken of, and that a bundle carries
CALIBRATION_IMAGES, BUNDLE_SAMPLES = 512, 256
BATCH = 64
#: how long each file is measured to choose a recipe, in seconds
RECIPE_S = 0.5
#: batches of the last rung
FINETUNE_STEPS = 200
#: how long an engine's build on another device may take, in seconds
BUILD_S = 3600.0


def check_target(target: str, precision: str, recipe: str, on: str, max_drop: float | None) -> None:
    """Raise EnvironmentLacks unless the target exists in this precision and here, InputError for a useless device.

    recipe: of INT8, or auto; InputError for another target's. max_drop: asks for a runtime here that computes the file.
    """
    if precision not in TARGETS.get(target, ()):
        known = "; ".join(f"{name} in {', '.join(precisions)}" for name, precisions in TARGETS.items())
        raise EnvironmentLacks(f"one of: {known}", got=f"{target} in {precision}", consequence="nothing was written")
    recipes = ("auto", *(RECIPES[target] if precision == "int8" else ()))
    if recipe not in recipes:
        raise InputError(
            f"--recipe {' or '.join(recipes)}, for {target} in {precision}",
            got=recipe,
            consequence="nothing was written",
        )
    if target == "trt" and on == "local":
        import_tensorrt()
    if (target, precision) in HINTED:
        require_native_bf16()
    if max_drop is not None and (target, precision) in UNSCORED:
        raise EnvironmentLacks(
            "a runtime here that computes the file, for --max-drop",
            got=f"{target} in {precision}, which ONNX Runtime has no kernels for",
            consequence="nothing was written",
            remedy="leave --max-drop away, or use fp16",
        )
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


def for_speed(precision: str, recipe: Recipe | None) -> Callable[[Path], None] | None:
    """Return what turns a file in float32 into one of the precision, in place, for measuring its speed alone.

    recipe: of INT8.
    """
    if precision == "int8" and recipe is not None:
        return lambda file: _to_int8(file, file, recipe)
    return (lambda file: to_half(file, file, "fp16")) if precision == "fp16" else None


def faster_recipe(target: str, network: Network, *, runtime: str | None, lowering: str, threads: int) -> Recipe:
    """Return the recipe of a target by which a network in INT8 runs faster on a runtime here.

    runtime: the target's if None. lowering: of the files that are measured, in turn. The first recipe unless
    another is faster beyond doubt.
    """
    best, *others = map(load_recipe, RECIPES[target])
    with tempfile.TemporaryDirectory() as scratch:
        source, file, other = (Path(scratch) / f"{name}.onnx" for name in ("source", "best", "other"))
        if others:
            export_onnx(lower(network, lowering), network.input_shapes, source)
        for recipe in others:
            for path, by in ((file, best), (other, recipe)):
                _to_int8(source, path, by)
            if file.read_bytes() != other.read_bytes():
                found = bench_onnx(
                    [file, other], runtime=runtime or RUNTIMES[target], threads=threads, seconds=RECIPE_S
                )
                best = recipe if compare(found[1], found[0]).low > 1 else best
    return best


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The metric of ONNX files on held-out training images."""

    data: DataSource
    task: Task
    #: of the network's outputs
    structure: Any
    #: from normalised images to what the file's input is
    as_input: Callable[[Tensor], Tensor]
    #: compute what a file means, where no runtime here is the one that it is for
    as_written: bool = False

    def score(self, model: Path, hint: str | None = None) -> float:
        """Return the metric in ONNX Runtime, or in OpenVINO with its hint; higher is better."""
        run = _openvino(model, hint) if hint else _onnxruntime(model, self.as_written)
        module = _Session(run, self.structure, self.as_input)
        metric = evaluate(module, self.data.held_out, self.task, batch=256, device="cpu", precision="fp32")
        return metric if self.task.higher_is_better else -metric

    def compare(self, source: Path, model: Path, precision: str, hint: str | None) -> dict[str, float]:
        """Return the metric of a file in float32 and of what was made of it, and the drop in points."""
        before, after = self.score(source), self.score(model, hint)
        sign = 1 if self.task.higher_is_better else -1
        return {"fp32": sign * before, precision: sign * after, "drop_points": 100 * (before - after)}


def write_converted(
    source: Path,
    folder: Path,
    *,
    target: str,
    precision: str,
    recipe: Recipe | None,
    held_out: HeldOut,
    max_drop: float | None,
    tuned: Callable[[Path], None],
    on: str,
    engine: EngineOptions,
) -> dict[str, Any]:
    """Write the artifact of a target from one in float32, and return its manifest.

    recipe: of INT8, which is calibrated on training images, and held to max_drop points on the held-out ones; tuned:
    writes the float file anew for that, see `finetuned`. Raises InputError for too few images.
    """

    def int8(model: Path, new: Path) -> dict[str, Any]:
        assert recipe is not None, "INT8 is laid out by a recipe"
        data = held_out.data
        record = quantize(
            model,
            new,
            images=Images(split=data.fit, number=CALIBRATION_IMAGES, as_input=held_out.as_input),
            data=data.name,
            recipe=recipe,
            promise=Promise(score=held_out.score, max_drop=max_drop, finetune=tuned) if max_drop is not None else None,
        )
        if data.name == RANDOM:
            warning = "random images: the ranges mean nothing, the file is for measuring speed"
            record["warnings"] = [*record["warnings"], warning]
        return record

    on_device = target.startswith("trt")
    with tempfile.TemporaryDirectory() as scratch:
        if precision == "int8":
            whole = Path(scratch) / "int8" if on_device else folder
            manifest = convert_artifact(
                source, whole, target=target, precision=precision, convert=int8, own_outputs=True
            )
            if not (on_device and manifest["parity"]["within"]):
                return manifest
            source = whole
        elif (target, precision) in HINTED:
            return convert_artifact(source, folder, target=target, precision=precision, convert=_copy, hint=precision)
        elif not on_device:
            return convert_artifact(source, folder, target=target, precision=precision, convert=_to_fp16)
        return write_trt(source, folder, target=target, precision=precision, on=on, engine=engine)


def prove(manifest: dict[str, Any], folder: Path, source: Path, *, held_out: HeldOut, threads: int) -> dict[str, Any]:
    """Compare an artifact in its target's runtime, and measure and score it beside the one in float32 it was made of.

    Returns the manifest with `parity`, `latency`, `speedup_over_fp32` and `held_out`, as far as a runtime here runs
    the file and images mean something; it stands in the folder, too.
    """
    target, precision, made = manifest["target"], manifest["precision"], folder != source
    if target in RUNTIMES:
        # a file of another recipe may kill a runtime: that is a process of its own
        found = bench_onnx(
            [folder, source] if made else [folder], runtime=RUNTIMES[target], threads=threads, seconds=1.0
        )
        comparison = compare(found[0], found[1]) if made else None
        manifest |= {"parity": _parity(found[0]), "latency": _latency(folder, found[0], comparison)}
        if comparison is not None:
            manifest["speedup_over_fp32"] = {name: getattr(comparison, name) for name in ("speedup", "low", "high")}
    if made and held_out.data.name != RANDOM and (target, precision) not in UNSCORED:
        files = (source / MODEL, folder / MODEL)
        manifest["held_out"] = held_out.compare(*files, precision, manifest.get("precision_hint"))
    write_json(folder / MANIFEST, manifest)
    return manifest


def finetuned(
    network: Network, lowering: str, data: DataSource, preprocessing: Preprocessing | None
) -> Callable[[Path], None]:
    """Return what writes a network's float file anew, with weights that learned under rounding on training images."""

    def write(file: Path) -> None:
        batches = data.fit.batches(BATCH, train=True, seed=0, epoch=0, device="cpu", augment="none")
        learned = finetune(folded(network), (images for images, _ in itertools.islice(batches, FINETUNE_STEPS)))
        export_onnx(lower(learned, lowering), network.input_shapes, file, preprocessing=preprocessing)

    return write


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
        measured = measurement(folder / MODEL, answer["models"][0], answer, on)
        manifest |= {"target": "trt", "parity": _parity(measured)}
        if manifest["parity"]["within"]:
            manifest["latency"] = _latency(folder, measured)
            manifest["files"][ENGINE] = {"sha256": file_hash(folder / ENGINE)}
        write_json(folder / MANIFEST, manifest)
    return manifest


def _parity(measured: Measurement) -> dict[str, Any]:
    parity = dict(measured.parity or {})
    return {"samples": parity.pop("n"), **parity}


def _latency(folder: Path, measured: Measurement, comparison: Comparison | None = None) -> dict[str, Any]:
    """Save a measurement beside an artifact, and return what its manifest says of it."""
    return {
        "p50_ms": measured.percentile_ms(50),
        "parts_p50_ms": {part: times["p50"] for part, times in (measured.parts_ms or {}).items()},
        "batch": measured.batch,
        "file": save_measurement(folder, measured, comparison=comparison).name,
    }


def _to_int8(source: Path, new: Path, recipe: Recipe) -> None:
    images = random_images(onnx.load(source), BATCH, 0)
    quantize(source, new, images=images, data="random", recipe=recipe)


def _copy(model: Path, new: Path) -> None:
    shutil.copyfile(model, new)


def _to_fp16(model: Path, new: Path) -> None:
    to_half(model, new, "fp16")


def _onnxruntime(model: Path, as_written: bool) -> Callable[[np.ndarray], Sequence[np.ndarray]]:
    session = cpu_session(model, as_written=as_written)
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def _openvino(model: Path, precision: str) -> Callable[[np.ndarray], Sequence[np.ndarray]]:
    """Return what runs a file as it is measured: an image at a time."""
    loaded = runner.load_openvino_cpu(model, model.name, runner.Settings(1, 1, precision, alone=True))

    def run(images: np.ndarray) -> Sequence[np.ndarray]:
        each = [[output.copy() for output in loaded.run([image[None]])] for image in images]
        return [np.concatenate(outputs) for outputs in zip(*each, strict=True)]

    return run


class _Session(nn.Module):
    """A file in a runtime as a module, on the CPU."""

    def __init__(
        self,
        run: Callable[[np.ndarray], Sequence[np.ndarray]],
        structure: Any,
        as_input: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.run, self.structure, self.as_input = run, structure, as_input

    def forward(self, images: Tensor) -> Any:
        outputs = self.run(self.as_input(images).numpy())
        return unflatten(tuple(map(torch.from_numpy, outputs)), self.structure)
