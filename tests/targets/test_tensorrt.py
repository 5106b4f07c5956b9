"""Our TensorRT module end to end against a stand-in that offers exactly what the real bindings do."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bar_edge.errors import BarEdgeError, EnvironmentLacks, InputError
from bar_edge.targets.tensorrt import cuda
from bar_edge.targets.tensorrt.build import build
from bar_edge.targets.tensorrt.engine import foreign, load, manifest_path
from bar_edge.targets.tensorrt.options import EngineOptions
from tests.targets.fake_tensorrt import COMPUTE_MS, D2H_MS, H2D_MS, SURFACE, FakeDriver, World, fits, make_tensorrt
from tests.targets.tensorrt_surface import WHEELS, download

VERSIONS = list(WHEELS)


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    """Two convolutions and an addition with a free batch."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array((rng.standard_normal((4, 4, 3, 3)) / 6).astype("f4"), n) for n in ("w1", "w2")]
    nodes = [
        helper.make_node("Conv", ["input", "w1"], ["a"], name="/conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="/relu"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="/conv10", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["a", "c"], ["d"], name="/add"),
        helper.make_node("Sigmoid", ["d"], ["output"], name="/sigmoid"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4, 6, 6]) for n in ("input", "output")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


#: makes a world, and puts a driver and a TensorRT of it in the place of the real ones
Pretend = Callable[..., tuple[World, FakeDriver]]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Install a stand-in for TensorRT and the driver; returns both notes."""

    def install(**settings: Any) -> tuple[World, FakeDriver]:
        world = World(**settings)
        driver = FakeDriver(world)
        monkeypatch.setattr(cuda, "load_libcuda", lambda: driver)
        monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(world, driver))
        return world, driver

    return install


def reference(path: Path, images: np.ndarray) -> np.ndarray:
    outputs = ReferenceEvaluator(str(path)).run(None, {"input": images})
    assert isinstance(outputs, list)
    return outputs[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_builds_and_runs_in_every_version(version: str, onnx_file: Path, tmp_path: Path, pretend: Pretend) -> None:
    world, driver = pretend(version=version, warning="a weight is subnormal")
    options = EngineOptions(batch=(1, 2, 4), workspace_mib=256, timing_caches=str(tmp_path / "caches"))
    manifest = build(onnx_file, tmp_path / "model.engine", options)
    assert manifest == json.loads(manifest_path(tmp_path / "model.engine").read_text())
    assert manifest["tensorrt"] == SURFACE[version]["version"]
    assert manifest["gpu"] == {"name": "Orin", "compute_capability": "8.7", "cuda": "12.6"}
    assert manifest["profile"] == {"input": [[1, 4, 6, 6], [2, 4, 6, 6], [4, 4, 6, 6]]}
    assert manifest["warnings"] == ["a weight is subnormal"] and manifest["dla_fallback"] == []
    assert world.config._pools == {"WORKSPACE": 256 << 20}
    assert "TF32" not in {flag.name for flag in world.config._flags}

    engine = load(tmp_path / "model.engine", onnx_file)
    assert engine.inputs == {"input": (-1, 4, 6, 6)} and engine.outputs == {"output": (-1, 4, 6, 6)}
    rng = np.random.default_rng(1)
    for batch in (1, 4, 4, 2):  # new shapes, the same again, others
        images = rng.standard_normal((batch, 4, 6, 6)).astype("f4")
        (got,) = engine.run([images])
        np.testing.assert_allclose(got, reference(onnx_file, images), atol=1e-5)  # ONNX Runtime against numpy
    layers = engine.layers_ms([images])
    assert list(layers)[1:] == ["/conv1", "/relu", "/conv10", "/add", "/sigmoid"]
    assert layers["/conv10"] == layers["/conv1"] > layers["/add"] > 0
    np.testing.assert_allclose(engine.run([images])[0], got)  # its own graph is as it was
    timing = engine.timing
    assert timing is not None
    assert (timing.h2d, timing.compute, timing.d2h) == (H2D_MS, COMPUTE_MS, D2H_MS)
    assert timing.total > timing.enqueue > 0
    assert len(driver.host_memory) == len(driver.device_memory) == 2, "buffers of earlier shapes were kept"
    assert {"Builder.build_serialized_network", "IExecutionContext.execute_async_v3"} <= world.used


def test_the_stand_in_refuses_what_a_version_lacks(pretend: Pretend) -> None:
    import importlib

    pretend(version="11.4")
    trt = importlib.import_module("tensorrt")
    with pytest.raises(AttributeError):
        _ = trt.BuilderFlag.FP16
    log = type("Log", (trt.ILogger,), {"log": lambda *_: None})()
    config = trt.Builder(log).create_builder_config()
    with pytest.raises(AssertionError, match="int8_calibrator"):
        config.int8_calibrator = 1
    with pytest.raises(AssertionError, match="cannot be set"):
        trt.OnnxParser(trt.Builder(log).create_network(1), log).num_errors = 1
    with pytest.raises(AssertionError, match="set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, "1G")
    with pytest.raises(AssertionError, match="Builder"):
        trt.Builder("no logger")


def test_signatures_are_read_as_recorded() -> None:
    assert fits("(flags: int = 0) -> X", (), {}, {}) and fits("(flags: int = 0) -> X", (1,), {}, {})
    assert not fits("(flags: int = 0) -> X", (1, 2), {}, {}) and not fits("(a: int) -> X", (), {}, {})
    assert fits("(a: str, b: tuple) -> X | (a: str, b: list) -> X", ("n", [1]), {}, {})
    assert not fits("(a: str) -> X", (), {"b": "n"}, {}) and not fits("(a: bool) -> X", (1,), {}, {})


def test_timing_caches_are_kept_per_version_and_device(onnx_file: Path, tmp_path: Path, pretend: Pretend) -> None:
    options = EngineOptions(timing_caches=str(tmp_path / "caches"))
    world, _ = pretend(version="10.3")
    build(onnx_file, tmp_path / "a.engine", options)
    build(onnx_file, tmp_path / "b.engine", options)
    assert world.caches == [b"", b"|timed"]
    pretend(version="11.4", gpu="NVIDIA H200", compute_capability=(9, 0))
    build(onnx_file, tmp_path / "c.engine", options)
    names = sorted(path.name for path in (tmp_path / "caches").iterdir())
    assert names == ["timing-10.3.0-Orin-8.7.cache", "timing-11.4.0.106-NVIDIA-H200-9.0.cache"]
    # a cache that TensorRT does not take is replaced by a new one
    (tmp_path / "caches" / names[0]).write_bytes(b"foreign")
    world, _ = pretend(version="10.3")
    build(onnx_file, tmp_path / "d.engine", options)
    assert world.caches == [b"foreign", b""]
    assert (tmp_path / "caches" / names[0]).read_bytes() == b"|timed"


def test_a_rejected_node_is_named(onnx_file: Path, tmp_path: Path, pretend: Pretend) -> None:
    pretend(unknown=frozenset({"Add"}))
    with pytest.raises(InputError) as caught:
        build(onnx_file, tmp_path / "model.engine")
    text = str(caught.value)
    assert "Add '/add' (node 3)" in text and "UNSUPPORTED_NODE" in text and "--lowering slices" in text
    assert not (tmp_path / "model.engine").exists()


@pytest.mark.parametrize(
    ("log", "named", "remedy"),
    [
        (
            "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation for "
            "node /conv10 + /add.)",
            ["CONVOLUTION '/conv10' -1x4x6x6 -> -1x4x6x6", "'/add'"],
            "no workspace limit",
        ),
        ("[defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)", [], "smaller largest batch"),
        (
            "ITensor::getDimensions: Error Code 4: API Usage Error (/add: ElementWiseOperation SUM must have same "
            "input types. But they are of types Half and Float.)",
            ["'/add' -1x4x6x6, -1x4x6x6 -> -1x4x6x6"],
            "strongly typed",
        ),
    ],
)
def test_a_failed_build_names_layers_shapes_and_a_remedy(
    log: str, named: list[str], remedy: str, onnx_file: Path, tmp_path: Path, pretend: Pretend
) -> None:
    pretend(build_error=log)
    (tmp_path / "model.engine").write_bytes(b"old")
    with pytest.raises(BarEdgeError) as caught:
        build(onnx_file, tmp_path / "model.engine", EngineOptions(batch=(1, 1, 8)))
    text = str(caught.value)
    assert log in text and remedy in text and all(part in text for part in named)
    assert "'/conv1'" not in text, "a name that is the beginning of another one"
    assert (tmp_path / "model.engine").read_bytes() == b"old"


def test_dla_lists_the_layers_that_fall_back(onnx_file: Path, tmp_path: Path, pretend: Pretend) -> None:
    world, _ = pretend(dla_cores=2)
    manifest = build(onnx_file, tmp_path / "model.engine", EngineOptions(dla_core=1))
    assert manifest["dla_fallback"] == ["/sigmoid"]
    assert world.config.DLA_core == 1 and world.config.default_device_type.name == "DLA"
    assert "GPU_FALLBACK" in {flag.name for flag in world.config._flags}
    with pytest.raises(InputError, match="no dynamic shapes"):
        EngineOptions(dla_core=0, batch=(1, 1, 8))


def test_no_dla_is_said(onnx_file: Path, tmp_path: Path, pretend: Pretend) -> None:
    pretend(version="10.16")
    with pytest.raises(EnvironmentLacks, match="0 cores that TensorRT 10.16.1.11"):
        build(onnx_file, tmp_path / "model.engine", EngineOptions(dla_core=0))


def test_compatibility_options(onnx_file: Path, tmp_path: Path, pretend: Pretend) -> None:
    world, _ = pretend(version="10.3")
    options = EngineOptions(version_compatible=True, hardware="ampere+", tf32=True, optimization_level=5)
    build(onnx_file, tmp_path / "model.engine", options)
    assert {flag.name for flag in world.config._flags} == {"TF32", "VERSION_COMPATIBLE"}
    assert world.config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert world.config.builder_optimization_level == 5
    pretend(version="10.16", gpu="NVIDIA H200", compute_capability=(9, 0))
    assert load(tmp_path / "model.engine", onnx_file).outputs
    pretend(version="10.3")
    with pytest.raises(EnvironmentLacks, match="use ampere"):
        build(onnx_file, tmp_path / "b.engine", EngineOptions(hardware="same-compute-capability"))


def test_foreign_and_changed_engines_are_refused(onnx_file: Path, tmp_path: Path, pretend: Pretend) -> None:
    pretend(version="10.3")
    engine = tmp_path / "model.engine"
    build(onnx_file, engine, rebuild="python3 build.py")
    for settings, reason in (
        ({"version": "10.16"}, "TensorRT 10.16.1.11; the engine was built by 10.3.0"),
        ({"gpu": "Thor", "compute_capability": (11, 0)}, r"Thor \(11.0\); built for Orin"),
        ({"gpu": "Other Orin"}, "Other Orin"),
    ):
        pretend(**{"version": "10.3", **settings})
        with pytest.raises(EnvironmentLacks, match=reason) as caught:
            load(engine, onnx_file)
        assert "python3 build.py" in str(caught.value)
    pretend(version="10.3")
    other = tmp_path / "other.onnx"
    shutil.copyfile(onnx_file, other)
    other.write_bytes(other.read_bytes() + b"\n")
    with pytest.raises(InputError, match="built from another file"):
        load(engine, other)
    engine.write_bytes(engine.read_bytes() + b" ")
    with pytest.raises(InputError, match="other bytes"):
        load(engine, onnx_file)
    manifest_path(engine).unlink()
    with pytest.raises(InputError, match="executable code"):
        load(engine, onnx_file)
    with pytest.raises(InputError, match="No such file"):
        build(tmp_path / "missing.onnx", engine)


@pytest.mark.parametrize(
    ("hardware", "vc", "version", "gpu", "fits_machine"),
    [
        ("none", False, "10.3.0", ("Orin", "8.7"), True),
        ("none", False, "10.3.0", ("Orin Nano", "8.7"), False),
        ("same-compute-capability", False, "10.3.0", ("Orin Nano", "8.7"), True),
        ("same-compute-capability", False, "10.3.0", ("RTX 4090", "8.9"), False),
        ("ampere+", False, "10.3.0", ("Thor", "11.0"), True),
        ("ampere+", False, "10.3.0", ("T4", "7.5"), False),
        ("none", True, "11.4.0.106", ("Orin", "8.7"), True),
        ("none", True, "10.2.0", ("Orin", "8.7"), False),
    ],
)
def test_which_machine_an_engine_fits(
    hardware: str, vc: bool, version: str, gpu: tuple[str, str], fits_machine: bool
) -> None:
    manifest = {
        "tensorrt": "10.3.0",
        "gpu": {"name": "Orin", "compute_capability": "8.7"},
        "options": {"hardware": hardware, "version_compatible": vc},
    }
    reason = foreign(manifest, version, cuda.Gpu(name=gpu[0], compute_capability=gpu[1], cuda="12.6"))
    assert (reason == "") is fits_machine


def test_input_outside_the_batch_range_is_refused(onnx_file: Path, tmp_path: Path, pretend: Pretend) -> None:
    pretend()
    build(onnx_file, tmp_path / "model.engine", EngineOptions(batch=(1, 1, 2)))
    engine = load(tmp_path / "model.engine")
    for images in (np.zeros((3, 4, 6, 6), "f4"), np.zeros((1, 4, 6, 6), "f8")):
        with pytest.raises(InputError, match="batch range"):
            engine.run([images])


def test_shapes_that_are_free_besides_the_batch_are_refused(onnx_file: Path, tmp_path: Path, pretend: Pretend) -> None:
    pretend()
    model = onnx.load(onnx_file)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, onnx_file)
    with pytest.raises(InputError, match="one image size"):
        build(onnx_file, tmp_path / "model.engine")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
        value.type.tensor_type.shape.dim[2].dim_value = 6
    onnx.save(model, onnx_file)
    with pytest.raises(InputError, match="batch 2, which the file fixes"):
        build(onnx_file, tmp_path / "model.engine")
    assert build(onnx_file, tmp_path / "model.engine", EngineOptions(batch=(2, 2, 2)))["profile"] == {}


@pytest.mark.parametrize(
    "options", [{"batch": (2, 1, 4)}, {"batch": (0, 1, 1)}, {"hardware": "volta"}, {"optimization_level": 6}]
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        EngineOptions(**options)


def test_what_a_machine_lacks(
    onnx_file: Path, tmp_path: Path, pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(devices=0)
    with pytest.raises(EnvironmentLacks, match="CUDA_ERROR_NO_DEVICE"):
        build(onnx_file, tmp_path / "model.engine")
    pretend(broken_driver=True)
    with pytest.raises(EnvironmentLacks, match="CUDA initialization failure"):
        build(onnx_file, tmp_path / "model.engine")
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "8.6.1", raising=False)
    with pytest.raises(EnvironmentLacks, match="TensorRT 10 or 11"):
        build(onnx_file, tmp_path / "model.engine")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EnvironmentLacks, match="trt-bundle") as caught:
        build(onnx_file, tmp_path / "model.engine")
    assert caught.value.exit_code == 3

    def no_driver() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    pretend()
    monkeypatch.setattr(cuda, "load_libcuda", no_driver)
    with pytest.raises(EnvironmentLacks, match="libcuda"):
        build(onnx_file, tmp_path / "model.engine")


@pytest.mark.network
@pytest.mark.parametrize("wheel", ["nvidia-cuda-runtime-cu12==12.9.79", "nvidia-cuda-runtime==13.5.37"])
def test_driver_functions_are_as_in_cudas_header(wheel: str, tmp_path: Path) -> None:
    try:
        header = next(download(wheel, tmp_path).rglob("cuda.h")).read_text()
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"{wheel} cannot be downloaded: {type(error).__name__}")
    defined = dict(re.findall(r"#define (cu\w+)\s+(?:__CUDA_API_PTSZ\()?(cu\w+)", header))
    spelled = {exported: name for name, exported in defined.items()}
    kinds = {"c_uint": "unsigned int", "c_int": "int|CUdevice|CUdevice_attribute|CUresult|CUstreamCaptureMode"}
    kinds |= {"c_ulong": "size_t|CUdeviceptr|unsigned long long"}
    for exported, arguments in cuda.FUNCTIONS.items():
        name = spelled.get(exported, exported)
        found = re.search(rf"^CUresult CUDAAPI (?:{name}|{exported})\((.*?)\);", header, re.M)
        assert found, exported
        declared = found.group(1).split(", ")
        assert len(declared) == len(arguments), exported
        for text, kind in zip(declared, arguments, strict=True):
            kind_name = kind.__name__
            if kind_name in kinds:
                assert re.match(rf"(?:{kinds[kind_name]}) \w+$", text), (exported, text)
            else:  # pointers and handles
                assert "*" in text or re.match(r"CU(context|stream|event|graph|graphExec) \w+", text, re.I), text
    assert "COMPUTE_CAPABILITY_MAJOR = 75" in header and "COMPUTE_CAPABILITY_MINOR = 76" in header
