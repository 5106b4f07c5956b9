"""`export` per target and precision, on a pruned network of digits: files that run, verdicts, what is missing here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file

from bar_edge.bench import Comparison, Measurement, bench_onnx
from bar_edge.config import TrainConfig
from bar_edge.errors import BarEdgeError, EnvironmentLacks, InputError
from bar_edge.files import read_json
from bar_edge.models import build
from bar_edge.network import Network, trace
from bar_edge.pipeline import bench, export_run, prune, verify
from bar_edge.records.lowering import Lowering
from bar_edge.records.tolerance import TOLERANCES
from bar_edge.requests import BenchRequest, ExportRequest, PruneRequest
from bar_edge.targets import target as targets
from bar_edge.targets.export_run import INT8_GAIN
from bar_edge.targets.table import TARGETS
from bar_edge.targets.tensorrt.target import write_engine
from bar_edge_calibration.graph import Graph
from bar_edge_cli.main import main
from tests.bench.test_ssh import Server, running, server  # noqa: F401  fixtures
from tests.targets.test_bundle import site, trtexec  # noqa: F401  fixtures


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets") / "run"
    train = TrainConfig(dense=1, prune=0, tune=1, batch=64, precision="fp32", device="cpu")
    prune(PruneRequest(model="resnet8", data="digits", budget="4x", method="random", train=train), folder)
    return folder


def operators(artifact: Path) -> set[str]:
    return {node.op_type for node in onnx.load(str(artifact / "model.onnx")).graph.node}


def fast_enough(answer: dict[str, Any]) -> bool:
    """Whether a measurement of INT8 was fast enough for a verdict of yes: of networks this small, not always."""
    return bool(answer["speedup_over_fp32"]["low"] >= INT8_GAIN)


def test_fp16_computes_in_half_and_answers_alike(run: Path, tmp_path: Path) -> None:
    answer = export_run(run, ExportRequest(precision="fp16", lowering="gather:4"), out=tmp_path / "half")
    manifest = read_json(tmp_path / "half" / "manifest.json")
    assert answer["verdict"] and (manifest["precision"], manifest["lowering"]) == ("fp16", "gather:4")
    assert 0 < manifest["parity"]["error"] <= manifest["parity"]["tolerance"]
    types = {tensor.data_type for tensor in onnx.load(str(tmp_path / "half" / "model.onnx")).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types and onnx.TensorProto.FLOAT not in types
    assert verify(tmp_path / "half")["verdict"]
    held_out = answer["held_out"]
    assert held_out == manifest["held_out"] and abs(held_out["drop_points"]) < 5


@pytest.mark.parametrize("inside", [False, True])
def test_int8_says_what_it_costs_and_keeps_the_promise_or_not(
    run: Path, tmp_path: Path, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "FINETUNE_STEPS", 2)
    answer: dict[str, Any] = export_run(
        run,
        ExportRequest(precision="int8", lowering="slices:16", max_drop=100.0, with_preprocessing=inside),
        out=tmp_path / "int8",
    )
    manifest = read_json(tmp_path / "int8" / "manifest.json")
    assert answer["verdict"] == fast_enough(answer) and manifest["precision"] == "int8"
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(tmp_path / "int8")
    held_out = answer["held_out"]
    assert held_out["drop_points"] == pytest.approx(100 * (held_out["fp32"] - held_out["int8"]))
    # integers against the file's meaning in float: neither the same computation nor far from it
    assert manifest["parity"]["within"] and manifest["parity"]["error"] < manifest["difference_from_fp32"]
    assert manifest["conversion"]["recipe"]["weight_bits"] == 7
    assert manifest["conversion"]["right_on"] == "every processor"
    assert answer["speedup_over_fp32"]["low"] <= answer["speedup_over_fp32"]["speedup"]
    assert manifest["conversion"]["calibration"]["images"] == 512
    assert verify(tmp_path / "int8")["verdict"]
    if not inside:  # nothing gains a hundred points
        never = export_run(
            run, ExportRequest(precision="int8", choice_seconds=1.0, max_drop=-100.0), out=tmp_path / "never"
        )
        assert not never["verdict"] and any("by more than -100" in warning for warning in never["warnings"])
        conversion = read_json(tmp_path / "never" / "manifest.json")["conversion"]
        assert conversion["rungs"][-1]["rung"] == "fine-tuning" and conversion["sensitivity"]


@pytest.mark.parametrize(
    ("first_ms", "second_ms", "name"), [(2.0, 1.0, "onnxruntime-amx"), (1.0, 2.0, "onnxruntime-cpu")]
)
def test_the_recipe_that_runs_faster_is_taken(
    monkeypatch: pytest.MonkeyPatch, first_ms: float, second_ms: float, name: str
) -> None:
    network = trace(build("resnet8", input_shape=(1, 8, 8), classes=10).eval(), torch.zeros(2, 1, 8, 8))
    asked = []

    def bench_files(files: list[Path], **options: Any) -> list[Measurement]:
        zero_points = [set(quantised_zero_points(file)) for file in files]
        assert zero_points == [{0}, {0, 1}]
        asked.append(options["runtime"])
        times, environment = (first_ms, second_ms), {"interleaved": 2}
        common: dict[str, Any] = {"warmup_runs": 0, "batch": 1, "environment": environment}
        return [Measurement(name=str(ms), samples_ms=(ms,) * 9, **common) for ms in times]

    monkeypatch.setattr(targets, "bench_onnx", bench_files)
    options: dict[str, Any] = {"runtime": "onnxruntime-cpu", "lowering": targets.MEASURED_IN, "threads": 1}
    assert targets.faster_recipe(TARGETS["onnx"], network, **options).name == name
    assert targets.faster_recipe(TARGETS["onnx"], network, **options | {"runtime": "openvino-cpu"}).name == name
    assert targets.faster_recipe(TARGETS["openvino"], network, **options).name == "openvino-cpu"
    assert asked == ["onnxruntime-cpu", "openvino-cpu"]


def quantised_zero_points(file: Path) -> list[int]:
    graph = Graph(onnx.load(str(file)))
    weights = [graph.producers[n.input[1]] for n in graph.nodes if n.op_type == "Conv"]
    return [int(graph.array(pair.input[2]).max()) for pair in weights]


def test_recipes_that_write_the_same_file_are_not_measured(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 4x nothing in this network is large enough for the second recipe."""
    monkeypatch.setattr(targets, "bench_onnx", lambda *_, **__: pytest.fail("measured"))
    options: dict[str, Any] = {"runtime": "onnxruntime-cpu", "lowering": Lowering.parse("slices"), "threads": 1}
    found = targets.faster_recipe(TARGETS["onnx"], Network.load(run / "network"), **options)
    assert found.name == "onnxruntime-cpu"


def test_random_images_are_for_speed_alone(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--max-drop"):
        export_run(run, ExportRequest(precision="int8", data="random", max_drop=1.0), out=tmp_path / "none")
    answer = export_run(
        run,
        ExportRequest(precision="int8", recipe="onnxruntime-amx", lowering="slices", data="random"),
        out=tmp_path / "random",
    )
    assert answer["verdict"] == fast_enough(answer) and answer["held_out"] is None
    assert any("random images" in warning for warning in answer["warnings"])
    conversion = read_json(tmp_path / "random" / "manifest.json")["conversion"]
    assert (conversion["calibration"]["data"], conversion["recipe"]["name"]) == ("random", "onnxruntime-amx")


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_file_for_openvino_is_compared_there(run: Path, tmp_path: Path, precision: str) -> None:
    answer = export_run(
        run, ExportRequest(target="openvino", precision=precision, lowering="slices"), out=tmp_path / "file"
    )
    assert answer["verdict"] == (precision != "int8" or fast_enough(answer))
    assert 0 < answer["parity"][precision] <= TOLERANCES[precision]
    assert (answer["speedup_over_fp32"] is None) == (answer["held_out"] is None) == (precision == "fp32")
    assert read_json(tmp_path / "file" / answer["latency"]["file"])["environment"]["runtime"] == "openvino-cpu"


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_openvino_rounds_to_bf16_what_the_file_holds_in_fp32(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "file"
    if not torch.cpu._is_avx512_bf16_supported():  # said at once; no file is named after what it is not
        print("this processor has no bf16")
        with pytest.raises(EnvironmentLacks, match="a CPU that OpenVINO computes bf16 on"):
            export_run(run, ExportRequest(target="openvino", precision="bf16"), out=out)
        export_run(run, ExportRequest(target="openvino", lowering="slices"), out=out)
        with pytest.raises(EnvironmentLacks, match="a CPU that OpenVINO computes bf16 on"):
            bench(out, BenchRequest(precision="bf16", seconds=0.05))
        return
    print("this processor has bf16")
    answer = export_run(
        run, ExportRequest(target="openvino", precision="bf16", lowering="slices", max_drop=100.0), out=out
    )
    manifest, held_out = read_json(out / "manifest.json"), answer["held_out"]
    assert answer["verdict"] and TOLERANCES["fp32"] < answer["parity"]["bf16"] <= TOLERANCES["bf16"]
    assert (manifest["precision"], manifest["precision_hint"]) == ("bf16", "bf16")
    assert held_out["drop_points"] == pytest.approx(100 * (held_out["fp32"] - held_out["bf16"]))
    types = {tensor.data_type for tensor in onnx.load(str(out / "model.onnx")).graph.initializer}
    assert onnx.TensorProto.BFLOAT16 not in types
    # the file itself answers as the network does; the runtime's rounding is bench's to compare
    assert verify(out)["verdict"] and "at most 0.0001" in verify(out)["checks"][-1]["detail"]
    measured = bench(out, BenchRequest(seconds=0.05))
    assert (measured["runtime"], measured["precision"]) == ("openvino-cpu", "bf16")
    assert measured["parity"]["within"] and measured["parity"]["error"] == pytest.approx(answer["parity"]["bf16"])
    assert bench(out, BenchRequest(precision="fp32", seconds=0.05))["parity"]["error"] < TOLERANCES["fp32"]
    export_run(run, ExportRequest(lowering="slices"), out=tmp_path / "float")
    beside = bench_onnx([out, tmp_path / "float"], runtime="openvino-cpu", seconds=0.05)
    assert [found.environment["precision"] for found in beside] == ["bf16", "fp32"]
    # nothing gains a hundred points
    never = export_run(
        run, ExportRequest(target="openvino", precision="bf16", lowering="slices", max_drop=-100.0), out=out
    )
    assert not never["verdict"] and any("by more than -100" in warning for warning in never["warnings"])


class WithoutBf16:
    """OpenVINO on a CPU that has no bf16: it says so, and takes the hint without following it."""

    def get_property(self, *_: str) -> list[str]:
        return ["FP32", "INT8"]


def test_bf16_on_a_cpu_without_it_is_exit_3(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=WithoutBf16))
    command = ["export", str(run), "--target", "openvino", "--precision", "bf16", "--out", str(tmp_path / "file")]
    assert main(command) == 3 and not (tmp_path / "file").exists()
    assert "where the same file would run in fp32" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert main(command) == 3
    assert 'pip install "bar-edge[openvino]"' in capsys.readouterr().err


@pytest.mark.parametrize(("low", "verdict"), [(1.5, True), (1.021, True), (1.019, False), (0.7, False)])
def test_int8_that_is_not_beyond_doubt_faster_is_a_no(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low: float, verdict: bool
) -> None:
    """By the interval, not by the median: that alone says 1.5 each time."""
    found = Comparison(against="fp32", speedup=1.5, low=low, high=1.6, interleaved=True)
    monkeypatch.setattr(targets, "compare", lambda *_: found)
    asked = ExportRequest(precision="int8", recipe="onnxruntime-cpu", lowering="slices")
    answer = export_run(run, asked, out=tmp_path / "int8")
    assert answer["verdict"] == verdict
    said = [warning for warning in answer["warnings"] if "ship --precision fp32" in warning]
    assert len(said) == (not verdict) and all("not beyond doubt 1.02 times" in warning for warning in said)


def test_a_bundle_for_a_device_has_all_it_needs(run: Path, tmp_path: Path) -> None:
    answer = export_run(run, ExportRequest(target="trt-bundle", precision="fp16"), out=tmp_path / "bundle")
    assert answer["verdict"] and answer["lowering"] == "regular:8"
    names = {path.name for path in (tmp_path / "bundle").iterdir()}
    assert names >= {
        "model.onnx",
        "build.sh",
        "build.pyz",
        "run.pyz",
        "samples.safetensors",
        "manifest.json",
        "README.md",
    }
    assert not operators(tmp_path / "bundle") & {"ScatterND", "ScatterElements", "Gather"}
    manifest = read_json(tmp_path / "bundle" / "manifest.json")
    tensors = load_file(tmp_path / "bundle" / "samples.safetensors")
    assert manifest["parity"]["samples"] == len(tensors["input"]) == len(tensors["output"]) == 256
    assert len(np.unique(tensors["input"], axis=0)) > 250, "the same images again"


def test_bf16_is_verified_too(run: Path, tmp_path: Path) -> None:
    assert export_run(run, ExportRequest(target="trt-bundle", precision="bf16"), out=tmp_path / "bundle")["verdict"]
    answer = verify(tmp_path / "bundle")
    assert answer["verdict"] and answer["checks"][-1]["detail"].endswith("on 4 samples")
    with (tmp_path / "bundle" / "run.pyz").open("a") as stream:
        stream.write("# changed\n")
    assert not verify(tmp_path / "bundle")["verdict"]


# ------------------------------------------------------------------------------------------ an engine elsewhere


def exported(run: Path, folder: Path, on: str, *options: str) -> int:
    command = ["export", str(run), "--target", "trt", "--precision", "fp16", "--on", on, "--out", str(folder)]
    return main([*command, *options])


def test_an_engine_is_built_compared_and_measured_on_a_device(
    run: Path,
    server: Server,  # noqa: F811
    site: Path,  # noqa: F811
    trtexec: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Against a real OpenSSH server; the device's TensorRT is pretended."""

    def device(**world: object) -> None:
        server.login_runs(f"export PYTHONPATH='{site}' FAKE_WORLD='{json.dumps(world)}' OMP_NUM_THREADS=1")

    engine = tmp_path / "engine"
    device(version="10.3")
    assert exported(run, engine, server.target, "--engine", "batch=1,1,8", "--engine", "workspace_mib=64") == 0
    assert read_json(engine / "model.engine.json")["profile"] == {"input": [[n, 1, 8, 8] for n in (1, 1, 8)]}
    manifest = read_json(engine / "manifest.json")
    assert manifest["target"] == "trt" and manifest["parity"]["samples"] == 256 and manifest["parity"]["within"]
    assert read_json(engine / "model.engine.json")["gpu"]["name"] == "Orin"
    (measured,) = engine.glob("bench-tensorrt-t1-b1-*.json")
    assert manifest["latency"]["file"] == measured.name and manifest["latency"]["parts_p50_ms"]["d2h"] == 0.5
    assert read_json(measured)["parts_ms"]["compute"]["p50"] == 4.0 and len(read_json(measured)["samples_ms"]) >= 10
    assert "127.0.0.1" not in "".join(path.read_text(errors="ignore") for path in engine.iterdir())
    checks = verify(engine)
    assert checks["verdict"] and "hash of model.engine" in {check["name"] for check in checks["checks"]}

    # the engine that came back runs on its device, and on no other
    answer = bench(engine, BenchRequest(runtime="tensorrt", seconds=0.05, on=server.target))
    assert answer["parity"]["within"] and answer["parts_ms"]["h2d"]["p50"] == 0.25
    device(version="10.3", gpu="Thor", compute_capability=[11, 0])
    with pytest.raises(EnvironmentLacks, match=r"(?s)Thor.*built for Orin.*sh build\.sh"):
        bench(engine, BenchRequest(runtime="tensorrt", seconds=0.05, on=server.target))

    device(version="11.4", wrong_by=5.0)
    assert exported(run, tmp_path / "wrong", server.target) == 1
    assert not list((tmp_path / "wrong").glob("model.engine*"))
    assert read_json(tmp_path / "wrong" / "manifest.json")["parity"]["within"] is False

    server.login_runs("export TRTEXEC=/nonexistent")
    assert exported(run, tmp_path / "bundle", server.target) == 3
    assert "python3-libnvinfer" in capsys.readouterr().err

    device(version="10.3", build_error="Could not find any implementation for node /x.")
    with pytest.raises(BarEdgeError, match="no workspace limit"):
        write_engine(tmp_path / "bundle", server.target)
    server.login_runs(f"export TRTEXEC='{trtexec}'")
    with pytest.raises(EnvironmentLacks, match="NOT compared"):
        write_engine(tmp_path / "bundle", server.target)
    assert list(tmp_path.glob("*/model.engine")) == [engine / "model.engine"]


def test_what_is_missing_is_said_before_anything_is_done(run: Path, tmp_path: Path) -> None:
    for wrong in ({"target": "tensorflow"}, {"target": "banana"}, {"precision": "fp7"}, {"precision": ""}):
        with pytest.raises(InputError, match=r"(trt-bundle|bf16)[\s\S]*nothing was written"):
            export_run(tmp_path, ExportRequest(**wrong))
    with pytest.raises(InputError, match="bf16"):
        export_run(tmp_path, ExportRequest(target="onnx", precision="bf16"))
    with pytest.raises(EnvironmentLacks, match="--max-drop"):
        export_run(run, ExportRequest(target="trt-bundle", precision="bf16", max_drop=1.0))
    with pytest.raises(InputError, match="--target trt"):
        export_run(run, ExportRequest(target="onnx", on="ssh://board"))
    for asked in ({"precision": "int8", "recipe": "tensorrt"}, {"recipe": "onnxruntime-cpu"}):
        with pytest.raises(InputError, match="--recipe auto"):
            export_run(run, ExportRequest(**asked), out=tmp_path / "none")
    for wrong in ("batch=1,4", "batch=many", "dla_core=all", "timing_caches=here", "fp16=true"):
        with pytest.raises(InputError, match=r"workspace_mib=0.*|batch range"):
            export_run(run, ExportRequest(target="trt-bundle", engine=(wrong,)))
    if importlib.util.find_spec("tensorrt") is None:
        with pytest.raises(EnvironmentLacks, match="TensorRT"):
            export_run(run, ExportRequest(target="trt"), out=tmp_path / "engine")
        assert not (tmp_path / "engine").exists()
