"""Which gates close: by importance over price, in the device's steps, never what is protected."""

import math

import pytest
import torch
from torch import Tensor, nn

from bar_edge.config import TrainConfig
from bar_edge.methods import BAR, GateLayout, smallest_cost
from bar_edge.methods.bar.closing import Closer
from bar_edge.methods.gating.projection import project, protected_gates
from bar_edge.models import build
from bar_edge.network import Network, count, trace
from bar_edge.records import Metric
from tests.latency_budget.test_latency import made_up


def traced(name: str, width: float, side: int = 8) -> Network:
    module = build(name, input_shape=(3, side, side), classes=10, model_args=(f"width={width}",))
    return trace(module.eval(), torch.zeros(1, 3, side, side))


def opened_after(layout: GateLayout, metric: Metric, importance: Tensor, limit: float) -> Tensor:
    opened = torch.ones(layout.size, dtype=torch.bool)
    for gates, cost in Closer(layout, metric).close(opened.clone(), importance, limit):
        assert opened[gates].all()
        opened[gates] = False
        assert layout.cost(layout.kept(opened), metric) == cost
    return opened


def test_of_two_layers_of_equal_importance_the_dearer_closes() -> None:
    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small, self.last = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 2, 1), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.small(self.large(x).relu()).relu().mean((2, 3)))

    layout = GateLayout(trace(Halving(), torch.zeros(1, 3, 8, 8)))
    full = layout.cost({}, "volume")
    kept = layout.kept(opened_after(layout, "volume", torch.ones(layout.size), 0.9 * full))
    assert (len(kept["large"]), len(kept["small"])) == (14, 16)
    # the losses of a layer's channels add up before they are squared: a third one of `large` would cost 5 / 64
    kept = layout.kept(opened_after(layout, "volume", torch.ones(layout.size), 0.89 * full))
    assert (len(kept["large"]), len(kept["small"])) == (14, 15)
    dear = torch.ones(layout.size)
    dear[:16] = 100.0  # four times the map, a hundred times the importance
    kept = layout.kept(opened_after(layout, "volume", dear, 0.95 * full))
    assert (len(kept["large"]), len(kept["small"])) == (16, 12)


@pytest.mark.parametrize(
    ("name", "width", "metric", "least"),
    [
        ("wrn-10-1", 0.5, "volume", 1.5),
        ("wrn-10-1", 0.5, "params", 1.5),
        ("vgg16", 0.0625, "flops", 3.0),
        ("mobilenetv2", 0.25, "volume", 0.0),
    ],
)
def test_any_budget_is_reached_and_paths_stay(name: str, width: float, metric: Metric, least: float) -> None:
    layout = GateLayout(traced(name, width))
    importance = torch.rand(layout.size, generator=torch.Generator().manual_seed(1))
    limit = smallest_cost(layout, metric) * least or 0.9 * layout.cost({}, metric)
    opened = opened_after(layout, metric, importance, limit)
    assert layout.cost(layout.kept(opened), metric) <= limit
    assert all(int(opened[ids].sum()) >= n for ids, n in protected_gates(layout, metric))
    assert torch.equal(layout.living(opened), opened)


def test_widths_are_those_that_the_device_rewards() -> None:
    network = traced("resnet20", 1.0)
    layout = GateLayout(network, table=made_up(network))  # steps of 4 up to 16, of 16 above
    importance = torch.rand(layout.size, generator=torch.Generator().manual_seed(2))
    opened = opened_after(layout, "ms", importance, 0.4 * layout.cost({}, "ms"))
    # inside the blocks; what a stream loses, all its writers lose, however many they were
    widths = {len(ids) for name, ids in layout.kept(opened).items() if name.endswith("conv1")}
    assert widths <= {0, 4, 8, 12, 16, 32, 48, 64} and len(widths) > 2


def test_a_budget_in_ms_falls_from_the_whole_latency() -> None:
    network = traced("resnet20", 0.5)
    table = made_up(network)
    whole = GateLayout(network, table=table).cost({}, "ms")
    pruner = BAR(network, budget=f"{whole / 2:.6f}ms", steps=10, table=table)
    assert pruner.schedule.upper(0) == pytest.approx(1.01 * whole) and pruner.optimizer.state_dict()["cost"] == whole


def test_a_branch_counts_once() -> None:
    """A residual branch goes with the loss of its last or first layer, not with that of both."""
    layout = GateLayout(traced("resnet20", 0.5))
    closer, opened = Closer(layout, "volume"), torch.ones(layout.size, dtype=torch.bool)
    first, n = layout.offsets["layer1.0.conv1"]
    tier = next(t for t in closer.tiers if t.dying is not None and int(t.gate[0]) == first)
    away = closer._moves(tier, opened, torch.ones(layout.size, dtype=torch.float64))[-1]
    assert float(away.lost) == n**2 and int(away.gates.sum()) == 2 * n


@pytest.mark.parametrize("metric", ["volume", "flops", "params"])
@pytest.mark.parametrize("round_to", [1, 8])
def test_a_counted_budget_is_used_up(metric: Metric, round_to: int) -> None:
    layout = GateLayout(traced("wrn-10-1", 1.0), round_to=round_to)
    scores = torch.randn(layout.size, generator=torch.Generator().manual_seed(3))
    for share in (0.3,):
        limit = share * layout.cost({}, metric)
        plan, _ = project(layout, scores, scores > 0, metric, limit)
        cost = count(layout.network, plan).of(metric)
        fits = [
            name
            for name, (_, n) in layout.offsets.items()
            if plan.kept[name]
            and len(closed := [i for i in range(n) if i not in plan.kept[name]]) >= round_to
            and layout.cost({**plan.kept, name: (*plan.kept[name], *closed[:round_to])}, metric) <= limit
        ]
        assert cost <= limit and (cost >= 0.97 * limit or not fits), (share, cost / limit, fits)


def test_what_is_not_given_is_chosen_by_the_number_of_images() -> None:
    digits, cifar = TrainConfig().chosen(1295), TrainConfig().chosen(45_000)
    assert (digits.batch, cifar.batch) == (32, 128)
    assert (cifar.dense, cifar.prune, cifar.tune) == (20, 8, 24)
    assert digits.dense is not None and digits.dense * (1295 // 32) >= 1500
    assert digits.rate("tune") == pytest.approx(cifar.rate("tune") / 2)
    given = TrainConfig(dense=0, tune=3, batch=7, lr_prune=0.5).chosen(1295)
    assert (given.dense, given.tune, given.batch, given.lr_prune) == (0, 3, 7, 0.5)
    assert given.prune == math.ceil(600 / (1295 // 7)) or given.prune == 8
    assert given.chosen(45_000) == given
