"""Constructs as people write them: exact under random plans, and pruned where they should be.

Each is a stem, the construct, and a head; `tests.meaning` says what a plan means, slicing must equal it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bar_edge.methods import GateLayout
from bar_edge.methods.gating.gated_network import GatedNetwork, fold
from bar_edge.methods.gating.projection import protected_gates
from bar_edge.network import Network, count, trace
from bar_edge.records import ChannelPlan
from bar_edge.surgery import masked_outputs, relative_difference, slice_network
from tests.meaning import masked_answer
from tests.network.random_networks.proof import enliven
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


def exact(module: nn.Module, keep: tuple[str, ...] = (), plans: int = 3, shape: tuple[int, ...] = (3, 6, 8)) -> Network:
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


# constants: what depends on weights, numbers and the size of the batch alone -----------------------------


def ruled(module: nn.Module, *allowed: str, keep: tuple[str, ...] = (), shape: tuple[int, ...] = (3, 6, 8)) -> Network:
    """Require that it is exact, and that no operator but those allowed lacks a rule."""
    network = exact(module, keep=keep, shape=shape)
    assert {str(n.target) for n, p in network.channels.items() if p.kind == "opaque"} == set(allowed)
    return network


class FrozenNorm(nn.Module):
    """The frozen BatchNorm of detectors' backbones."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name in ("w", "b", "rm", "rv"):
            self.register_buffer(name, torch.rand(n) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.w * (self.rv + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.b - self.rm * scale).view(1, -1, 1, 1)


def weighted(s: Any, x: Tensor) -> Tensor:
    """BiFPN's fusion."""
    w = torch.relu(s.p)
    w = w / (w.sum() + 1e-4)
    return s.b(w[0] * s.a(x) + w[1] * s.c(x))


def coordinates(s: Any, x: Tensor) -> Tensor:
    """Positions added and multiplied that forward makes of nothing."""
    h, w = x.shape[2:]
    rows = torch.arange(h, dtype=x.dtype).view(1, 1, h, 1).expand(x.shape[0], 1, h, w)
    return s.b(s.a(x) + rows / h + torch.zeros(x.shape[0], 8, h, w, dtype=x.dtype))


def vector(n: int = 8, *ones: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(n, *ones) + 0.5)


CONSTANTS: dict[str, Callable[[], nn.Module]] = {
    "frozen norm": lambda: Net(lambda s, x: s.b(torch.relu(s.n(s.a(x)))), a=conv(3, 8), n=FrozenNorm(8), b=conv(8, 4)),
    "exponential scale": lambda: Net(
        lambda s, x: s.b(s.p.exp() * s.a(x)), a=conv(3, 8), p=vector(8, 1, 1), b=conv(8, 4)
    ),
    "scale of two": lambda: Net(
        lambda s, x: s.b(s.a(x) * (s.p * torch.sigmoid(s.q)).view(1, -1, 1, 1)),
        a=conv(3, 8), p=vector(), q=vector(), b=conv(8, 4),
    ),
    "one scale twice": lambda: Net(
        lambda s, x: (lambda g: s.b(s.a(x) * g + g))(s.p.exp()), a=conv(3, 8), p=vector(8, 1, 1), b=conv(8, 4)
    ),
    "weighted sum": lambda: Net(weighted, a=conv(3, 8), c=conv(3, 8), p=vector(2), b=conv(8, 4)),
    "coordinates": lambda: Net(coordinates, a=conv(3, 8), b=conv(8, 4)),
    "ones like it": lambda: Net(
        lambda s, x: (lambda y: s.b(y + torch.ones_like(y)))(s.a(x)), a=conv(3, 8), b=conv(8, 4)
    ),
    "new ones": lambda: Net(
        lambda s, x: (lambda y: s.b(y + y.new_ones(x.shape[0], 1, 1, 8)))(s.a(x)), a=conv(3, 8), b=conv(8, 4)
    ),
    "mean of a power": lambda: Net(
        lambda s, x: s.b(s.a(x).clamp(min=1e-2).pow(s.p).mean((2, 3), keepdim=True).pow(1 / s.p)),
        a=conv(3, 8), p=vector(1), b=conv(8, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANTS)
def test_arithmetic_on_weights_is_none_on_channels(name: str) -> None:
    network = ruled(CONSTANTS[name]())
    halves = {"a": (0, 2, 4, 6), "c": (0, 2, 4, 6)}
    kept = {layer: ids for layer, ids in halves.items() if layer in dict(network.body.named_children())}
    plan = ChannelPlan(network=network.fingerprint, kept=kept)
    assert count(network, plan).flops == count(network).flops / 2


# depthwise transposed, moves, gates, activations ----------------------------------------------------------

RULED: dict[str, Callable[[], nn.Module]] = {
    "depthwise, transposed": lambda: Net(
        lambda s, x: s.b(torch.sigmoid(s.d(s.a(x)))), a=conv(3, 8), b=conv(8, 4),
        d=nn.ConvTranspose2d(8, 8, 2, 2, groups=8),
    ),
    "depthwise, transposed, several of each": lambda: Net(
        lambda s, x: s.b(s.d(s.a(x))), a=conv(3, 4), d=nn.ConvTranspose2d(4, 12, 3, 2, groups=4), b=conv(12, 4)
    ),
    "some of several of each": lambda: Net(
        lambda s, x: s.b(s.d(s.a(x))[:, 1::2]), a=conv(3, 4), d=nn.ConvTranspose2d(4, 12, 3, 2, groups=4), b=conv(6, 4)
    ),
    "depthwise, transposed, one axis": lambda: Net(
        lambda s, x: s.b(s.d(s.a(x).flatten(2))[..., None]), a=conv(3, 8),
        d=nn.ConvTranspose1d(8, 8, 4, 2, groups=8, bias=False), b=conv(8, 4),
    ),
    "swapped axes": lambda: Net(
        lambda s, x: s.b(torch.swapaxes(s.n(torch.swapaxes(s.a(x), 1, 3)), 1, 3)),
        a=conv(3, 8), n=nn.LayerNorm(8), b=conv(8, 4),
    ),
    "a parameter cast": lambda: Net(
        lambda s, x: s.b(s.a(x) * s.p.to(x.dtype)), a=conv(3, 8), p=vector(8, 1, 1), b=conv(8, 4)
    ),
    "space in the batch": lambda: Net(
        lambda s, x: (lambda y: s.b(s.l(y.permute(0, 2, 3, 1).reshape(-1, 8)).view(*y.shape[:1], *y.shape[2:], 8)
                                    .permute(0, 3, 1, 2)))(s.a(x)), a=conv(3, 8), l=nn.Linear(8, 8), b=conv(8, 4)
    ),
    "rows in the batch": lambda: Net(
        lambda s, x: (lambda y: s.b(s.r(y.transpose(1, 2).reshape(-1, 8, y.shape[3]))
                                    .view(y.shape[0], y.shape[2], 8, -1).transpose(1, 2)))(s.a(x)),
        a=conv(3, 8), r=nn.Conv1d(8, 8, 3, padding=1), b=conv(8, 4),
    ),
    "clamp_min": lambda: Net(lambda s, x: s.b(s.a(x).clamp_min(0)), a=conv(3, 8), b=conv(8, 4)),
    "clamp_min, not 0": lambda: Net(lambda s, x: s.b(torch.clamp_min(s.a(x), 0.25)), a=conv(3, 8), b=conv(8, 4)),
    "clamp_max": lambda: Net(lambda s, x: s.b(s.a(x).clamp_max(-0.1)), a=conv(3, 8), b=conv(8, 4)),
    "threshold": lambda: Net(lambda s, x: s.b(s.t(s.a(x))), a=conv(3, 8), t=nn.Threshold(0.1, 0.5), b=conv(8, 4)),
    "maximum with 0": lambda: Net(
        lambda s, x: s.b(torch.maximum(s.a(x), torch.tensor(0.0).to(x.dtype))), a=conv(3, 8), b=conv(8, 4)
    ),
    "maximum with zeros like it": lambda: Net(
        lambda s, x: (lambda y: s.b(torch.maximum(y, torch.zeros_like(y))))(s.a(x)), a=conv(3, 8), b=conv(8, 4)
    ),
    "minimum with a parameter": lambda: Net(
        lambda s, x: s.b(torch.minimum(s.a(x), s.p)), a=conv(3, 8), p=vector(8, 1, 1), b=conv(8, 4)
    ),
    "the larger of two": lambda: Net(
        lambda s, x: s.b(torch.maximum(s.a(x), s.c(x))), a=conv(3, 8), c=conv(3, 8), b=conv(8, 4)
    ),
    "a slope below 0": lambda: Net(
        lambda s, x: (lambda y: s.b(torch.where(y > 0, y, 0.2 * y)))(s.a(x)), a=conv(3, 8), b=conv(8, 4)
    ),
    "a slope per channel": lambda: Net(
        lambda s, x: (lambda y: s.b(torch.where(y >= 0, y, s.p * y)))(s.a(x)),
        a=conv(3, 8), p=vector(8, 1, 1), b=conv(8, 4),
    ),
    "one of two": lambda: Net(
        lambda s, x: (lambda y, z: s.b(torch.where(y <= z, y, s.d(z))))(s.a(x), s.c(x)),
        a=conv(3, 8), c=conv(3, 8), d=conv(8, 8), b=conv(8, 4),
    ),
    "a mask": lambda: Net(
        lambda s, x: (lambda y: s.b(y.masked_fill(y < -0.1, 0.5)))(s.a(x)), a=conv(3, 8), b=conv(8, 4)
    ),
    "a mask of the input": lambda: Net(
        lambda s, x: s.b(s.a(x).masked_fill(x[:, :1] > 0.2, 0.5)), a=conv(3, 8), b=conv(8, 4)
    ),
    "times its sign": lambda: Net(
        lambda s, x: (lambda y: s.b(y * (y > 0)))(s.a(x)), a=conv(3, 8), b=conv(8, 4)
    ),
    "glu": lambda: Net(lambda s, x: s.b(nn.functional.glu(s.a(x), 1)), a=conv(3, 16), b=conv(8, 4)),
    "glu along space": lambda: Net(lambda s, x: s.b(nn.functional.glu(s.a(x), -1)), a=conv(3, 8), b=conv(8, 4)),
    "glu of tokens": lambda: Net(
        lambda s, x: s.l(nn.functional.glu(s.a(x).flatten(2).mT)).mean(1), a=conv(3, 16), l=nn.Linear(8, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULED)
def test_constructs_as_people_write_them(name: str) -> None:
    ruled(RULED[name]())


def split_attention(s: Any, x: Tensor) -> Tensor:
    """ResNeSt: the parts of a grouped convolution, weighted and summed."""
    n, _, h, w = x.shape
    y = torch.relu(s.a(x)).view(n, 2, 8, h, w)
    weights = torch.softmax(s.up(torch.relu(s.down(y.sum(1).mean((2, 3), keepdim=True)))).view(n, 2, 8, 1, 1), 1)
    return s.b((y * weights).sum(1))


def test_the_parts_of_a_split_attention() -> None:
    network = ruled(Net(split_attention, a=conv(3, 16), down=conv(8, 4), up=conv(4, 16), b=conv(8, 4)))
    plan = ChannelPlan(network=network.fingerprint, kept={"a": (0, 1, 2, 8, 9, 10)})
    assert slice_network(network, plan).body.get_submodule("b").in_channels == 3


def gated_twice(s: Any, x: Tensor) -> Tensor:
    """CBAM: one squeeze branch of the mean and of the largest, summed."""
    y = s.a(x)
    mlp = lambda v: s.up(torch.relu(s.down(v)))  # noqa: E731
    return s.b(y * torch.sigmoid(mlp(y.mean((2, 3), True)) + mlp(y.amax((2, 3), True))))


def two_branches(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    gates = s.up(torch.relu(s.down(y.mean((2, 3), True)))) + s.other(y.amax((2, 3), True))
    return s.b(y * torch.sigmoid(gates))


def three_summed(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    gates = s.up(y.mean((2, 3), True)) + s.other(y.amax((2, 3), True)) + s.down(y.amin((2, 3), True))
    return s.b(y * torch.tanh(gates) + y)


def vectors_summed(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    return s.b(y * torch.sigmoid(s.up(y.mean((2, 3))) + s.other(y.amax((2, 3))))[..., None, None])


GATES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "one branch twice": (
        lambda: Net(gated_twice, a=conv(3, 8), down=conv(8, 4), up=conv(4, 8), b=conv(8, 4)), {"a", "down"}
    ),
    "two branches": (
        lambda: Net(two_branches, a=conv(3, 8), down=conv(8, 4), up=conv(4, 8), other=conv(8, 8), b=conv(8, 4)),
        {"a", "down"},
    ),
    "three": (
        lambda: Net(three_summed, a=conv(3, 8), down=conv(8, 8), up=conv(8, 8), other=conv(8, 8), b=conv(8, 4)), {"a"}
    ),
    "vectors": (
        lambda: Net(vectors_summed, a=conv(3, 8), up=nn.Linear(8, 8), other=nn.Linear(8, 8), b=conv(8, 4)),
        {"a"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_the_last_layers_of_summed_branches_follow_what_they_scale(name: str) -> None:
    make, gated = GATES[name]
    assert set(GateLayout(exact(make())).offsets) == gated


def test_a_summand_that_is_no_gate_keeps_its_own() -> None:
    module = Net(
        lambda s, x: (lambda y: s.b(y * (s.up(y.mean((2, 3), True)) + s.c(x))))(s.a(x)),
        a=conv(3, 8), up=conv(8, 8), c=conv(3, 8), b=conv(8, 4),
    )  # fmt: skip
    assert set(GateLayout(exact(module)).offsets) == {"a", "up", "c"}


GATED = [
    "frozen norm", "coordinates", "mean of a power", "depthwise, transposed", "clamp_min, not 0", "threshold",
    "minimum with a parameter", "a slope per channel", "one of two", "a mask", "times its sign", "glu",
    "one branch twice", "vectors",
]  # fmt: skip


@pytest.mark.parametrize("name", GATED)
def test_gated_equals_folded_and_sliced(name: str) -> None:
    module = (CONSTANTS | RULED | {gate: make for gate, (make, _) in GATES.items()})[name]()
    images = contrasting(3, 3, 6, 8)
    network = trace(module, images)
    gated = GatedNetwork(GateLayout(network)).double()
    gates, layout = gated.gates, gated.layout
    with torch.no_grad():
        gates.log_alpha.copy_(torch.rand(layout.size, generator=torch.Generator().manual_seed(0)) * 8 - 4)
        for ids, _ in protected_gates(layout, "volume"):
            gates.log_alpha[ids[0]] = 3.0
    gated.train()(images).square().mean().backward()
    gradients = [p.grad for p in gated.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
    plan, folded = layout.plan(gates.opened()), copy.deepcopy(network)
    fold(folded, gated)
    with torch.no_grad():
        assert relative_difference(gated.eval()(images), slice_network(folded, plan)(images)) < FLOAT64


# memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "grouped", "depthwise", "transposed"])
def test_weights_with_the_channels_last_stay_so(kind: str) -> None:
    middle: dict[str, nn.Module] = {
        "plain": nn.Conv2d(8, 8, 3, padding=1),
        "grouped": nn.Conv2d(8, 8, 3, padding=1, groups=2),
        "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "transposed": nn.ConvTranspose2d(8, 8, 3),
    }
    module = nn.Sequential(nn.Conv2d(3, 8, 3), middle[kind], nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    network = trace(module.to(memory_format=torch.channels_last), torch.zeros(2, 3, 12, 12))
    plan = ChannelPlan(network=network.fingerprint, kept={"0": (0, 1, 5, 6)})
    sliced = slice_network(network, plan)
    weights = [p for p in sliced.parameters() if p.ndim == 4]
    assert len(weights) == 3 and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
