"""What is counted, and what is stored, of networks that once came out wrong."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bar_edge.network import Network, count, layers, prunable, trace
from bar_edge.records import ChannelPlan
from bar_edge.surgery import slice_network
from tests.small import Net, check, conv, traced


def test_weights_that_are_read_elsewhere_are_not_scaled() -> None:
    body = lambda s, x: s.h(s.a(x).relu() + F.conv2d(x, s.a.weight, padding=1).relu())  # noqa: E731
    _, network, _ = traced(Net(body, a=conv(3, 4), h=conv(4, 2)))
    assert "elsewhere" in prunable(network)["a"]


def test_a_parameter_that_is_spread_over_space_is_one_number_per_channel() -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.h, self.g = conv(3, 8), conv(8, 2), nn.Parameter(torch.rand(1, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.h(y * self.g.expand_as(y))

    module, network, _ = traced(Spread())
    assert count(network).params == sum(p.numel() for p in module.parameters())
    check(module, {"a": (1, 4, 6)})


def test_frozen_parameters_stay_frozen_in_a_file(tmp_path: Path) -> None:
    module = Net(lambda s, x: s.h(s.n(s.a(x))), a=conv(3, 6), n=nn.BatchNorm2d(6), h=conv(6, 2))
    module.a.requires_grad_(False)
    _, network, _ = traced(module)
    for one in (network, slice_network(network, ChannelPlan(network=network.fingerprint, kept={"a": (1, 2)}))):
        one.save(tmp_path / "n")
        loaded = Network.load(tmp_path / "n")
        frozen = {name for name, p in loaded.named_parameters() if not p.requires_grad}
        assert frozen == {"body.a.weight", "body.a.bias"} and loaded.fingerprint == one.fingerprint


def test_a_parameter_of_a_dead_branch_is_not_counted() -> None:
    class Scaled(nn.Module):
        """A scale of one number per branch, as LayerScale has it where there is one channel."""

        def __init__(self) -> None:
            super().__init__()
            self.s, self.a, self.b, self.h = conv(3, 4), conv(4, 4), conv(4, 4), conv(4, 2)
            self.g = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.s(x)
            return self.h(y + self.g * self.b(self.a(y)))

    _, network, _ = traced(Scaled())
    plan = ChannelPlan(network=network.fingerprint, kept={"a": ()})
    sliced = slice_network(network, plan)
    assert count(network, plan) == count(sliced)
    assert count(sliced).params == sum(p.numel() for p in sliced.parameters())


def test_a_grouped_layer_that_is_called_twice_counts_what_is_read() -> None:
    """Seed 593 of the random networks, shrunken: the channel that fills up a group is cut off behind both calls."""
    body = lambda s, x: s.h(s.g(s.g(s.a(x))))  # noqa: E731
    module = Net(body, a=conv(3, 8, groups=1), g=conv(8, 8, groups=2), h=conv(8, 2))
    _, network, _ = traced(module)
    kept: dict[str, tuple[int, ...]] = {"a": (1, 2, 5), "g": (2, 3, 6)}
    plan = ChannelPlan(network=network.fingerprint, kept=kept)
    assert count(network, plan) == count(check(module, kept))


class TokensFirst(nn.Module):
    """Attention whose tokens lie in front of the batch, and are folded into it before the last product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention = nn.Conv2d(3, 16, 1), nn.MultiheadAttention(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).permute(2, 0, 1)
        out: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return out.permute(1, 0, 2)


def test_tokens_in_front_of_the_batch_are_counted() -> None:
    network = trace(TokensFirst().eval(), torch.randn(2, 3, 8, 8))
    found = {layer.name: layer.area for layer in layers(network)}
    assert set(found.values()) == {64}, found
    assert count(network).flops == 2 * 64 * (3 * 16 + 48 * 16 + 16 * 16)
