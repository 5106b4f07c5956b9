"""Weight magnitude: its vectors, which filters go, and networks of every kind pruned exactly and within budget."""

import pytest
import torch
from torch import Tensor, nn

from bar_edge.config import MagnitudeConfig
from bar_edge.methods import METHODS, GateLayout, budget_limit
from bar_edge.methods.distillation import soft_cross_entropy
from bar_edge.methods.filters import filters
from bar_edge.methods.gating.projection import plan_within, protected_gates
from bar_edge.methods.magnitude import ranks, size
from bar_edge.methods.method import Context, Scored
from bar_edge.network import Network, count, trace
from bar_edge.records import Budget
from bar_edge.requests import PruneRequest
from bar_edge.surgery import masked_outputs, relative_difference, slice_network
from tests.methods.test_gates import NETS
from tests.reference import contrasting, randomise

OPTIONS = [MagnitudeConfig(norm=n, scope=s) for n in ("l1", "l2") for s in ("layer", "global")]


def scored(network: Network, budget: str, options: MagnitudeConfig) -> tuple[Context, Scored]:
    layout, parsed = GateLayout(network), Budget.parse(budget)

    def untouched(*_: object) -> object:
        raise AssertionError("magnitude needs neither images nor training")

    context = Context(
        config=PruneRequest(model="of the test", budget=budget, method="magnitude", magnitude=options),
        layout=layout,
        budget=parsed,
        limit=budget_limit(layout, parsed),
        steps=0,
        teacher=None,
        soft_loss=soft_cross_entropy,
        loss=untouched,  # type: ignore[arg-type]
        train=untouched,  # type: ignore[arg-type]
        batches=untouched,  # type: ignore[arg-type]
    )
    return context, METHODS["magnitude"].score(network, context)


@pytest.mark.parametrize(
    ("rows", "l1", "l2"),
    [
        ([[1.0, -2.0], [3.0, 0.0]], [1.5, 1.5], [2.5**0.5, 4.5**0.5]),
        # signs do not cancel: the larger filter is the first, not the last
        ([[5.0, -5.0], [1.0, 1.0]], [5.0, 1.0], [5.0, 1.0]),
        ([[0.0, 0.0], [0.5, 0.5]], [0.0, 0.5], [0.0, 0.5]),
        # three weights or one: compared per weight
        ([[2.0, 2.0, 2.0], [0.0, 0.0, 3.0]], [2.0, 1.0], [2.0, 3.0**0.5]),
    ],
)
def test_sizes(rows: list[list[float]], l1: list[float], l2: list[float]) -> None:
    assert size(torch.tensor(rows), "l1").tolist() == pytest.approx(l1)
    assert size(torch.tensor(rows), "l2").tolist() == pytest.approx(l2)


def test_ranks_are_evenly_spaced() -> None:
    assert ranks(torch.tensor([0.3, 0.1, 9.0, 0.2])).tolist() == [0.625, 0.125, 0.875, 0.375]


def test_filters_of_every_kind_of_layer() -> None:
    weight = torch.arange(24.0)
    conv = nn.Conv2d(2, 3, 2)
    conv.weight = nn.Parameter(weight.view(3, 2, 2, 2))
    assert torch.equal(filters(conv), weight.view(3, 8))
    # transposed, two groups: (in, out per group, taps); output 1 is read from inputs 0 and 1, output 2 from 2 and 3
    transposed = nn.ConvTranspose1d(4, 4, 3, groups=2)
    transposed.weight = nn.Parameter(weight.view(4, 2, 3))
    assert filters(transposed)[1].tolist() == [3.0, 4.0, 5.0, 9.0, 10.0, 11.0]
    assert filters(transposed)[2].tolist() == [12.0, 13.0, 14.0, 18.0, 19.0, 20.0]


class Two(nn.Module):
    """Two layers, the filters of the second larger than those of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([0.4, 0.1, 0.3, 0.2])[:, None, None, None].expand_as(self.a.weight))
            self.b.weight.copy_(-torch.tensor([5.0, 8.0, 7.0, 6.0])[:, None, None, None].expand_as(self.b.weight))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.b(self.a(x).relu()).relu())
        return y


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (OPTIONS[0], {"a": (0, 2), "b": (1, 2)}),
        (OPTIONS[2], {"a": (0, 2), "b": (1, 2)}),
        (OPTIONS[1], {"a": (0,), "b": (1, 2, 3)}),  # one of `a` is protected
        (OPTIONS[3], {"a": (0,), "b": (1, 2, 3)}),
    ],
)
def test_the_smallest_filters_go(options: MagnitudeConfig, kept: dict[str, tuple[int, ...]]) -> None:
    network = trace(Two().eval(), torch.zeros(2, 3, 4, 4))
    full = count(network).volume
    context, found = scored(network, f"{full - 4 * 16}act", options)
    assert plan_within(context.layout, found, "volume", context.limit)[0].kept == kept


@pytest.mark.parametrize(("options", "budget"), [(OPTIONS[0], "2x:flops"), (OPTIONS[3], "2x")], ids=["l1", "l2"])
@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_network_is_pruned_exactly_and_within_budget(
    name: str, options: MagnitudeConfig, budget: str
) -> None:
    torch.manual_seed(0)
    module = randomise(NETS[name]().double(), seed=1, removed=0.3).eval()
    network = trace(module, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    context, found = scored(network, budget, options)
    metric = context.budget.metric
    plan, _ = plan_within(context.layout, found, metric, context.limit)
    images, sliced = contrasting(2, 3, 8, 8), slice_network(network, plan)
    with torch.no_grad():
        assert relative_difference(masked_outputs(network, plan, images), sliced(images)) < 1e-9
    assert count(sliced).of(metric) <= context.limit
    # no filter is kept instead of a larger one of its layer, but for those that are protected
    protected = torch.cat([ids for ids, _ in protected_gates(context.layout, metric)])
    for layer, (first, n) in context.layout.offsets.items():
        own = found.scores[first : first + n]
        ids = [i for i in plan.kept[layer] if first + i not in protected]
        gone = [i for i in range(n) if i not in plan.kept[layer]]
        if ids and gone and layer not in context.layout.groups:
            assert own[ids].min() >= own[gone].max()
