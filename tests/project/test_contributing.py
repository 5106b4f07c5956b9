"""The worked examples of CONTRIBUTING.md, executed as they stand there: one file and one line each."""

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from bar_edge import pipeline
from bar_edge.config import TrainConfig
from bar_edge.errors import InputError
from bar_edge.methods import method as methods
from bar_edge.models import build
from bar_edge.network import count, trace
from bar_edge.records import Budget, cost
from bar_edge.report import write_report
from bar_edge.requests import PruneRequest

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
