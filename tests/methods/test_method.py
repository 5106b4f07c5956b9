"""The seam of methods: every line of METHODS goes the same road, and a new one needs nothing else."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bar_edge import pipeline
from bar_edge.config import TrainConfig
from bar_edge.errors import InputError
from bar_edge.files import read_json
from bar_edge.methods import METHODS, GateLayout
from bar_edge.methods.gating.projection import plan_within
from bar_edge.methods.method import Method, Scored, find_method
from bar_edge.network import Network, trace
from bar_edge.requests import DeployRequest, PruneRequest
from bar_edge_cli.main import main

NO_TRAINING = TrainConfig(dense=0, prune=0, tune=0, device="cpu")


class Tiny(nn.Module):
    """Two convolutions and a classifier, for images of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def tiny() -> Network:
    return trace(Tiny().eval(), torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_within_its_budget(name: str, tmp_path: Path) -> None:
    config = PruneRequest(model=f"{__file__}:Tiny", budget="2x:flops", method=name, train=NO_TRAINING)
    result = pipeline.prune(config, tmp_path / "run")
    assert result["budget"]["within"]
    assert result["method"] == name
    assert result["parity"]["masked_vs_sliced"] <= 1e-9
    assert 0 < result["sliced"]["flops"] <= result["dense"]["flops"] / 2


@pytest.mark.parametrize("name", ["banana", "", "BAR", "random "])
def test_an_unknown_method_is_refused_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    config = PruneRequest(model="no.such.module:factory", data="no-such-data", budget="8ms", method=name)
    with pytest.raises(InputError, match="--method bar, fisher, magnitude, slimming, random"):
        pipeline.prune(config, tmp_path / "run")
    with pytest.raises(InputError, match="--method bar, fisher, magnitude, slimming, random"):
        pipeline.deploy(DeployRequest(prune=config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_method_is_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--model", "resnet20", "--method", "banana", "--out", str(tmp_path / "run")]) == 2
    assert "got: banana" in capsys.readouterr().err


def test_help_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    main(["prune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: {method.says}" in text for name, method in METHODS.items())


def test_every_line_names_a_module_that_scores() -> None:
    assert all(callable(method.score) and find_method(name) is method for name, method in METHODS.items())
    assert [name for name, method in METHODS.items() if method.trains] == ["bar", "slimming"]


@pytest.mark.parametrize("own", [(3, 4), (0,), (0, 1, 2, 3, 4, 5, 6)])
def test_what_a_method_closed_itself_is_not_forced(own: tuple[int, ...]) -> None:
    layout = GateLayout(network := tiny())
    opened = torch.ones(layout.size, dtype=torch.bool)
    opened[list(own)] = False
    scores = torch.arange(layout.size, dtype=torch.float32)
    limit = layout.cost(layout.kept(opened), "volume")
    scored = Scored(network=network, scores=scores, opened=opened)
    plan, forced = plan_within(layout, scored, "volume", limit)
    assert (plan, forced) == (layout.plan(opened), 0)
    # one channel less fits: one is forced; and with less to close than the method did, its best come back
    assert plan_within(layout, scored, "volume", limit - 1)[1] == 1
    again, forced = plan_within(layout, scored, "volume", layout.cost({}, "volume"), reopen=True)
    assert (again, forced) == (layout.plan(torch.ones_like(opened)), 0)


def test_ranks_alone_force_nothing() -> None:
    layout = GateLayout(network := tiny())
    scored = Scored(network=network, scores=torch.arange(layout.size, dtype=torch.float32))
    plan, forced = plan_within(layout, scored, "volume", layout.cost({}, "volume") / 2)
    assert forced == 0
    assert sum(map(len, plan.kept.values())) == layout.size / 2


def test_a_stopped_run_does_not_score_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = list[str]()

    def score(self: Method, dense: Network, context: object) -> Scored:
        scored.append(self.module)
        return Scored(network=dense, scores=torch.rand(GateLayout(dense).size))

    monkeypatch.setattr(Method, "score", score)
    config, out = (
        PruneRequest(model=f"{__file__}:Tiny", budget="2x", method="random", train=NO_TRAINING),
        tmp_path / "run",
    )
    first = pipeline.prune(config, out)
    plan = read_json(out / "plan.json")
    for name in ("plan.json", "result.json"):
        (out / name).unlink()
    assert pipeline.prune(config, out, resume=True) == first
    assert (len(scored), read_json(out / "plan.json")) == (1, plan)
