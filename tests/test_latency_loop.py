"""`deploy` with a budget in ms: what it does when the measurement misses, and what it says in the end."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from bar_edge import pipeline
from bar_edge.config import RunConfig, TrainConfig
from bar_edge.errors import InputError
from bar_edge.methods import GateLayout
from bar_edge.models import build
from bar_edge.network import trace
from bar_edge.records import read_json
from tests.test_latency import made_up


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A made-up table of resnet20 on digits, and what the whole network takes by it."""
    file = tmp_path_factory.mktemp("table") / "table.json"
    network = trace(build("resnet20", input_shape=(1, 8, 8), classes=10).eval(), torch.zeros(2, 1, 8, 8))
    table = made_up(network)
    table.save(file)
    return file, GateLayout(network, table=table).cost({}, "ms")


def config(file: Path, budget_ms: float) -> RunConfig:
    train = TrainConfig(dense=0, prune=0, tune=0, device="cpu")
    return RunConfig(model="resnet20", budget=f"{budget_ms}ms", table=str(file), train=train)


def test_a_miss_is_corrected_and_the_verdict_measured(
    setting: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is 1.3 times slower than the table says."""
    file, full = setting
    budget, out = round(0.5 * full, 3), tmp_path / "run"
    exported: list[dict[str, Any]] = []

    def export(run: Path, **options: Any) -> dict[str, Any]:
        exported.append({**options, "by_table": read_json(run / "result.json")["budget"]["achieved"]})
        return {"verdict": True, "bytes": 1, "artifact": str(run / "artifact")}

    noise = itertools.cycle([1.0, 1.004, 0.997])

    def bench(artifact: Path, **_: Any) -> dict[str, Any]:
        return {"verdict": None, "percentiles_ms": {"p50": 1.3 * exported[-1]["by_table"] * next(noise)}}

    monkeypatch.setattr(pipeline, "export_run", export)
    monkeypatch.setattr(pipeline, "bench", bench)
    answer = pipeline.deploy(config(file, budget), out)
    found = read_json(out / "result.json")["budget"]
    assert answer["verdict"]
    assert [options["lowering"] for options in exported] == ["gather:4"] * len(exported)
    assert 2 <= len(exported) <= 1 + pipeline.ROUNDS
    assert exported[0]["by_table"] <= budget
    assert found["rounds_ms"][0] > budget
    assert found["basis"] == "measured"
    assert found["achieved"] == sorted(found["verdict_ms"])[1] <= budget
    assert found["achieved"] >= 0.85 * budget


def test_an_infeasible_budget_starts_nothing(setting: tuple[Path, float], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least"):
        pipeline.deploy(config(setting[0], 0.0001), tmp_path / "run")
    assert not (tmp_path / "run").exists()
