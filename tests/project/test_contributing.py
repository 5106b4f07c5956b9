"""The worked examples of CONTRIBUTING.md, executed as they stand there: one file and one line each."""

import dataclasses
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from bar_edge import pipeline
from bar_edge.bench import RUNTIMES, protocol
from bar_edge.bench.runner.inputs import random_inputs
from bar_edge.bench.runner.measuring import measure
from bar_edge.bench.runner.records import Problem, Settings
from bar_edge.config import TrainConfig
from bar_edge.errors import InputError
from bar_edge.methods import method as methods
from bar_edge.models import build
from bar_edge.network import count, trace
from bar_edge.network.channels import table
from bar_edge.records import Budget, cost
from bar_edge.report import write_report
from bar_edge.requests import BenchRequest, ExportRequest, PruneRequest
from bar_edge.runs.door import check_bench
from bar_edge.targets.table import TARGETS
from tests import meaning
from tests.small import Net, check, conv

RUN_HERE = ("onnxruntime-cpu", "onnx-reference")
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


def test_a_rule(examples: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module, kept = Net(lambda s, x: s.h(torch.erfc(s.a(x))), a=conv(3, 6), h=conv(6, 2)), {"a": (0, 3)}
    assert check(module, kept).body.get_submodule("h").in_channels == 6  # right, but at full width
    added = line(examples["a line of RULES in bar_edge/network/channels/table.py"], vars(table))
    monkeypatch.setitem(table.RULES, *added.popitem())
    monkeypatch.setitem(meaning.RULES, "erfc", meaning.RULES["cos"])
    assert check(module, kept).body.get_submodule("h").in_channels == 2


def test_a_target(examples: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = dataclasses.replace(TRAIN, prune=0)
    pipeline.prune(dataclasses.replace(config(method="random"), train=train), tmp_path / "run")
    with pytest.raises(InputError):
        pipeline.export_run(tmp_path / "run", ExportRequest(target="dot"))
    exec(examples["bar_edge/targets/dot.py"], names := dict[str, Any]())
    added = line(examples["a row of TARGETS in bar_edge/targets/table.py"], names)
    monkeypatch.setitem(TARGETS, *added.popitem())
    answer = pipeline.export_run(tmp_path / "run", ExportRequest(target="dot"))
    drawing = (Path(answer["artifact"]) / answer["file"]).read_text()
    assert answer["verdict"] and drawing.startswith("digraph {") and "conv1" in drawing


def test_a_runtime(examples: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured as `bench` does in its process, beside ONNX Runtime."""
    file = tmp_path / "model.onnx"
    file.write_bytes(protocol._tiny_model())
    settings = {"threads": 1, "batch": 1, "precision": "fp32", "seconds": 0.01, "seed": 0}
    request = {**settings, "runtime": "onnx-reference", "files": [{"name": file.name, "path": str(file)}]}
    with pytest.raises(InputError):
        protocol.bench_onnx([file], runtime="onnx-reference")
    names: dict[str, Any] = {"__package__": "bar_edge.bench.runner", "__name__": "bar_edge.bench.runner.on_reference"}
    exec(examples["bar_edge/bench/runner/on_reference.py"], names)
    assert examples["a line of RUNTIMES in bar_edge/bench/runner/runtimes.py"] == "on_reference.CPU\n"
    monkeypatch.setitem(RUNTIMES, names["CPU"].name, names["CPU"])
    found = measure(request)
    assert len(found["models"][0]["samples_ms"]) >= 10 and found["environment"]["runtime"] == "onnx-reference"
    check_bench(BenchRequest(), "onnx-reference")
    loaded = [RUNTIMES[name].load(file, file.name, Settings(1, 1, "fp32", True)) for name in RUN_HERE]
    arrays = random_inputs(loaded[0], 1, seed=0)
    first, second = ([torch.tensor(output) for output in one.run(arrays)] for one in loaded)
    assert loaded[0].inputs[0][0] == loaded[1].inputs[0][0]
    assert torch.allclose(first[0], second[0])
    file.write_bytes(b"no network")
    with pytest.raises(Problem, match="reference implementation loads"):
        RUNTIMES["onnx-reference"].load(file, file.name, Settings(1, 1, "fp32", True))
