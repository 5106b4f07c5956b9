"""`deploy` with a budget in ms: what it does when the measurement misses, and what it says in the end."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bar_edge import pipeline
from bar_edge.bench import Measurement
from bar_edge.config import TrainConfig
from bar_edge.errors import InputError
from bar_edge.files import read_json, write_json
from bar_edge.latency_budget.measured_loop import ROUNDS
from bar_edge.methods import GateLayout
from bar_edge.models import build
from bar_edge.network import Network, count, trace
from bar_edge.progress import Progress
from bar_edge.records import ChannelPlan
from bar_edge.records.export_result import ExportResult
from bar_edge.records.latency_table import LatencyTable
from bar_edge.requests import BenchRequest, DeployRequest, ExportRequest, PruneRequest
from bar_edge.runs import specs
from bar_edge.runs.measure import Benched
from bar_edge.runs.run_folder import Pruned
from tests.latency_budget.test_latency import made_up


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A made-up table of resnet8 on digits, and what the whole network takes by it."""
    file = tmp_path_factory.mktemp("table") / "table.json"
    table = made_up(dense())
    table.save(file)
    return file, GateLayout(dense(), table=table).cost({}, "ms")


@functools.cache
def dense() -> Network:
    """A whole resnet8 for digits."""
    return trace(build("resnet8", input_shape=(1, 8, 8), classes=10).eval(), torch.zeros(2, 1, 8, 8))


def read_plan(out: Path) -> ChannelPlan:
    return ChannelPlan.from_json(read_json(out / "plan.json"))


def request(file: Path, budget_ms: float, lowering: str = "auto") -> DeployRequest:
    train = TrainConfig(dense=0, prune=0, tune=0, device="cpu")
    pruning = PruneRequest(model="resnet8", budget=f"{budget_ms}ms", table=str(file), train=train)
    return DeployRequest(prune=pruning, export=ExportRequest(lowering=lowering))


class Device:
    """Stands for exporting and measuring: takes `latency(ms by the table)`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, latency: Callable[[float], float]) -> None:
        self.latency, self.exported = latency, list[dict[str, Any]]()
        self.noise = itertools.cycle([1.0, 1.004, 0.997])
        monkeypatch.setattr(pipeline, "export_network", self.export)
        monkeypatch.setattr(pipeline, "_wanted", lambda request: request)
        monkeypatch.setattr(pipeline, "_exportable", lambda pruned, *_: pruned)
        monkeypatch.setattr(pipeline, "measure", self.measure)

    def export(self, request: ExportRequest, pruned: Pruned, folder: Path, _: Progress | None) -> ExportResult:
        by_table = pruned.result.budget.achieved
        self.exported.append({"lowering": request.lowering, "by_table": by_table})
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "by_table.json", by_table)
        return ExportResult(verdict=True, bytes=1, artifact=str(folder), parity={"sliced_vs_onnx": 0.0})

    def measure(self, artifact: Path, _: BenchRequest) -> Benched:
        ms = self.latency(read_json(artifact / "by_table.json")) * next(self.noise)
        keys = ("on", "runtime", "precision", "threads")
        measured = Measurement(
            name="made up", samples_ms=(ms,) * 5, warmup_runs=0, batch=1, environment=dict.fromkeys(keys, "made up")
        )
        return Benched(measurement=measured, budget=None, comparison=None, file="bench.json")


@pytest.mark.parametrize(
    "latency",
    [
        lambda ms: 1.3 * ms,  # slower than the table says
        lambda ms: 0.6 * ms,  # faster
        lambda ms: 0.02 + 0.7 * ms,  # with a constant that it does not know
        lambda ms: 1.4 * ms**1.2,
        lambda ms: ms,
    ],
)
def test_what_misses_or_wastes_the_budget_is_corrected(
    setting: tuple[Path, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    latency: Callable[[float], float],
) -> None:
    file, full = setting
    device = Device(monkeypatch, latency)
    budget, out = round(latency(0.5 * full), 3), tmp_path / "run"
    answer = pipeline.deploy(request(file, budget), out)
    found = read_json(out / "result.json")["budget"]
    assert answer["verdict"]
    assert found["basis"] == "measured"
    assert [options["lowering"] for options in device.exported] == ["gather:4"] * len(device.exported)
    assert len(device.exported) == len(found["rounds_ms"]) <= 1 + ROUNDS
    assert device.exported[0]["by_table"] <= budget
    assert 0.9 * budget <= found["achieved"] == sorted(found["verdict_ms"])[1] <= budget
    # the folder holds one round: its plan, network and artifact belong together
    network = Network.load(out / "network")
    table = LatencyTable.load(file)
    by_plan = GateLayout(dense(), table=table).cost(read_plan(out).kept, "ms")
    assert found["by_table"] == pytest.approx(by_plan)
    assert count(network).params == count(dense(), read_plan(out)).params
    assert read_json(Path(answer["export"]["artifact"]) / "by_table.json") == found["by_table"]


def test_a_worse_round_is_taken_back(
    setting: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is pruned less runs beyond the budget: what the first round left is what counts."""
    file, full = setting
    budget = round(0.6 * full, 3)
    first: list[float] = []

    def latency(ms: float) -> float:
        first.append(ms)
        return 0.8 * budget if ms <= first[0] else 1.5 * budget

    device = Device(monkeypatch, latency)
    answer = pipeline.deploy(request(file, budget), tmp_path / "run")
    assert answer["verdict"]
    assert 2 <= len(device.exported) <= 1 + ROUNDS
    assert answer["prune"]["budget"]["by_table"] == device.exported[0]["by_table"]


def test_a_stopped_loop_goes_on(setting: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, full = setting
    budget, out = round(0.3 * full, 3), tmp_path / "run"
    device = Device(monkeypatch, lambda ms: 0.5 * ms)
    export = device.export

    def stopped(*args: Any, **options: Any) -> ExportResult:
        if device.exported:
            raise KeyboardInterrupt
        return export(*args, **options)

    monkeypatch.setattr(pipeline, "export_network", stopped)
    with pytest.raises(KeyboardInterrupt):
        pipeline.deploy(request(file, budget), out)
    monkeypatch.setattr(pipeline, "export_network", export)
    answer = pipeline.deploy(request(file, budget), out, resume=True)
    assert answer["verdict"]
    assert len(device.exported) == len(answer["prune"]["budget"]["rounds_ms"])  # the first is not done again
    assert answer["prune"]["budget"]["achieved"] >= 0.9 * budget


@pytest.mark.parametrize("off", [0.8, 1.1])
def test_a_verdict_that_wastes_or_misses_the_budget_corrects_the_loop(
    setting: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    """The first three processes were lucky, or unlucky: what all later ones say counts."""
    file, full = setting
    budget, calls = round(0.5 * full, 3), itertools.count()
    device = Device(monkeypatch, lambda ms: 0.95 * ms if next(calls) < 3 else 0.95 * off * ms)
    answer = pipeline.deploy(request(file, budget), tmp_path / "run")
    found = answer["prune"]["budget"]
    assert answer["verdict"] and 0.9 * budget <= found["achieved"] <= budget
    assert len(device.exported) == len(found["rounds_ms"]) >= 2
    assert found["rounds_ms"][0] == pytest.approx(0.95 * off * device.exported[0]["by_table"], rel=0.01)


def test_a_budget_above_the_dense_network_ends_with_it(
    setting: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, full = setting
    device = Device(monkeypatch, lambda ms: 0.5 * ms)
    answer = pipeline.deploy(request(file, round(0.9 * full, 3)), tmp_path / "run")
    assert answer["verdict"]
    assert len(device.exported) == 2
    assert device.exported[1]["by_table"] == pytest.approx(full)


def test_a_table_of_another_lowering_is_refused(setting: tuple[Path, float], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gather:4"):
        pipeline.deploy(request(setting[0], setting[1], lowering="slices"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_infeasible_budget_starts_nothing(setting: tuple[Path, float], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least"):
        pipeline.deploy(request(setting[0], 0.0001), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def counted(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> list[str]:
    """Count the calls of a function."""
    real, calls = getattr(where, name), list[str]()

    def function(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return real(*args, **options)

    monkeypatch.setattr(where, name, function)
    return calls


def test_a_deploy_traces_once_and_reads_the_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiling, pruning, correcting, exporting and measuring hand on what the first of them read."""

    def profiled(network: Network, out: Path, **_: Any) -> LatencyTable:
        table = made_up(network)
        table.save(out)
        return table

    table = made_up(dense())
    full = GateLayout(dense(), table=table).cost({}, "ms")
    monkeypatch.setattr(pipeline, "profile_network", profiled)
    monkeypatch.setattr(pipeline, "plot_table", lambda *_: None)
    traces = [counted(monkeypatch, specs, name) for name in ("trace", "build", "load_data")]
    device = Device(monkeypatch, lambda ms: 1.3 * ms)
    train = TrainConfig(dense=0, prune=0, tune=0, device="cpu")
    pruning = PruneRequest(model="resnet8", budget=f"{round(0.6 * full, 3)}ms", train=train)
    answer = pipeline.deploy(DeployRequest(prune=pruning), tmp_path / "run")
    assert answer["verdict"] and len(device.exported) > 1
    assert [len(calls) for calls in traces] == [1, 1, 1]
