"""The worked examples of CONTRIBUTING.md, executed as they stand there: one file and one line each."""

import ast
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bar_edge import pipeline
from bar_edge.bench import RUNTIMES, bench_onnx, packed
from bar_edge.config import TrainConfig
from bar_edge.errors import BarEdgeError, InputError
from bar_edge.lowering.lower import lower
from bar_edge.methods import method as methods
from bar_edge.models import build
from bar_edge.network import count, trace
from bar_edge.records import Budget, cost
from bar_edge.report import write_report
from bar_edge.requests import PruneRequest
from bar_edge.targets.artifact import ArtifactSpec, write_artifact
from bar_edge.targets.table import TARGETS, check_target, read_row

TRAIN = TrainConfig(dense=0, prune=1, tune=0, device="cpu", batch=256)


@pytest.fixture(scope="module")
def examples() -> dict[str, str]:
    """Every block of code by its first line, a comment that says where it goes."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (.*?)\n(.*?)```", text, flags=re.DOTALL)
    assert len(dict(blocks)) == len(blocks) >= 4
    return dict(blocks)


def line(text: str, names: dict[str, Any]) -> dict[str, Any]:
    """A line of a table, as a table of one line."""
    found: dict[str, Any] = eval("{" + text + "}", names)
    assert len(found) == 1 and text.count("\n") == 1
    return found


def config(**fields: Any) -> PruneRequest:
    return PruneRequest(model="resnet20", model_arg=("width=0.25",), train=TRAIN, **fields)


def test_a_method(examples: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError):
        pipeline.prune(config(method="scale"), tmp_path / "refused")
    module = types.ModuleType("bar_edge.methods.scale")
    exec(examples["bar_edge/methods/scale.py"], module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    added = line(examples["a line of METHODS in bar_edge/methods/method.py"], vars(methods))
    monkeypatch.setitem(methods.METHODS, *added.popitem())
    result = pipeline.prune(config(method="scale", budget="4x"), tmp_path / "run")
    assert result["method"] == "scale"
    assert result["budget"]["within"] and result["parity"]["masked_vs_sliced"] < 1e-9


@pytest.mark.parametrize("method", ["bar", "magnitude"])
def test_a_cost(examples: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    with pytest.raises(InputError):
        Budget.parse("4x:energy")
    exec(examples["bar_edge/records/cost.py"], names := vars(cost).copy())
    added = line(examples["a line of COSTS in bar_edge/records/cost.py"], names)
    monkeypatch.setitem(cost.COSTS, *added.popitem())
    assert Budget.parse("20uJ").absolute == 20e6
    result = pipeline.prune(config(method=method, budget="4x:energy"), tmp_path / "run")
    dense = count(trace(build("resnet20", input_shape=(1, 8, 8), classes=10, model_args=("width=0.25",)),
                        torch.zeros(2, 1, 8, 8)))  # fmt: skip
    limit = (640 * dense.volume + 2.3 * dense.flops) / 4
    assert result["budget"]["limit"] == pytest.approx(limit)
    assert result["budget"]["unit"] == "energy" and result["budget"]["basis"] == "counted"
    assert 0.5 * limit < result["budget"]["achieved"] <= limit
    sliced = result["sliced"]
    assert result["budget"]["achieved"] == pytest.approx(640 * sliced["volume"] + 2.3 * sliced["flops"])
    assert f"of at most {limit:,.0f} picojoules" in " ".join(write_report(tmp_path / "run").read_text().split())
    inspected = pipeline.inspect_model("resnet20", model_args=("width=0.25",), data="digits")
    assert inspected["costs"]["energy"]["full"] == pytest.approx(4 * limit)


def test_a_runtime_and_a_target(examples: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the archive that measures, with the file and the line added; the file is compared with what torch computes."""
    folder = tmp_path / "runner"
    shutil.copytree(packed._RUNNER, folder)
    (folder / "on_reference.py").write_text(examples["bar_edge/bench/runner/on_reference.py"])
    last = '    "on_tensorrt",\n'
    new = examples["a line of MODULES in bar_edge/bench/runner/runtimes.py"]
    table = (folder / "runtimes.py").read_text()
    assert table.count(last) == new.count("\n") == 1
    (folder / "runtimes.py").write_text(table.replace(last, last + new))
    monkeypatch.setattr(packed, "_RUNNER", folder)
    ast.parse((folder / "on_reference.py").read_text(), feature_version=(3, 8))
    # this process knows the rows of both tables, too
    monkeypatch.setitem(RUNTIMES, "onnx-reference", RUNTIMES["onnxruntime-cpu"]._replace(name="onnx-reference"))
    module = types.ModuleType("bar_edge.targets.reference")
    exec(examples["bar_edge/targets/reference.py"], module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    row = read_row(examples["a line of ROWS in bar_edge/targets/table.py"].strip(' ",\n'))
    monkeypatch.setitem(TARGETS, row.name, row)
    check_target("reference", "fp32", "auto", "local", None)
    for target, precision in (("reference", "int8"), ("referenz", "fp32")):
        with pytest.raises(BarEdgeError):
            check_target(target, precision, "auto", "local", None)

    torch.manual_seed(0)
    network = trace(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval(), torch.zeros(2, 3, 8, 8))
    lowered, spec = lower(network, row.forms["fp32"].candidates[0]), ArtifactSpec(target="reference")
    write_artifact(lowered, tmp_path / "artifact", samples=torch.randn(4, 3, 8, 8), spec=spec, reference=network)
    (measured,) = bench_onnx([tmp_path / "artifact"], runtime="onnx-reference", seconds=0.01)
    assert measured.parity is not None and measured.parity["within"] and measured.parity["n"] == 4
    assert measured.environment["runtime"] == "onnx-reference"
