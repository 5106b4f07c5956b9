"""Tensors that forward reads by itself: layer scales, class tokens, position biases, norms written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bar_edge.network import Network, prunable, trace
from bar_edge.records import ChannelPlan
from bar_edge.surgery import masked_outputs, relative_difference, slice_network
from tests.meaning import masked_answer
from tests.reference import contrasting, randomise


class Net(nn.Module):
    """A function of one tensor and the parts given by name; plain tensors among them are buffers."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            buffer = isinstance(part, Tensor) and not isinstance(part, nn.Parameter)
            self.register_buffer(name, part) if buffer else setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(inputs: int = 8, outputs: int = 8, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, k, padding=k // 2, **options)


def images(n: int = 2) -> Tensor:
    return contrasting(n, 3, 8, 8)


def half_of_every_layer(network: Network) -> ChannelPlan:
    """Return a plan that keeps every second channel of whatever can be pruned."""
    widths = {str(n.target): network.shapes[n.name] for n in network.nodes if n.op == "call_module"}
    kept = {}
    for name, reason in prunable(network).items():
        module = network.body.get_submodule(name)
        width = module.out_features if isinstance(module, nn.Linear) else int(module.out_channels)  # type: ignore[arg-type]
        if not reason and name in widths:
            kept[name] = tuple(range(0, width, 2))
    return ChannelPlan(network=network.fingerprint, kept=kept)


def exact(module: nn.Module, oracle: bool = True) -> Network:
    """Trace in float32; with half of every layer masked = sliced in float64, and = the meaning on the user's module."""
    randomise(module).eval()
    network = trace(module, images().float())
    plan, x = half_of_every_layer(network), images()
    assert plan.kept
    with torch.no_grad():
        assert relative_difference(module(x.float()), network(x.float())) < 1e-5
    double = copy.deepcopy(network).double()
    assert double.fingerprint == network.fingerprint
    sliced = slice_network(network, plan)
    with torch.no_grad():
        answer = copy.deepcopy(sliced).double()(x)
    assert relative_difference(masked_outputs(double, plan, x), answer) < 1e-9
    for part in module.modules():
        if parametrize.is_parametrized(part):
            parametrize.remove_parametrizations(part, "weight")
    if oracle:
        assert relative_difference(masked_answer(module.double(), plan.kept, x), answer) < 1e-5
    return network


LOOSE: dict[str, Callable[[], nn.Module]] = {
    "a layer scale": lambda: Net(
        lambda s, x: s.b(s.a(x).relu() * s.g), a=conv(3), b=conv(8, 4), g=nn.Parameter(torch.ones(8, 1, 1))
    ),
    "a class token": lambda: Net(
        lambda s, x: s.b(torch.cat([s.t.expand(x.shape[0], -1, -1), s.a(x).flatten(2).mT], 1))[:, 0],
        a=conv(3), b=nn.Linear(8, 4), t=nn.Parameter(torch.randn(1, 1, 8)),
    ),
    "a position bias": lambda: Net(
        lambda s, x: s.b(s.a(x)) + s.table[s.index].view(8, 8), a=conv(3), b=conv(8, 4),
        table=nn.Parameter(torch.randn(15)), index=torch.arange(64) % 15,
    ),
    "a norm written by hand": lambda: Net(
        lambda s, x: s.b((s.a(x) - s.a(x).mean(1, keepdim=True)) * s.g.view(1, -1, 1, 1) + s.c.view(1, -1, 1, 1)),
        a=conv(3), b=conv(8, 4), g=nn.Parameter(torch.ones(8)), c=nn.Parameter(torch.ones(8)),
    ),
    "a buffer": lambda: Net(lambda s, x: s.b(s.a(x) * s.g), a=conv(3), b=conv(8, 4), g=torch.rand(8, 1, 1)),
    "a constant": lambda: Net(lambda s, x: s.b(s.a(x) * torch.tensor([0.5])), a=conv(3), b=conv(8, 4)),
    "numbers that are no floats": lambda: Net(
        lambda s, x: s.b(s.a(x) * s.g), a=conv(3), b=conv(8, 4), g=torch.arange(1, 65).view(8, 8)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOSE)
def test_loose_tensors_go_to_float64_and_back(name: str, tmp_path: Path) -> None:
    network = exact(LOOSE[name]())
    network.save(tmp_path / "n")
    assert Network.load(tmp_path / "n").fingerprint == network.fingerprint
