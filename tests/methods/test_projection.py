"""Projections: what was promised is met, with every protected channel, on networks that once were not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bar_edge.errors import InputError
from bar_edge.methods import GateLayout, smallest_cost
from bar_edge.methods.gating.projection import project
from bar_edge.network import count, counted_cost
from bar_edge.network.liveness import held_channels
from bar_edge.surgery import slice_network
from tests.small import Net, conv, traced


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x: s.h(F.relu(s.a(x)).mean((2, 3), keepdim=True)).flatten(1).squeeze(1),
        lambda s, x: s.h(F.adaptive_max_pool2d(F.relu(s.a(x)), 1)).flatten(1),
        lambda s, x: s.h((lambda a, b: a * torch.sigmoid(b))(*s.a(x).chunk(2, 1))),
        lambda s, x: s.h((lambda a: a * torch.sigmoid(s.g(a)))(s.a(x))),
    ],
    ids=["one number per image", "behind a pair of tensors", "gated linear unit", "gate of itself"],
)
def test_the_smallest_network_is_alive(body: Callable[[Any, Tensor], Tensor], request: pytest.FixtureRequest) -> None:
    half = 4 if "linear" in request.node.callspec.id else 8
    parts = {"a": conv(3, 8), "h": conv(half, 1)} | ({"g": conv(8, 8)} if "itself" in request.node.callspec.id else {})
    _, network, _ = traced(Net(body, **parts))
    layout = GateLayout(network)
    least = smallest_cost(layout, "flops")
    assert 0 < least < count(network).flops
    for seed in range(5):
        scores = torch.rand(layout.size, generator=torch.Generator().manual_seed(seed))
        plan, _ = project(layout, scores, torch.ones(layout.size, dtype=torch.bool), "flops", least)
        held = held_channels(network, plan.kept)
        ends = [node for output in network.nodes if output.op == "output" for node in output.all_input_nodes]
        assert all(held[end].any() for end in ends if end in held)
        assert 0 < count(network, plan).flops <= least


def test_a_budget_that_was_promised_is_met_at_any_scores() -> None:
    body = lambda s, x: torch.cat([s.h(s.a(x)), s.g(s.b(s.a(x))), s.k(s.a(x) + s.b(s.a(x)))], 1)  # noqa: E731
    _, network, _ = traced(Net(body, a=conv(3, 8), b=conv(8, 8), h=conv(8, 2), g=conv(8, 2), k=conv(8, 2)))
    for keep in ((), ("a=4",)):
        layout = GateLayout(network, keep=keep)
        for metric in ("volume", "flops", "params"):
            least = smallest_cost(layout, metric)
            for seed in range(5):
                scores = torch.rand(layout.size, generator=torch.Generator().manual_seed(seed))
                plan, _ = project(layout, scores, torch.ones(layout.size, dtype=torch.bool), metric, least)
                assert count(network, plan).of(metric) <= least


KEPT: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module]]] = {
    "a branch beside the cheapest path": (
        lambda s, x: s.h((lambda y: y + s.b(F.relu(s.a(y))))(F.relu(s.s(x)))),
        {"s": conv(3, 8), "a": conv(8, 8), "b": conv(8, 8), "h": conv(8, 2)},
    ),
    "behind another layer": (
        lambda s, x: s.h(torch.cat([s.s(x), s.b(s.a(s.c(x)))], 1)),
        {"s": conv(3, 4), "c": conv(3, 8), "a": conv(8, 8), "b": conv(8, 4), "h": conv(8, 2)},
    ),
    "half of it is read elsewhere": (
        lambda s, x: s.h(torch.cat([s.s(x), (lambda y: torch.cat([s.b(y[:, :3]), s.c(y[:, 2:])], 1))(s.a(x))], 1)),
        {"s": conv(3, 4), "a": conv(3, 8), "b": conv(3, 4), "c": conv(6, 4), "h": conv(12, 2)},
    ),
    "a gate of two convolutions": (
        lambda s, x: s.h(s.s(x) + s.b(s.a(x) * torch.sigmoid(s.g(x)))),
        {"s": conv(3, 4), "a": conv(3, 8), "g": conv(3, 8), "b": conv(8, 4), "h": conv(4, 2)},
    ),
    "squeeze and excite": (
        lambda s, x: s.h(s.s(x) + s.b((lambda y: y * torch.sigmoid(s.f(F.relu(s.e(y.mean((2, 3), True))))))(s.a(x)))),
        {"s": conv(3, 4), "a": conv(3, 8), "e": conv(8, 2), "f": conv(2, 8), "b": conv(8, 4), "h": conv(4, 2)},
    ),
    "grouped": (
        lambda s, x: s.h(s.s(x) + s.b(F.relu(s.a(F.relu(s.c(x)))))),
        {"s": conv(3, 4), "c": conv(3, 8), "a": conv(8, 8, groups=4), "b": conv(8, 4), "h": conv(4, 2)},
    ),
    "read by groups": (
        lambda s, x: s.h(s.s(x) + s.b(F.relu(s.a(x)))),
        {"s": conv(3, 4), "a": conv(3, 8), "b": conv(8, 4, groups=2), "h": conv(4, 2)},
    ),
}


@pytest.mark.parametrize("keep", ["a=4", "a"])
@pytest.mark.parametrize("name", KEPT)
def test_a_least_width_is_that_of_the_sliced_layer(name: str, keep: str) -> None:
    body, parts = KEPT[name]
    least, asked = ("a=4", 4) if "=" in keep else ("a", 8)
    asked = min(asked, 6) if name == "half of it is read elsewhere" else asked
    _, network, _ = traced(Net(body, **copy.deepcopy(parts)))
    layout = GateLayout(network, keep=(least,))
    for metric in ("volume", "flops", "params"):
        limit = smallest_cost(layout, metric)
        for seed in range(4):
            scores = torch.rand(layout.size, generator=torch.Generator().manual_seed(seed))
            plan, _ = project(layout, scores, torch.ones(layout.size, dtype=torch.bool), metric, limit)
            sliced = slice_network(network, plan)
            layer = sliced.body.get_submodule("a")
            assert isinstance(layer, nn.Conv2d) and layer.out_channels >= asked, (metric, seed)
            assert count(sliced).of(metric) <= limit


def test_a_least_width_that_cannot_be_read_is_refused() -> None:
    body = lambda s, x: (lambda y: s.h(y[:, :3]) + s.k(y[:, 5:]))(s.a(x))  # noqa: E731
    _, network, _ = traced(Net(body, a=conv(3, 8), h=conv(3, 2), k=conv(3, 2)))
    with pytest.raises(InputError, match="a=6 or less"):
        smallest_cost(GateLayout(network, keep=("a=7",)), "volume")
    assert smallest_cost(GateLayout(network, keep=("a=6",)), "volume") == 64 * 6 + 64 * 4


def test_a_projection_analyses_the_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, network, _ = traced(Net(lambda s, x: s.h(F.relu(s.b(s.a(x)))), a=conv(3, 32), b=conv(32, 32), h=conv(32, 2)))
    layout, calls = GateLayout(network), list[None]()
    analysed, scores = counted_cost.units, torch.rand(layout.size, generator=torch.Generator().manual_seed(0))

    def counted(*args: Any) -> Any:
        calls.append(None)
        return analysed(*args)

    monkeypatch.setattr(counted_cost, "units", counted)
    project(layout, scores, torch.ones(layout.size, dtype=torch.bool), "volume", count(network).volume / 2)
    assert len(calls) == 1  # that is `count` above
