"""`export` per target and precision, on a pruned network of digits: files that run, verdicts, what is missing here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import onnx
import pytest

from bar_edge import targets
from bar_edge.config import RunConfig, TrainConfig
from bar_edge.errors import EnvironmentLacks, InputError
from bar_edge.pipeline import export_run, prune, verify
from bar_edge.records import read_json


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets") / "run"
    train = TrainConfig(dense=1, prune=0, tune=1, batch=64, precision="fp32", device="cpu")
    prune(RunConfig(model="resnet20", data="digits", budget="4x", method="random", train=train), folder)
    return folder


def operators(artifact: Path) -> set[str]:
    return {node.op_type for node in onnx.load(str(artifact / "model.onnx")).graph.node}


def test_fp16_computes_in_half_and_answers_alike(run: Path, tmp_path: Path) -> None:
    answer = export_run(run, precision="fp16", lowering="gather:4", out=tmp_path / "half")
    manifest = read_json(tmp_path / "half" / "manifest.json")
    assert answer["verdict"] and (manifest["precision"], manifest["lowering"]) == ("fp16", "gather:4")
    assert 0 < manifest["parity"]["error"] <= manifest["parity"]["tolerance"]
    types = {tensor.data_type for tensor in onnx.load(str(tmp_path / "half" / "model.onnx")).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types and onnx.TensorProto.FLOAT not in types
    assert verify(tmp_path / "half")["verdict"]


@pytest.mark.parametrize("inside", [False, True])
def test_int8_says_what_it_costs_and_keeps_the_promise_or_not(
    run: Path, tmp_path: Path, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "FINETUNE_STEPS", 2)
    answer: dict[str, Any] = export_run(
        run, precision="int8", lowering="slices:16", max_drop=100.0, with_preprocessing=inside, out=tmp_path / "int8"
    )
    manifest = read_json(tmp_path / "int8" / "manifest.json")
    assert answer["verdict"] and manifest["precision"] == "int8"
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(tmp_path / "int8")
    held_out = answer["held_out"]
    assert held_out["drop_points"] == pytest.approx(100 * (held_out["fp32"] - held_out["int8"]))
    assert answer["speedup_over_fp32"]["low"] <= answer["speedup_over_fp32"]["speedup"]
    assert manifest["conversion"]["calibration"]["images"] == 512
    assert verify(tmp_path / "int8")["verdict"]
    if not inside:  # nothing gains a hundred points
        never = export_run(run, precision="int8", choice_seconds=1.0, max_drop=-100.0, out=tmp_path / "never")
        assert not never["verdict"] and any("by more than -100" in warning for warning in never["warnings"])
        conversion = read_json(tmp_path / "never" / "manifest.json")["conversion"]
        assert conversion["rungs"][-1]["rung"] == "fine-tuning" and conversion["sensitivity"]


def test_random_images_are_for_speed_alone(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--max-drop"):
        export_run(run, precision="int8", data="random", max_drop=1.0, out=tmp_path / "none")
    answer = export_run(run, precision="int8", lowering="slices", data="random", out=tmp_path / "random")
    assert answer["verdict"] and answer["held_out"] is None
    assert any("random images" in warning for warning in answer["warnings"])
    assert read_json(tmp_path / "random" / "manifest.json")["conversion"]["calibration"]["data"] == "random"


def test_a_bundle_for_a_device_has_all_it_needs(run: Path, tmp_path: Path) -> None:
    answer = export_run(run, target="trt-bundle", precision="fp16", out=tmp_path / "bundle")
    assert answer["verdict"] and answer["lowering"] == "regular:8"
    names = {path.name for path in (tmp_path / "bundle").iterdir()}
    assert names >= {
        "model.onnx",
        "build.sh",
        "build.pyz",
        "run.py",
        "samples.safetensors",
        "manifest.json",
        "README.md",
    }
    assert not operators(tmp_path / "bundle") & {"ScatterND", "ScatterElements", "Gather"}


def test_what_is_missing_is_said_before_anything_is_done(run: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentLacks, match="trt-bundle in fp32"):
        export_run(tmp_path, target="tensorflow")
    with pytest.raises(EnvironmentLacks, match="bf16"):
        export_run(tmp_path, target="onnx", precision="bf16")
    with pytest.raises(InputError, match="--target trt"):
        export_run(run, target="onnx", on="ssh://board")
    if importlib.util.find_spec("tensorrt") is None:
        with pytest.raises(EnvironmentLacks, match="TensorRT"):
            export_run(run, target="trt", out=tmp_path / "engine")
        assert not (tmp_path / "engine").exists()
