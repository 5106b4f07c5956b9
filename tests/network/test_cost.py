"""Costs: hooks, formulas, expectations and gradients agree."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bar_edge.errors import InputError
from bar_edge.methods import GateLayout
from bar_edge.methods.gating.gate_cost import GateCost
from bar_edge.methods.gating.hard_concrete import probability_open
from bar_edge.models import build
from bar_edge.network import Network, count, layers, trace
from bar_edge.network.counted_cost import count_executed
from bar_edge.records import ChannelPlan, Metric
from bar_edge.runs.inspection import preflight
from bar_edge.surgery import slice_network
from tests.reference import hooked_counts, random_kept, torch_flops

METRICS: tuple[Metric, ...] = ("volume", "flops", "params")
ZOO = {"wrn-10-1": 1.0, "resnet20": 0.25, "mobilenetv2": 0.25, "vgg16": 0.0625}


@pytest.fixture(scope="module", params=ZOO)
def network(request: pytest.FixtureRequest) -> Network:
    module = build(request.param, input_shape=(3, 8, 8), classes=10, model_args=(f"width={ZOO[request.param]}",))
    return trace(module.eval(), torch.zeros(1, 3, 8, 8))


def opened_by(layout: GateLayout, kept: dict[str, tuple[int, ...]]) -> Tensor:
    opened = torch.zeros(layout.size, dtype=torch.bool)
    for name, ids in kept.items():
        opened[[layout.offsets[name][0] + i for i in ids]] = True
    return opened


def test_full_cost_is_the_count(network: Network) -> None:
    layout = GateLayout(network)
    images = torch.zeros(1, 3, 8, 8)
    measured = dict(zip(METRICS, hooked_counts(network, images), strict=True))
    for metric in METRICS:
        assert GateCost(layout, metric).full == count(network).of(metric) == measured[metric]


def test_hard_cost_is_the_count_where_nothing_dies(network: Network) -> None:
    layout = GateLayout(network)
    kept = random_kept(network.body, 0.6, seed=2)
    opened = opened_by(layout, kept)
    assert layout.kept(opened) == kept
    plan = layout.plan(opened)
    images = torch.zeros(1, 3, 8, 8)
    measured = dict(zip(METRICS, hooked_counts(slice_network(network, plan), images), strict=True))
    for metric in METRICS:
        assert GateCost(layout, metric).hard(opened) == count(network, plan).of(metric) == measured[metric]


def test_rows_add_up(network: Network) -> None:
    plan = ChannelPlan(network=network.fingerprint, kept=random_kept(network.body, 0.5, seed=9))
    for chosen in (None, plan):
        rows, total = layers(network, chosen), count(network, chosen)
        assert sum(r.volume for r in rows) == total.volume
        assert sum(r.flops for r in rows) == total.flops
        assert sum(r.params for r in rows) == total.params
        for row in rows:
            assert row.volume == row.area * row.out_channels


def test_dead_layers_are_not_counted() -> None:
    module = build("wrn-16-1", input_shape=(3, 8, 8), classes=10).eval()
    network = trace(module, torch.zeros(1, 3, 8, 8))
    kept = random_kept(network.body, 0.5, seed=1, dead=["stages.1.1.conv1"])
    without = random_kept(network.body, 0.5, seed=1, dead=["stages.1.1.conv1", "stages.1.1.conv2"])
    plans = [ChannelPlan(network=network.fingerprint, kept=k) for k in (kept, without)]
    assert count(network, plans[0]) == count(network, plans[1])
    # before closure the barrier still sees the writer behind the dead layer
    layout = GateLayout(network)
    area, maps = 16, len(kept["stages.1.1.conv2"])
    assert GateCost(layout, "volume").hard(opened_by(layout, kept)) == count(network, plans[0]).volume + area * maps


class Stream(nn.Module):
    """Two writers of a two-channel stream, then a reader of it: the vector of the methods sheet, 1.10."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(3, 2, 1, bias=False)
        self.reader, self.fc = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(x) + self.second(x)
        return self.fc(F.relu(self.reader(stream)).mean((2, 3)))


def test_expected_width_of_a_stream() -> None:
    network = trace(Stream(), torch.zeros(1, 3, 4, 4))
    layout = GateLayout(network)
    p = torch.zeros(layout.size, dtype=torch.float64)
    for name, values in {"first": (0.9, 0.2), "second": (0.5, 0.4), "reader": (1.0, 1.0, 0.0)}.items():
        first, n = layout.offsets[name]
        p[first : first + n] = torch.tensor(values, dtype=torch.float64)
    p.requires_grad_(True)
    writers, n_in, n_out, area = 1.1 + 0.9, 0.95 + 0.52, 2, 16
    flops = GateCost(layout, "flops").expected(p)
    assert flops.item() == pytest.approx(2 * area * (3 * writers + 9 * n_in * n_out), rel=1e-12)
    params = GateCost(layout, "params").expected(p)
    assert params.item() == pytest.approx(3 * writers + 9 * n_in * n_out + n_out * 4 + 4, rel=1e-12)
    assert GateCost(layout, "volume").expected(p).item() == pytest.approx(area * (writers + n_out), rel=1e-12)
    # product rule: reader and both writers
    (gradient,) = torch.autograd.grad(flops, p)
    reader, first, second = (layout.offsets[name][0] for name in ("reader", "first", "second"))
    assert gradient[reader].item() == pytest.approx(2 * area * 9 * n_in, rel=1e-9)
    assert gradient[first].item() == pytest.approx(2 * area * (3 + 9 * n_out * (1 - 0.5)), rel=1e-9)
    assert gradient[second + 1].item() == pytest.approx(2 * area * (3 + 9 * n_out * (1 - 0.2)), rel=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_expectation_is_exact_over_all_outcomes(metric: Metric) -> None:
    network = trace(Stream(), torch.zeros(1, 3, 4, 4))
    layout = GateLayout(network)
    cost = GateCost(layout, metric)
    p = torch.rand(layout.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = 0.0
    for outcome in itertools.product((False, True), repeat=layout.size):
        opened = torch.tensor(outcome)
        mean += float(torch.where(opened, p, 1 - p).prod()) * cost.hard(opened)
    assert cost.expected(p).item() == pytest.approx(mean, rel=1e-12)  # float64 sums


@pytest.mark.parametrize("metric", METRICS)
def test_expectation_is_the_mean_over_samples(network: Network, metric: Metric) -> None:
    layout = GateLayout(network)
    cost = GateCost(layout, metric)
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(layout.size, generator=generator, dtype=torch.float64)
    samples = torch.tensor(
        [cost.hard(torch.rand(layout.size, generator=generator, dtype=torch.float64) < p) for _ in range(300)]
    )
    # four standard errors
    assert cost.expected(p).item() == pytest.approx(samples.mean().item(), abs=4 * samples.std().item() / 300**0.5)


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_reach_every_gate_and_are_right(network: Network, metric: Metric) -> None:
    layout = GateLayout(network)
    cost = GateCost(layout, metric)
    a = torch.linspace(-2, 3, layout.size, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cost.expected(probability_open(a)), a)
    assert (gradient > 0).all()
    for i in range(0, layout.size, max(1, layout.size // 7)):
        step = torch.zeros(layout.size, dtype=torch.float64)
        step[i] = 1e-5
        with torch.no_grad():
            slope = (cost.expected(probability_open(a + step)) - cost.expected(probability_open(a - step))) / 2e-5
        assert gradient[i].item() == pytest.approx(slope.item(), rel=1e-4)  # central differences


def test_gradient_at_saturated_gates_is_finite() -> None:
    layout = GateLayout(trace(Stream(), torch.zeros(1, 3, 4, 4)))
    for value in (-10.0, 10.0):  # twice as far as the default lets gates go
        a = torch.full((layout.size,), value, requires_grad=True)
        (gradient,) = torch.autograd.grad(GateCost(layout, "flops").expected(probability_open(a)), a)
        assert gradient.isfinite().all()


def test_parameters_of_no_module_are_counted_by_both() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.g, self.fc = nn.Conv2d(3, 8, 3), nn.Parameter(torch.ones(1, 8, 1, 1)), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Any:
            return self.fc(F.relu(self.a(x) * self.g).mean((2, 3)))

    module = Scaled()
    network = trace(module, torch.zeros(1, 3, 8, 8))
    assert count(network).params == sum(p.numel() for p in module.parameters())
    assert GateCost(GateLayout(network), "params").full == count(network).params


def test_dead_groups_are_not_counted() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    network = trace(module, torch.zeros(1, 3, 8, 8))
    plan = ChannelPlan(network=network.fingerprint, kept={"0": (1, 2)})  # both in the first group
    expected = hooked_counts(slice_network(network, plan), torch.zeros(1, 3, 8, 8))
    counts = count(network, plan)
    assert (counts.volume, counts.flops, counts.params) == expected
    assert counts.volume == 64 * (2 + 4 + 4)
    assert counts.flops == 2 * 64 * (9 * 3 * 2 + 9 * 2 * 4 + 4 * 4)


def test_zeros_that_fill_groups_are_executed_but_not_counted() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 4, 1))
    network = trace(module, torch.zeros(1, 3, 8, 8))
    uneven = ChannelPlan(network=network.fingerprint, kept={"0": (0, 1, 2, 4), "1": (0, 1, 4)})
    sliced = slice_network(network, uneven)
    assert count(sliced) == count(network, uneven)
    executed = count_executed(sliced)
    assert executed.volume == 64 * (4 + 4 + 4) > count(sliced).volume == 64 * (4 + 3 + 4)
    assert executed.flops == 2 * 64 * (9 * 3 * 4 + 9 * 3 * 4 + 3 * 4) > count(sliced).flops
    even = ChannelPlan(network=network.fingerprint, kept={"0": (0, 1, 4, 5), "1": (0, 1, 4, 6)})
    sliced = slice_network(network, even)
    assert count_executed(sliced) == count(sliced) == count(network, even)


class Computed(nn.Module):
    """A stem, a convolution whose weight is computed in forward, a head."""

    def __init__(self, function: Any, weight: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.function, self.fc = nn.Conv2d(3, 8, 3, padding=1), function, nn.Linear(8, 4)
        self.w, self.choose = nn.Parameter(torch.randn(weight)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.function(self, F.relu(self.stem(x))).flatten(2).mean(2))


def filters_by_image(convolve: Any, *weight: int) -> Any:
    """CondConv: every image has filters of its own, mixed of two by what it shows."""

    def function(s: Any, x: Tensor) -> Tensor:
        n, c, *space = x.shape
        own = (s.choose(x.flatten(2).mean(2)).softmax(1) @ s.w.flatten(1)).view(n * weight[0], *weight[1:])
        made = convolve(x.reshape(1, n * c, *space), own, groups=n)
        return made.view(n, 8, *made.shape[2:])

    return function


COMPUTED: dict[str, tuple[Any, tuple[int, ...]]] = {
    "a convolution": (filters_by_image(F.conv2d, 8, 8, 3, 3), (2, 8, 8, 3, 3)),
    "with holes": (lambda s, x: filters_by_image(partial(F.conv2d, dilation=2), 8, 8, 2, 3)(s, x), (2, 8, 8, 2, 3)),
    "transposed": (filters_by_image(partial(F.conv_transpose2d, stride=2), 8, 8, 2, 2), (2, 8, 8, 2, 2)),
    "one-dimensional": (lambda s, x: filters_by_image(F.conv1d, 8, 8, 3)(s, x.flatten(2)), (2, 8, 8, 3)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_layers_with_computed_weights_are_counted(name: str) -> None:
    module, images = Computed(*COMPUTED[name]).eval(), torch.randn(3, 3, 8, 8)
    network = trace(module, images)
    _, everything = torch_flops(module, images)
    layout = GateLayout(network)
    assert count(network).flops + sum(layout.uncounted.values()) == everything
    (row,) = [row for row in layers(network) if row.reason == "its weights are computed"]
    assert row.flops and row.volume and not row.gated
    plan = ChannelPlan(network=network.fingerprint, kept={"stem": (0, 5)})
    sliced = slice_network(network, plan)
    assert count(network, plan) == count(sliced)
    assert count(sliced).flops >= row.flops and GateCost(layout, "flops").hard(opened_by(layout, plan.kept)) > row.flops
    answer = preflight(layout, [])
    assert answer["costs"]["flops"]["prunable_share"] < 1 - row.flops / count(network).flops + 1e-9
    assert any("test_cost.py:" in warning and "computed" in warning for warning in answer["warnings"])


def by_its_inner_name(s: Any, x: Tensor) -> Tensor:
    return torch._convolution(x, s.w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, False, False, False, False)


def test_a_convolution_that_nobody_counts_is_refused() -> None:
    network = trace(Computed(by_its_inner_name, (8, 8, 3, 3)).eval(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(InputError, match="aten._convolution.* at test_cost.py:.*\n.*leave them out"):
        GateLayout(network)
