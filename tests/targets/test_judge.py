"""INT8 is judged by what a file means, and its files are right on processors whose products overflow.

The arithmetic of such a processor is computed in numpy (tests/calibration/saturating.py), on every machine; where the
kernel lets a process see another processor, the runtimes themselves run as there (tests/avx2_only.c).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from bar_edge.bench.runner import device as processor
from bar_edge.lowering.lower import lower
from bar_edge.models import build
from bar_edge.network import trace
from bar_edge.records.lowering import Lowering
from bar_edge.records.tolerance import TOLERANCES
from bar_edge.targets.artifact import ArtifactSpec, convert_artifact, write_artifact
from bar_edge.targets.onnx.file import export_onnx
from bar_edge.targets.onnx.parity import cpu_session, difference, relative
from bar_edge.targets.verify import file_precision, overflow_note, read_manifest, sample_error, verify_artifact
from bar_edge_calibration.quantize import quantize
from bar_edge_calibration.recipe import load_recipe
from tests.calibration import saturating
from tests.reference import randomise

SHAPE = (3, 8, 8)
#: of a weight in INT8
Bits = Literal[7, 8]
#: a CPU that adds products in 16 bits, one that does not, and one that does not tell
HASWELL: dict[str, Any] = {"machine": "x86_64", "abilities": "avx2"}
OTHERS: list[dict[str, Any]] = [
    {"machine": "x86_64", "abilities": "avx2 avx512f avx512_vnni"},
    {"machine": "x86_64", "abilities": "avx2 avx_vnni"},
    {"machine": "x86_64", "abilities": "amx_int8"},
    {"machine": "aarch64", "abilities": "asimddp"},
    {"machine": "x86_64", "abilities": None},
]


class TwoHalves(nn.Module):
    """Two halves of a convolution added: the network of the report."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        halves = self.second(self.first(x).relu())
        return halves[:, :8] + halves[:, 8:]


def two_halves(weight: float = 0.1) -> nn.Module:
    """Averages of bright values: all that is summed has one sign, and is large."""
    torch.manual_seed(0)
    network = TwoHalves()
    with torch.no_grad():
        network.first.weight.mul_(0.1)
        network.first.bias.fill_(1.0)  # type: ignore[union-attr]
        network.second.weight.fill_(weight)
    return network


def zoo(name: str) -> Callable[[], nn.Module]:
    return lambda: randomise(build(name, input_shape=SHAPE, classes=4), removed=0.3)


def row(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(layer() for layer in layers))

    return made


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "two halves": two_halves,
    "two halves, negative": lambda: two_halves(-0.1),
    "resnet8": zoo("resnet8"),
    "wrn-10-1": zoo("wrn-10-1"),
    "one layer": row(lambda: nn.Conv2d(3, 8, 3)),
    "pointwise": row(lambda: nn.Conv2d(3, 32, 1), nn.ReLU, lambda: nn.Conv2d(32, 8, 1)),
    "groups": row(lambda: nn.Conv2d(3, 16, 3), nn.ReLU6, lambda: nn.Conv2d(16, 16, 3, groups=4, stride=2)),
    "depthwise": row(lambda: nn.Conv2d(3, 16, 3), nn.ReLU, lambda: nn.Conv2d(16, 16, 3, groups=16)),
    "linear": row(nn.Flatten, lambda: nn.Linear(192, 64), nn.ReLU, lambda: nn.Linear(64, 4)),
    "pooled": row(lambda: nn.Conv2d(3, 24, 3), nn.ReLU, lambda: nn.MaxPool2d(2), nn.Flatten, lambda: nn.Linear(216, 4)),
}


def images(number: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (number, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every network's file in float."""
    folder = tmp_path_factory.mktemp("float")
    for name, network in NETWORKS.items():
        lowered = lower(trace(network().eval(), torch.zeros(2, *SHAPE)).eval(), Lowering.parse("slices"))
        export_onnx(lowered, SHAPE, folder / f"{name}.onnx")
    return folder


def int8_file(source: Path, folder: Path, recipe: str = "onnxruntime-cpu", bits: Bits | None = None) -> Path:
    """Write a network's file with weights of so many bits; those of the recipe by default."""
    target, by = folder / f"{source.stem}.{recipe}.{bits}.onnx", load_recipe(recipe)
    by = by if bits is None else dataclasses.replace(by, weight_bits=bits)
    quantize(source, target, images=[images()], data="noise", recipe=by)
    return target


def meaning(file: Path, data: np.ndarray) -> list[np.ndarray]:
    return list(cpu_session(file, as_written=True).run(None, {"input": data}))


# ------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("recipe", ["onnxruntime-cpu", "onnxruntime-amx", "openvino-cpu"])
@pytest.mark.parametrize("name", NETWORKS)
def test_shipped_files_mean_the_same_where_products_overflow(
    floats: Path, name: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bar_edge_calibration.place.LARGE", 100)
    file, data = int8_file(floats / f"{name}.onnx", tmp_path, recipe), images(2, seed=1)
    overflowing = saturating.run(onnx.load(file), data)
    exact = saturating.run(onnx.load(file), data, bits=32)
    assert all(np.array_equal(a, b) for a, b in zip(exact, overflowing, strict=True))
    assert relative(*difference(meaning(file, data), overflowing)) <= TOLERANCES["int8"]


def test_with_eight_bits_the_two_halves_are_off_by_a_third(floats: Path, tmp_path: Path) -> None:
    file, data = int8_file(floats / "two halves.onnx", tmp_path, bits=8), images(4, seed=1)
    overflowing, exact = (saturating.run(onnx.load(file), data, bits=bits) for bits in (16, 32))
    assert relative(*difference(meaning(file, data), exact)) <= TOLERANCES["int8"]
    assert relative(*difference(meaning(file, data), overflowing)) > 0.2


def test_the_judge_multiplies_no_integers(floats: Path, tmp_path: Path) -> None:
    """By ONNX Runtime's own account of what it ran."""
    file, ran = int8_file(floats / "two halves.onnx", tmp_path), list[set[str]]()
    for as_written in (True, False):
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / str(as_written))
        if as_written:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        session.run(None, {"input": images(1)})
        events = json.loads(Path(session.end_profiling()).read_text())
        ran.append({event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})})
    assert {"QuantizeLinear", "DequantizeLinear", "Conv", "Add"} <= ran[0]
    assert not any("QLinear" in name or "Integer" in name for name in ran[0])
    assert "QLinearConv" in ran[1]


# ------------------------------------------------------------------------------------------ verdicts


@pytest.fixture
def artifact(tmp_path: Path) -> Callable[..., Path]:
    """Writes an INT8 artifact of the two halves, with weights of so many bits."""

    def write(bits: Bits, target: str = "onnx") -> Path:
        network = trace(two_halves().eval(), torch.zeros(2, *SHAPE)).eval()
        write_artifact(network, tmp_path / "float", samples=torch.from_numpy(images(8, seed=1)), spec=ArtifactSpec())
        by = dataclasses.replace(load_recipe("onnxruntime-cpu"), weight_bits=bits)

        def convert(source: Path, new: Path) -> dict[str, Any]:
            return quantize(source, new, images=[images()], data="noise", recipe=by)

        folder = tmp_path / "int8"
        manifest = convert_artifact(
            tmp_path / "float", folder, target=target, precision="int8", convert=convert, own_outputs=True
        )
        assert manifest["parity"]["within"] and manifest["conversion"]["recipe"]["weight_bits"] == bits
        return folder

    return write


def parity_of(folder: Path) -> tuple[bool, str]:
    check = verify_artifact(folder)[-1]
    assert check.name == "parity"
    return check.passed, check.detail


def test_a_runtime_that_computes_something_else_is_a_no(
    artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime's integers do where products overflow; the meaning stays what it is."""
    honest = cpu_session

    class Overflowing:
        def __init__(self, path: Path) -> None:
            self.model = onnx.load(str(path))

        def run(self, _: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            return saturating.run(self.model, *feed.values())

    def session(path: Path, *, as_written: bool = False) -> Any:
        return honest(path, as_written=True) if as_written else Overflowing(path)

    def here(
        folder: Path, _: float
    ) -> tuple[float, int]:  # not in a process of its own, which would have no such session
        manifest = read_manifest(folder)
        return sample_error(folder, manifest, file_precision(manifest))

    def overflow() -> None:
        monkeypatch.setattr("bar_edge.targets.verify.cpu_session", session)
        monkeypatch.setattr("bar_edge.targets.verify._sample_error_apart", here)

    shipped = artifact(7)
    overflow()
    assert parity_of(shipped)[0]
    monkeypatch.undo()
    eight = artifact(8)
    assert parity_of(eight)[0]
    overflow()
    assert not parity_of(eight)[0]
    with pytest.raises(AssertionError):  # and as it is written, too
        artifact(8)
    # what TensorRT computes is not ONNX Runtime's to say
    assert parity_of(artifact(8, target="trt-bundle"))[0]


def test_verify_says_where_a_file_of_eight_bits_overflows(
    artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = artifact(8)
    manifest = read_manifest(folder)
    seven = {**manifest["conversion"], "recipe": {**manifest["conversion"]["recipe"], "weight_bits": 7}}
    assert overflow_note(manifest, HASWELL) and overflow_note(manifest | {"target": "openvino"}, HASWELL)
    assert not any(overflow_note(manifest, device) for device in OTHERS)
    assert not overflow_note(manifest | {"conversion": seven}, HASWELL)
    assert not overflow_note(manifest | {"target": "trt-bundle"}, HASWELL)
    for device, expected in ((HASWELL, True), (OTHERS[0], False)):
        monkeypatch.setattr(processor, "device", lambda with_gpu, device=device: device)
        assert ("without VNNI and AMX" in parity_of(folder)[1]) == expected


def test_artifacts_of_earlier_versions_have_eight_bits() -> None:
    old = {"precision": "int8", "target": "onnx", "conversion": {"recipe": {"name": "onnxruntime-cpu"}}}
    assert overflow_note(old, HASWELL) and not overflow_note(old | {"precision": "fp16"}, HASWELL)
    assert not overflow_note({}, HASWELL)


def test_the_runner_tells_what_the_processor_can() -> None:
    told = processor.device(with_gpu=False)
    if sys.platform == "linux" and told["machine"] == "x86_64":
        assert ("avx2" in told["abilities"].split()) == ("avx2" in Path("/proc/cpuinfo").read_text().split())


# ------------------------------------------------------------------------------------------ the runtimes themselves

PROGRAM = """
import sys, numpy, onnxruntime
images = numpy.load(sys.argv[1])
for runtime, file in zip(sys.argv[2::2], sys.argv[3::2]):
    if runtime == "openvino":
        import openvino
        model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = model([images])[0]
    else:
        found = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"input": images})[0]
    numpy.save(f"{file}.{runtime}.npy", found)
"""
RECIPE_OF = {"onnxruntime": "onnxruntime-cpu", "openvino": "openvino-cpu"}


def preloads(folder: Path) -> list[dict[str, str]]:
    """Return the environments of a process on this processor and, where it may be shown another, on one with AVX2."""
    compiler, library = shutil.which("cc"), folder / "avx2_only.so"
    if compiler is None or sys.platform != "linux" or os.uname().machine != "x86_64":
        return [{}]
    source = Path(__file__).parents[1] / "avx2_only.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    shown = {"LD_PRELOAD": str(library)}
    works = subprocess.run(["true"], env={**os.environ, **shown}, capture_output=True, check=False).returncode == 0
    return [{}, shown] if works else [{}]


def test_runtimes_compute_what_shipped_files_mean_with_and_without_vnni(floats: Path, tmp_path: Path) -> None:
    """In ONNX Runtime and OpenVINO, on this processor, and as on one with AVX2 alone where a process may see it so."""
    np.save(tmp_path / "images.npy", data := images(8, seed=1))
    runtimes = [name for name in RECIPE_OF if importlib.util.find_spec(name) is not None]
    files = {
        (name, runtime, bits): int8_file(floats / f"{name}.onnx", tmp_path, RECIPE_OF[runtime], bits)
        for name in NETWORKS
        for runtime in runtimes
        for bits in (7, 8)
    }
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "images.npy")]
    command += [word for (_, runtime, _), file in files.items() for word in (runtime, str(file))]
    for preload in preloads(tmp_path):
        done = subprocess.run(command, env={**os.environ, **preload}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-500:]
        print("as with AVX2 alone:" if preload else "on this processor:")
        errors = {}
        for key, file in files.items():
            got = np.load(f"{file}.{key[1]}.npy")
            errors[key] = relative(*difference(meaning(file, data), [got]))
            print(*key, f"{errors[key]:.4f}")
        assert max(error for (_, _, bits), error in errors.items() if bits == 7) <= TOLERANCES["int8"]
        assert not preload or errors["two halves", "onnxruntime", 8] > 0.3
