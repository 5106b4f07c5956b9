"""Computed weights, types and devices named in forward, writes into pieces, names of all kinds: exact, and pruned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from bar_edge.errors import InputError
from bar_edge.methods import GateLayout
from bar_edge.network import Network, count, prunable, trace
from bar_edge.runs.inspection import preflight
from bar_edge.surgery import relative_difference
from tests.network.test_loose_tensors import Net, conv, exact, half_of_every_layer, images
from tests.reference import randomise


class Standardised(nn.Conv2d):
    """A convolution with weight standardisation and a gain."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt() * self.gain
        return F.conv2d(x, w, self.bias, padding=1)


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.tanh() * 2


def parametrised(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", Doubled())
    return module


def frozen_norm(s: Any, x: Tensor) -> Tensor:
    scale = s.w * (s.rv + 1e-5).rsqrt()
    return x * scale.view(1, -1, 1, 1) + (s.bias - s.rm * scale).view(1, -1, 1, 1)


NORM = {"w": torch.rand(8), "rv": torch.rand(8), "rm": torch.randn(8), "bias": torch.randn(8)}


def learnt(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


#: every convolution and linear layer that prunes, and whether something was baked
COMPUTED: dict[str, tuple[set[str], bool, Callable[[], nn.Module]]] = {
    "weight standardisation": ({"0", "2"}, True, lambda: nn.Sequential(
        Standardised(3, 8), nn.ReLU(), Standardised(8, 8), nn.ReLU(), conv(8, 4))),
    "weight norm": ({"0", "2"}, True, lambda: nn.Sequential(
        parametrizations.weight_norm(conv(3)), nn.ReLU(), parametrizations.weight_norm(conv()), nn.ReLU(), conv(8, 4))),
    "spectral norm": ({"0"}, True, lambda: nn.Sequential(
        parametrizations.spectral_norm(conv(3)), nn.ReLU(), parametrizations.spectral_norm(conv(8, 4)))),
    "any parametrisation": ({"0", "3"}, True, lambda: nn.Sequential(
        parametrised(conv(3)), nn.ReLU(), nn.Flatten(), parametrised(nn.Linear(512, 8)), nn.ReLU(), nn.Linear(8, 3))),
    "a mixture of experts": ({"experts_op"}, True, lambda: Net(
        lambda s, x: s.b(F.conv2d(x, (s.mix.softmax(0).view(-1, 1, 1, 1, 1) * s.experts).sum(0), padding=1)),
        mix=learnt(3), experts=learnt(3, 8, 3, 3, 3), b=conv(8, 4))),
    "a normalised matrix": ({"a"}, True, lambda: Net(
        lambda s, x: F.linear(s.a(x).mean((2, 3)), F.normalize(s.w)), a=conv(3), w=learnt(5, 8))),
    "a transposed matrix that is tied": ({"e", "e_weight_op"}, True, lambda: Net(
        lambda s, x: s.d(F.linear(s.e(x.flatten(1)).relu(), s.e.weight.t()).relu()),
        e=nn.Linear(192, 8), d=nn.Linear(192, 4))),
    "an exponentiated scale": ({"a"}, True, lambda: Net(
        lambda s, x: s.b(s.g.exp() * s.a(x)), a=conv(3), g=learnt(8, 1, 1), b=conv(8, 4))),
    "a gate that is learnt": ({"a"}, True, lambda: Net(
        lambda s, x: s.b(s.a(x) * (s.g * s.p.sigmoid()).view(1, -1, 1, 1)),
        a=conv(3), g=learnt(8), p=learnt(1), b=conv(8, 4))),
    "fusion weights": ({"a", "c"}, True, lambda: Net(
        lambda s, x: s.b(sum(w * y for w, y in zip(
            s.w.relu() / (s.w.relu().sum() + 1), [s.a(x), s.c(x)], strict=True))),
        a=conv(3), c=conv(3), w=nn.Parameter(torch.ones(2)), b=conv(8, 4))),
    "frozen norms written by hand": ({"a"}, False, lambda: Net(
        lambda s, x: s.b(frozen_norm(s, s.a(x)).relu()), a=conv(3, bias=False), b=conv(8, 4), **NORM)),
    "frozen norms of detectors": ({"a"}, False, lambda: Net(
        lambda s, x: s.b(F.batch_norm(s.a(x), s.rm, s.rv, s.w, s.bias).relu()), a=conv(3), b=conv(8, 4), **NORM)),
    "a scale that is frozen": ({"a"}, False, lambda: Net(
        lambda s, x: s.b(s.a(x) * s.g.exp()), a=conv(3), b=conv(8, 4),
        g=nn.Parameter(torch.randn(8, 1, 1), requires_grad=False))),
    "a blur filter": ({"a"}, False, lambda: Net(
        lambda s, x: s.b(F.conv2d(s.a(x), s.blur, stride=2, padding=1, groups=8)), a=conv(3), b=conv(8, 4),
        blur=torch.rand(8, 1, 3, 3))),
    "a blur filter of one channel": ({"a"}, False, lambda: Net(
        lambda s, x: s.b(F.conv2d(s.a(x), s.blur.repeat(8, 1, 1, 1), padding=1, groups=8)), a=conv(3), b=conv(8, 4),
        blur=torch.rand(1, 1, 3, 3))),
    "a fixed matrix": ({"a"}, False, lambda: Net(
        lambda s, x: s.b(F.conv2d(s.a(x), s.mix)), a=conv(3), b=conv(8, 4), mix=torch.rand(8, 8, 1, 1))),
    "upsampling by a fixed filter": ({"a"}, False, lambda: Net(
        lambda s, x: s.b(F.conv_transpose2d(s.a(x), s.up, stride=2)), a=conv(3), b=conv(8, 4),
        up=torch.rand(8, 8, 2, 2))),
    "a mask drawn in forward": ({"a"}, False, lambda: Net(drawn_mask, a=conv(3), b=conv(8, 4))),
    "positions made in forward": ({"a"}, False, lambda: Net(
        lambda s, x: s.b(s.a(x) + torch.linspace(-1, 1, 8, device=x.device).view(1, 1, 1, -1)),
        a=conv(3), b=conv(8, 4))),
    "a matrix made in forward": ({"a"}, False, lambda: Net(
        lambda s, x: s.b(s.a(x) @ (torch.eye(8) * 2 + torch.ones(8, 8))), a=conv(3), b=conv(8, 4))),
    "a product with a matrix": ({"a", "w_op"}, False, lambda: Net(
        lambda s, x: s.b(s.a(x).flatten(1) @ s.w + s.c), a=conv(3), w=learnt(512, 8), c=learnt(8), b=nn.Linear(8, 4))),
    "a weight before a scale of its module": ({"m_op"}, False, lambda: Net(
        lambda s, x: s.b(s.m(x)), m=Net(
            lambda s, x: F.conv2d(x * s.scale, s.weight), scale=learnt(1), weight=learnt(8, 3, 3, 3)), b=conv(8, 4))),
}  # fmt: skip


def drawn_mask(s: Any, x: Tensor) -> Tensor:
    mask = x.new_zeros(8, 8)
    mask[:4] = 1
    mask[2, 3] = 5
    mask[:, 6:] += 2
    return s.b(s.a(x) * mask)


#: it knows layers by their own weights, and no writes
UNKNOWN_TO_THE_ORACLE = {
    "weight standardisation",
    "a mixture of experts",
    "a transposed matrix that is tied",
    "a fixed matrix",
    "upsampling by a fixed filter",
    "a mask drawn in forward",
    "a matrix made in forward",
    "a weight before a scale of its module",
    "a product with a matrix",
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed_of_weights_alone(name: str, tmp_path: Path) -> None:
    pruned, baked, build = COMPUTED[name]
    torch.manual_seed(0)
    network = exact(build(), oracle=name not in UNKNOWN_TO_THE_ORACLE)
    assert {layer for layer, reason in prunable(network).items() if not reason} >= pruned
    assert bool(network.notes) == baked
    assert set(network.notes) <= set(preflight(GateLayout(network), [])["warnings"])
    metric = "flops" if count(network).flops else "params"
    assert count(network, half_of_every_layer(network)).of(metric) < 0.62 * count(network).of(metric)
    network.save(tmp_path / "n")
    loaded = Network.load(tmp_path / "n").eval()
    assert torch.equal(loaded(images().float()), network(images().float()))
    assert loaded.fingerprint == network.fingerprint


def test_equal_computations_are_one_weight() -> None:
    network = exact(Net(lambda s, x: s.b(s.a(s.a(x).relu())), a=parametrizations.weight_norm(conv(3, 3)), b=conv(3, 4)))
    assert [str(n.target) for n in network.nodes if n.op == "call_module"] == ["a", "a", "b"]


def test_what_trains_goes_on_training() -> None:
    network = trace(COMPUTED["an exponentiated scale"][2](), images().float())
    network.train()(images().float()).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    frozen = trace(COMPUTED["a blur filter"][2](), images().float())
    assert [name for name, p in frozen.body.named_parameters() if not p.requires_grad] == ["blur_op.weight"]


def test_noise_and_statistics_are_no_constants() -> None:
    network = trace(
        Net(lambda s, x: s.a(x) + F.dropout(s.p, 0.5, s.training), a=conv(3), p=learnt(8, 1, 1)), images().float()
    )
    x = images().float()
    assert not torch.equal(network.train()(x), network(x))


# ------------------------------------------------------------------------------- types and regions


def without_gradient(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = s.a(x)
        with torch.autocast("cpu", enabled=False):
            y = y.float() * 2
    return s.b(y.relu())


def in_bf16(s: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = s.b(s.a(x).relu())
    return y.float()


TYPES: dict[str, Callable[[], nn.Module]] = {
    "casts of floats": lambda: Net(
        lambda s, x: s.b(s.a(x.to(torch.float32)).float().to(x.dtype)), a=conv(3), b=conv(8, 4)),
    "devices": lambda: Net(lambda s, x: s.b(s.a(x.to(x.device))).to("cpu"), a=conv(3), b=conv(8, 4)),
    "a mask cast to floats": lambda: Net(
        lambda s, x: s.b(s.a(x)).flatten(2) @ (x > 0).float().flatten(2).mT, a=conv(3), b=conv(8, 4)),
    "a softmax in float32": lambda: Net(
        lambda s, x: s.b(s.a(x).softmax(-1, dtype=torch.float32) @ s.a(x)), a=conv(3), b=conv(8, 4)),
    "sums in float32": lambda: Net(
        lambda s, x: s.b(s.a(x)).mean((2, 3), dtype=torch.float32) + s.b(s.a(x)).sum((2, 3), dtype=torch.float32),
        a=conv(3), b=conv(8, 4)),
    "zeros that meet a product": lambda: Net(
        lambda s, x: s.b(s.a(x) @ torch.zeros(x.shape[0], 1, 8, 8, device=x.device, dtype=torch.float32) + s.a(x)),
        a=conv(3), b=conv(8, 4)),
    "the states of an LSTM": lambda: Net(
        lambda s, x: s.l(s.b(s.a(x)).flatten(2))[0], a=conv(3), b=conv(8, 4), l=nn.LSTM(64, 5, batch_first=True)),
    "the states of a GRU": lambda: Net(
        lambda s, x: s.l(s.b(s.a(x)).flatten(2))[0], a=conv(3), b=conv(8, 4), l=nn.GRU(64, 5, batch_first=True)),
    "no gradient": lambda: Net(without_gradient, a=conv(3), b=conv(8, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_types_named_in_forward_are_the_networks(name: str, tmp_path: Path) -> None:
    network = exact(TYPES[name](), oracle=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = network.train()(images().float())
    answer.float().sum().backward()
    network.save(tmp_path / "n")
    assert Network.load(tmp_path / "n").fingerprint == network.fingerprint


def test_autocast_in_forward_is_the_networks_own_type() -> None:
    module = randomise(Net(in_bf16, a=conv(3), b=conv(8, 4))).eval()
    network, x = trace(module, images().float()), images().float()
    assert relative_difference(module(x), network(x)) < 0.03
    assert network.double()(images()).dtype == torch.float64


# ---------------------------------------------------------------------------- writes into a piece


def cloned(s: Any, x: Tensor) -> Tensor:
    y = s.a(x).clone()
    y[:, :4] = s.c(y[:, :4])
    return s.b(y)


def shifted(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    out = torch.zeros_like(y)
    out[:, :2, :-1] = y[:, :2, 1:]
    out[:, 2:4, 1:] = y[:, 2:4, :-1]
    out[:, 4:] = y[:, 4:]
    return s.b(out)


def through_views(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    flat, first = y.flatten(2), y[:, 0]
    flat[:, 1:3].mul_(2)
    first.relu_()
    y.permute(0, 2, 3, 1)[..., 5] = 0.5
    y.transpose(2, 3)[:, 4:].add_(y.chunk(2, 1)[0])
    y.contiguous().squeeze()[:, 1::1].unsqueeze(1)[:, 0, 2:].neg_()
    return s.b(y + flat.mean((1, 2)).view(-1, 1, 1, 1) + first.mean((1, 2)).view(-1, 1, 1, 1))


def normalised(s: Any, x: Tensor) -> Tensor:
    x = x.clone()
    for i in range(3):
        x[:, i] = (x[:, i] - 0.4) / 0.2
    return s.b(s.a(x))


PIECES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "into a clone": cloned,
    "into zeros": shifted,
    "channel by channel": normalised,
    "through views": through_views,
    "a number": lambda s, x: (lambda y: (y.__setitem__((slice(None), slice(2, 5)), 0.5), s.b(y))[1])(s.a(x)),
    "a row": lambda s, x: (lambda y: (y.__setitem__((..., 0, slice(None)), 0), s.b(y))[1])(s.a(x)),
}


@pytest.mark.parametrize("name", PIECES)
def test_writes_into_pieces(name: str) -> None:
    exact(Net(PIECES[name], a=conv(3), b=conv(8, 4), c=conv(4, 4)), oracle=False)


def test_a_write_that_values_cannot_say_is_refused() -> None:
    module = Net(lambda s, x: (lambda y: (y[:, ::2].relu_(), s.b(y))[1])(s.a(x)), a=conv(3), b=conv(8, 4))
    with pytest.raises(InputError, match=r"relu_.* at test_loose_tensors.py:\d+"):
        trace(module, images().float())


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "key", ["conv-3x3", "P3/8", "ä", "graph", "code", "meta", "class", "lambda", "a b", "ﬁ", 'x"y']
)
def test_any_name_a_module_can_have(key: str, tmp_path: Path) -> None:
    inner = nn.ModuleDict({key: conv(3)})
    module = Net(lambda s, x: s.b(getattr(s, key)(s.inner[key](x))), inner=inner, b=conv(8, 4))
    module.add_module(key, conv(8, 8))
    kept = key in ("conv-3x3", "P3/8", "ä", "a b")
    network = exact(module, oracle=kept)
    network.save(tmp_path / "n")
    loaded = Network.load(tmp_path / "n").eval()
    assert loaded.fingerprint == network.fingerprint
    assert torch.equal(loaded(images().float()), network(images().float()))
    if kept:
        assert loaded.body.state_dict().keys() == module.state_dict().keys()


# --------------------------------------------------------------------------------------- refusals


def test_another_input_size_is_refused() -> None:
    network = trace(Net(lambda s, x: s.a(x) / x.shape[-1], a=conv(3)).eval(), images().float())
    assert network(torch.zeros(5, 3, 8, 8)).shape == (5, 8, 8, 8)
    with pytest.raises(InputError, match=r"(?s)3x8x8.*3x9x8"):
        network(torch.zeros(2, 3, 9, 8))


def test_compiled_and_wrapped_modules_are_unwrapped() -> None:
    module = Net(lambda s, x: s.b(s.a(x)), a=conv(3), b=conv(8, 4)).eval()
    for wrapped in (torch.compile(module), nn.DataParallel(module)):
        assert trace(wrapped, images().float()).body.state_dict().keys() == module.state_dict().keys()
    parts = Net(lambda s, x: s.b(s.a(x)), a=torch.compile(conv(3)), b=conv(8, 4)).eval()
    parts.b.compile()
    assert len(prunable(trace(parts, images().float()))) == 2
    assert parts.b._compiled_call_impl is not None


class Answer:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


REFUSED: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "objects": ("a Answer.*out.logits", lambda: Net(lambda s, x: Answer(s.a(x)), a=conv(3))),
    "TorchScript": ("TorchScript.*load_state_dict", lambda: torch.jit.trace(conv(3), images().float())),
    "control flow": (r"test_constants.py:\d+: .*backbone", lambda: Net(
        lambda s, x: s.a(x) if x.sum() > 0 else x, a=conv(3))),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_refusals_name_the_remedy(name: str) -> None:
    message, build = REFUSED[name]
    with pytest.raises(InputError, match=f"(?s){message}"):
        trace(build(), images().float())
