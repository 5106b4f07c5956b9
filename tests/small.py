"""Networks of a few layers, said in a line, and what has to hold of each."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bar_edge.lowering.lower import lower
from bar_edge.network import Network, trace
from bar_edge.records import ChannelPlan
from bar_edge.records.lowering import KINDS, PAPER, Lowering
from bar_edge.surgery import relative_difference, slice_network
from tests.meaning import masked_answer
from tests.reference import contrasting, randomise


class Net(nn.Module):
    """A function of the module and its input."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def conv(inputs: int, outputs: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, k, padding=k // 2, **options)


def traced(module: nn.Module) -> tuple[nn.Module, Network, Tensor]:
    torch.manual_seed(0)
    module, images = randomise(module.double().eval(), seed=1), contrasting(3, 3, 8, 8)
    return module, trace(module, images), images


def check(module: nn.Module, kept: Mapping[str, tuple[int, ...]]) -> Network:
    """Slice, and compare with the user's own module under masks and with every lowering."""
    module, network, images = traced(module)
    plan = ChannelPlan(network=network.fingerprint, kept=dict(kept))
    sliced, expected = slice_network(network, plan), masked_answer(module, kept, images)
    assert relative_difference(expected, sliced(images)) < 1e-9
    for form in (PAPER, *KINDS):
        assert relative_difference(expected, lower(sliced, Lowering.parse(form))(images)) < 1e-9, form
    return sliced
