"""TensorRT: a bundle that builds its engine on the device, or the engine itself, built here or there."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from bar_edge.bench import measurement
from bar_edge.bench.ssh import Device
from bar_edge.bench.ssh import Target as Place
from bar_edge.errors import BarEdgeError, EnvironmentLacks, InputError
from bar_edge.files import file_hash, write_json
from bar_edge.models.zoo import parse_arguments
from bar_edge.records.lowering import Lowering
from bar_edge.targets.convert import convert_to_int8
from bar_edge.targets.measured import latency_of, parity_of
from bar_edge.targets.row import Conversion, Target
from bar_edge.targets.tensorrt.bindings import import_tensorrt
from bar_edge.targets.tensorrt.bundle import SCRIPT, write_bundle
from bar_edge.targets.tensorrt.device_build import BUILDER, ENGINE, RUNNER, build_and_check
from bar_edge.targets.tensorrt.engine import manifest_path
from bar_edge.targets.tensorrt.options import EngineOptions
from bar_edge.targets.verify import MANIFEST, MODEL

#: how long an engine's build on another device may take, in seconds
BUILD_S = 3600.0


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


def write_engine(bundle: Path, on: str) -> dict[str, Any]:
    """Build the engine of a bundle here or on a device, beside it, and return what its build script says of it.

    The engine is compared with the expected outputs and measured where it was built; a wrong one is removed. Raises
    EnvironmentLacks without TensorRT's Python bindings or GPU, BarEdgeError if the build fails.
    """
    if on == "local":
        return build_and_check(bundle)
    kept = f"no engine was brought here; its bundle is {bundle.name}"
    with Device(Place.parse(on)) as device:
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


def convert_to_bundle(asked: Conversion) -> dict[str, Any]:
    """Write a bundle from an artifact in float32, and return its manifest."""
    with tempfile.TemporaryDirectory() as scratch:
        source = asked.source
        if asked.precision == "int8":
            source = Path(scratch) / "int8"
            manifest = convert_to_int8(asked, source, "trt-bundle")
            if not manifest["parity"]["within"]:
                return manifest
        return write_bundle(source, asked.folder, precision=asked.precision, options=asked.engine)


def convert_to_engine(asked: Conversion) -> dict[str, Any]:
    """Write a bundle and, beside it, the engine that it builds; returns the manifest."""
    manifest, folder = convert_to_bundle(asked), asked.folder
    if manifest["parity"]["within"]:
        answer = write_engine(folder, asked.on)
        measured = measurement(folder / MODEL, answer["models"][0], answer, asked.on)
        manifest |= {"target": "trt", "parity": parity_of(measured)}
        if manifest["parity"]["within"]:
            manifest["latency"] = latency_of(folder, measured)
            manifest["files"][ENGINE] = {"sha256": file_hash(folder / ENGINE)}
        write_json(folder / MANIFEST, manifest)
    return manifest


TRT_BUNDLE = Target(
    name="trt-bundle",
    files=(MODEL, BUILDER, SCRIPT, RUNNER),
    precisions=("fp32", "fp16", "bf16", "int8"),
    convert=convert_to_bundle,
    # TensorRT fuses convolution and addition (unverified there)
    unmeasured={
        precision: Lowering.parse(form)
        for precision, form in {
            **{"fp32": "regular:4", "fp16": "regular:8", "bf16": "regular:8", "int8": "regular:32"}
        }.items()
    },
    recipes=("tensorrt",),
    unscored=("bf16",),
    samples=256,
)
TRT = dataclasses.replace(
    TRT_BUNDLE,
    name="trt",
    files=(*TRT_BUNDLE.files, ENGINE),
    convert=convert_to_engine,
    needs=lambda _: import_tensorrt(),
    on_device=True,
)
