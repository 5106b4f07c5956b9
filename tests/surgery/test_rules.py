"""Constructs as people write them: exact under random plans, and pruned where they should be.

Each is a stem, the construct, and a head; `tests.meaning` says what a plan means, slicing must equal it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bar_edge.methods import GateLayout
from bar_edge.network import Network, count, trace
from bar_edge.records import ChannelPlan
from bar_edge.surgery import masked_outputs, relative_difference, slice_network
from tests.meaning import masked_answer
from tests.network.random_networks import enliven
from tests.reference import contrasting, difference, visible

FLOAT64 = 1e-12  # 1e-16 per layer


class Net(nn.Module):
    """A function of one tensor and the parts given by name."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        enliven(self.double(), seed=3).eval()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(inputs: int, outputs: int, k: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, k, padding=k // 2, **options)


def exact(module: nn.Module, keep: tuple[str, ...] = (), plans: int = 4, shape: tuple[int, ...] = (3, 6, 8)) -> Network:
    """Require masked = sliced = counted for random plans; returns the network."""
    images = contrasting(3, *shape)
    network = trace(module, images)
    layout = GateLayout(network, keep=keep)
    seen = False
    for seed in range(plans):
        generator = torch.Generator().manual_seed(seed)
        kept = {}
        for name, (_, n) in layout.offsets.items():
            left = max(1, round(n * (0.8, 0.5, 0.3)[seed % 3]))
            kept[name] = tuple(sorted(torch.randperm(n, generator=generator)[:left].tolist()))
        plan = ChannelPlan(network=network.fingerprint, kept=kept)
        wanted = masked_answer(module, kept, images)
        sliced = slice_network(network, plan)
        with torch.no_grad():
            assert difference(wanted, sliced(images)) < FLOAT64, kept
            assert relative_difference(wanted, masked_outputs(network, plan, images)) < FLOAT64, kept
        assert count(network, plan) == count(sliced), kept
        seen = seen or visible(wanted)
    assert seen and layout.offsets
    return network


# views behind movements that slicing takes out ------------------------------------------------------------


def attended(s: Any, x: Tensor) -> Tensor:
    y = s.a(x).flatten(2).transpose(1, 2)
    y = s.m(y, y, y, need_weights=False)[0] if isinstance(s.m, nn.MultiheadAttention) else s.m(y)
    return s.fc(y.mean(1))


def the_other_way_round(s: Any, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    y = s.a(x)
    part = y.permute(0, 3, 2, 1).contiguous()[..., 2:6].contiguous().view(n, w, h * 4)
    return s.fc(y.mean((2, 3))) + s.out(part.softmax(2).view(n, h * w, 4).mean(1))


def all_in_a_row(s: Any, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    y = s.a(x)
    part = y.flatten(2).mT.contiguous()[..., 4:].contiguous().view(n, 1, h * w * 4)
    return s.fc(y.mean((2, 3))) + s.out(part.softmax(2).view(n, h * w, 4).mean(1))


def a_part_beside_space(s: Any, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    y = s.a(x)
    part = y.movedim(1, 3).contiguous()[..., :4].contiguous().view(n, h, w * 4)
    return s.fc(y.mean((2, 3))) + s.out(part.softmax(2).view(n, h * w, 4).amax(1))


VIEWS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Net(
        attended, a=conv(3, 8), m=nn.MultiheadAttention(8, 2, batch_first=True), fc=nn.Linear(8, 4)
    ),
    "a transformer's layer": lambda: Net(
        attended, a=conv(3, 8), m=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), fc=nn.Linear(8, 4)
    ),
    "the other way round": lambda: Net(the_other_way_round, a=conv(3, 8), fc=nn.Linear(8, 4), out=nn.Linear(4, 4)),
    "all in a row": lambda: Net(all_in_a_row, a=conv(3, 8), fc=nn.Linear(8, 4), out=nn.Linear(4, 4)),
    "a part beside space": lambda: Net(a_part_beside_space, a=conv(3, 8), fc=nn.Linear(8, 4), out=nn.Linear(4, 4)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_tensors_that_lie_otherwise_in_memory(name: str) -> None:
    module = VIEWS[name]()
    exact(module, keep=("m*",) if hasattr(module, "m") else ())
