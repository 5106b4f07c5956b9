"""Gated networks that once came out wrong."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bar_edge.errors import InputError
from bar_edge.methods import BAR, GateLayout
from bar_edge.methods.gating.gated_network import GatedNetwork
from bar_edge.methods.gating.projection import protected_gates
from bar_edge.network import count
from bar_edge.surgery import masked_outputs, relative_difference
from tests.small import Net, check, conv, traced


def test_a_transposed_convolution_without_norm_is_pruned() -> None:
    body = lambda s, x: s.h(F.relu(s.t(s.a(x))))  # noqa: E731
    module = Net(body, a=conv(3, 16), t=nn.ConvTranspose2d(16, 8, 2, 2), h=conv(8, 2))
    pruner = BAR(module, torch.zeros(2, 3, 8, 8), budget="2x", steps=2)
    images = torch.rand(2, 3, 8, 8)
    outputs = pruner.network(images)
    pruner.loss(outputs.square().mean(), images, outputs).backward()
    pruner.step()
    assert count(pruner.slice()).volume <= count(pruner.dense).volume / 2


@pytest.mark.parametrize("case", ["kept reader", "squeeze-excite", "grouped"])
def test_what_dies_behind_an_ungated_reader(case: str) -> None:
    def squeeze(s: Any, y: Tensor) -> Tensor:
        return y + y * torch.sigmoid(s.f2(F.relu(s.f1(F.adaptive_avg_pool2d(y, 1)))))

    bodies: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module], str]] = {
        "kept reader": (
            lambda s, x: s.h(s.y(x) + s.bn(s.b(s.a(x)))),
            {"y": conv(3, 4), "a": conv(3, 4), "b": conv(4, 4), "bn": nn.BatchNorm2d(4), "h": conv(4, 2)},
            "a",
        ),
        "squeeze-excite": (
            lambda s, x: s.h(squeeze(s, s.y(x))),
            {"y": conv(3, 4), "f1": conv(4, 2, 1), "f2": conv(2, 4, 1), "h": conv(4, 2)},
            "f1",
        ),
        "grouped": (
            lambda s, x: s.h(s.g(torch.cat([x, s.c(x)], 1))),
            {"c": conv(3, 3), "g": conv(6, 4, groups=2), "h": conv(4, 2)},
            "c",
        ),
    }
    body, parts, dead = bodies[case]
    _, network, images = traced(Net(body, **parts))
    layout = GateLayout(network, keep=("b",) if case == "kept reader" else ("g",) if case == "grouped" else ())
    gated = GatedNetwork(layout).double()
    first, n = layout.offsets[dead]
    with torch.no_grad():
        gated.gates.log_alpha.fill_(4.0)
        gated.gates.log_alpha[first : first + n] = -4.0
        plan = layout.plan(gated.gates.opened())
        assert relative_difference(masked_outputs(network, plan, images), gated.eval()(images)) < 1e-9


def test_a_copy_of_a_gated_network_is_gated() -> None:
    _, network, images = traced(Net(lambda s, x: s.h(F.relu(s.a(x))), a=conv(3, 8), h=conv(8, 2)))
    gated = GatedNetwork(GateLayout(network)).double().eval()
    twin = copy.deepcopy(gated)
    assert twin.layout is twin.gates.layout
    assert torch.equal(gated(images), twin(images))
    assert protected_gates(twin.layout, "volume")


#: functions of a map whose value or slope at 0 is infinite, as people write them
POLES: dict[str, Callable[[Tensor], Tensor]] = {
    "filter response norm": lambda y: y * torch.rsqrt(y.square().mean((2, 3), keepdim=True)),
    "log": lambda y: torch.log(y.abs() + 1e-3),
    "log of what is there": lambda y: torch.log(y.square()),
    "root": lambda y: torch.sqrt(y.square()),
    "power": lambda y: y.abs() ** 0.5 + y.abs() ** -0.25,
    "quotient": lambda y: y / y.abs().mean((2, 3), keepdim=True),
    "standardised": lambda y: (y - y.mean((2, 3), keepdim=True)) / y.std((2, 3), keepdim=True),
    "reciprocal": lambda y: 1 / y,
}


@pytest.mark.parametrize("name", POLES)
def test_absent_channels_never_reach_a_pole(name: str) -> None:
    """Masked, sliced and gated agree, and no gradient of a shut gate's neighbours is infinite or not a number."""
    function = POLES[name]
    body = lambda s, x: s.h(function(s.b(function(s.a(x)))))  # noqa: E731
    kept = {"a": (0, 3, 4), "b": (1, 2, 5)}
    check(Net(body, a=conv(3, 6), b=conv(6, 6), h=conv(6, 2)), kept)
    _, network, images = traced(Net(body, a=conv(3, 6), b=conv(6, 6), h=conv(6, 2)))
    layout = GateLayout(network)
    assert not any(passage.kind == "opaque" for passage in layout.found.values())
    gated = GatedNetwork(layout).double()
    with torch.no_grad():
        gated.gates.log_alpha.fill_(-4.0)
        for layer, ids in kept.items():
            gated.gates.log_alpha[[layout.offsets[layer][0] + i for i in ids]] = 4.0
    plan = layout.plan(gated.gates.opened())
    assert relative_difference(masked_outputs(network, plan, images), gated.eval()(images)) < 1e-9
    with torch.no_grad():  # one gate in two is drawn shut
        gated.gates.log_alpha.fill_(-0.8)
    for _ in range(3):
        answer = gated.train()(images)
        answer.square().mean().backward()
        gradients = [p.grad for p in gated.parameters() if p.grad is not None]
        assert answer.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_writers_are_copied_to_a_device_once() -> None:
    _, network, _ = traced(Net(lambda s, x: s.h(F.relu(s.a(x) + s.b(x))), a=conv(3, 8), b=conv(3, 8), h=conv(8, 2)))
    layout, device = GateLayout(network), torch.device("meta")
    writers = next(w for node, w in layout.writers.items() if "add" in node.name)
    assert writers._on(device) is writers._on(device) and writers._on(torch.device("cpu")) is writers
    assert writers.alive(torch.ones(layout.size, device=device)).device == device


OTHER_SIZES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "interpolate to its own size": lambda s, x: s.h(F.interpolate(s.a(x)[..., ::2, ::2], size=x.shape[-2:])),
    "a number of the size": lambda s, x: s.h(s.a(x)) * (x.shape[-1] / 100),
    "a mean by hand": lambda s, x: s.h(s.a(x)).sum((2, 3)) / (x.shape[-1] * x.shape[-2]),
    "a crop of half": lambda s, x: s.h(s.a(x))[..., : x.shape[-1] // 2],
}


@pytest.mark.parametrize("case", OTHER_SIZES)
def test_images_of_another_size_are_refused_with_gates_and_without(case: str) -> None:
    """Sizes that forward computes with are numbers of the graph: the answer would be wrong without a word."""
    module = Net(OTHER_SIZES[case], a=conv(3, 4), h=conv(4, 2))
    pruner = BAR(module, torch.zeros(2, 3, 8, 8), budget="1.5x", steps=2)
    for network in (pruner.dense, pruner.network, pruner.network.eval(), copy.deepcopy(pruner.network)):
        network(torch.zeros(3, 3, 8, 8))
        with pytest.raises(InputError, match="as the network was traced") as error:
            network(torch.zeros(2, 3, 16, 16))
        assert error.value.got == "2x3x16x16"
