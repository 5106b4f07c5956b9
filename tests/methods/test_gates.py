"""Gates: deterministic gates equal fold and slice, sampled gates are a factor, projections meet the budget."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bar_edge.errors import InputError
from bar_edge.methods import GateLayout, budget_limit, random_plan, smallest_cost
from bar_edge.methods.gating import hard_concrete
from bar_edge.methods.gating.gated_network import GatedNetwork, fold
from bar_edge.methods.gating.projection import project, protected_layers
from bar_edge.models import build
from bar_edge.network import Network, count, trace
from bar_edge.records import Budget, Metric
from bar_edge.surgery import slice_network
from tests.reference import contrasting, convolutions, difference, masked_answer, random_kept, randomise, visible

FLOAT64 = 1e-9  # the issue's; gates multiplied before or after a sum differ by rounding


def conv(inputs: int = 8, outputs: int = 8, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, k, padding=k // 2, **options)


class Net(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Tensor], features: int = 8, **parts: nn.Module) -> None:
        super().__init__()
        self.stem, self.bn, self.body = conv(3, bias=False), nn.BatchNorm2d(8), body
        for name, part in parts.items():
            self.add_module(name, part)
        self.fc = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.body(self, x), 1), 1))


def squeeze_excite(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    return s.b(y * torch.sigmoid(s.up(F.relu(s.down(F.adaptive_avg_pool2d(y, 1))))))


def two_norms(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    return F.relu(s.n(y)) + s.b(F.relu(s.m(y)))


def one_norm_without_rule(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    return torch.cat([s.n(y), s.m(s.m(y))], 1)


def norm_and_more(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    return F.relu(s.n(y)) + y


def dense_block(s: Any, x: Tensor) -> Tensor:
    return torch.cat([x, s.a(F.relu(s.n(x)))], 1)


NETS: dict[str, Callable[[], nn.Module]] = {
    "wrn-16-1": lambda: build("wrn-16-1", input_shape=(3, 8, 8), classes=5),
    "resnet20": lambda: build("resnet20", input_shape=(3, 8, 8), classes=5, model_args=("width=0.5",)),
    "mobilenetv2": lambda: build("mobilenetv2", input_shape=(3, 8, 8), classes=5, model_args=("width=0.25",)),
    "vgg16": lambda: build("vgg16", input_shape=(3, 8, 8), classes=5, model_args=("width=0.125",)),
    "squeeze and excite": lambda: Net(squeeze_excite, a=conv(), down=conv(8, 4, 1), up=conv(4, 8, 1), b=conv()),
    "grouped": lambda: Net(lambda s, x: F.relu(s.b(F.relu(s.g(s.a(x))))), a=conv(), g=conv(groups=4), b=conv()),
    "layer norm": lambda: Net(lambda s, x: s.b(s.n(s.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
                              a=conv(), n=nn.LayerNorm(8), b=conv()),
    "without BatchNorm": lambda: Net(lambda s, x: F.leaky_relu(s.b(F.silu(s.a(x))), 0.2) + x, a=conv(), b=conv()),
    "f(0) is not 0": lambda: Net(lambda s, x: s.b(torch.sigmoid(s.n(s.a(x)))), a=conv(), n=nn.BatchNorm2d(8), b=conv()),
    "activation, then norm": lambda: Net(lambda s, x: s.b(s.n(F.relu(s.a(x)))), a=conv(), n=nn.BatchNorm2d(8),
                                         b=conv()),
    "depthwise with bias": lambda: Net(lambda s, x: s.b(F.relu6(s.d(s.a(x)))), a=conv(), d=conv(groups=8), b=conv()),
    "concatenation": lambda: Net(dense_block, 12, a=conv(8, 4), n=nn.BatchNorm2d(8)),
    "two norms": lambda: Net(two_norms, a=conv(), n=nn.BatchNorm2d(8), m=nn.BatchNorm2d(8), b=conv()),
    "one norm without rule": lambda: Net(one_norm_without_rule, 16, a=conv(), n=nn.BatchNorm2d(8), m=nn.BatchNorm2d(8)),
    "a norm and another reader": lambda: Net(norm_and_more, a=conv(), n=nn.BatchNorm2d(8)),
    "norm without affine": lambda: Net(lambda s, x: F.relu(s.b(F.relu(s.n(s.a(x))))), a=conv(),
                                       n=nn.BatchNorm2d(8, affine=False), b=conv()),
    "two branches": lambda: Net(lambda s, x: torch.cat([s.a(x), s.up(x.mean((2, 3), True)).expand(-1, -1, 8, 8)], 1),
                                16, a=conv(), b=conv(), up=conv(k=1)),
}  # fmt: skip


def gated(module: nn.Module) -> tuple[Network, GatedNetwork]:
    network = trace(module.eval(), torch.zeros(2, 3, 8, 8).to(next(module.parameters())))
    return network, GatedNetwork(GateLayout(network), seed=5).double().eval()


def set_gates(net: GatedNetwork, low: float, high: float, seed: int = 0) -> None:
    a = net.gates.log_alpha
    with torch.no_grad():
        a.copy_(torch.rand(len(a), generator=torch.Generator().manual_seed(seed)) * (high - low) + low)


def sliced(network: Network, net: GatedNetwork) -> Network:
    folded = copy.deepcopy(network)
    fold(folded, net)
    return slice_network(folded, net.layout.plan(net.gates.opened()))


@pytest.mark.parametrize("name", NETS)
def test_deterministic_gates_equal_fold_and_slice(name: str) -> None:
    module = randomise(NETS[name]().double(), seed=1, removed=0.6 if name == "vgg16" else 0.3)
    network, net = gated(module)
    images = contrasting(3, 3, 8, 8)
    seen = False
    for seed, (low, high) in enumerate([(0.5, 4.6), (-3.5, 4), (-8, 3.5)]):
        set_gates(net, low, high, seed)
        with torch.no_grad():
            answer = net(images)
            assert difference(answer, sliced(network, net)(images)) < FLOAT64, (low, high)
        seen |= visible(answer)
    assert seen


@pytest.mark.parametrize("name", NETS)
def test_one_layer_shut_equals_fold_and_slice(name: str) -> None:
    """Dead layers: what follows them goes, biases and constants too."""
    module = randomise(NETS[name]().double())
    network, net = gated(module)
    images = contrasting(3, 3, 8, 8)
    path = protected_layers(net.layout, "volume")
    names = [layer for layer in net.layout.offsets if layer not in path]
    for shut in names[:: max(1, len(names) // 3)]:
        set_gates(net, -2, 4)
        first, n = net.layout.offsets[shut]
        with torch.no_grad():
            net.gates.log_alpha[first : first + n] = -4.0
            assert difference(net(images), sliced(network, net)(images)) < FLOAT64, shut


def test_a_shut_branch_takes_the_bias_of_its_linear_layer_along() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc, self.aux = conv(3), conv(3), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.a(x).mean((2, 3))) + self.aux(self.b(x).mean((2, 3)))

    module = randomise(TwoHeads().double())
    network, net = gated(module)
    images = contrasting(3, 3, 8, 8)
    with torch.no_grad():
        net.gates.log_alpha.fill_(4.6)
        first, n = net.layout.offsets["b"]
        net.gates.log_alpha[first : first + n] = -4.6
        wanted = masked_answer(module, {"b": ()}, images)
        assert difference(wanted, sliced(network, net)(images)) < FLOAT64
        assert difference(wanted, net(images)) < FLOAT64


def test_open_gates_are_the_dense_network() -> None:
    module = randomise(NETS["wrn-16-1"]().double())
    network, net = gated(module)
    images = contrasting(3, 3, 8, 8)
    with torch.no_grad():
        net.gates.log_alpha.fill_(4.6)
        assert torch.equal(net(images), network(images))
        assert torch.equal(net(images), module(images))


def test_gates_of_zero_and_one_are_the_reference_mask() -> None:
    """Against the user's module, not against our own surgery."""
    for name in ("wrn-16-1", "mobilenetv2", "concatenation", "f(0) is not 0", "depthwise with bias"):
        module = randomise(NETS[name]().double(), removed=0.4)
        _, net = gated(module)
        kept = random_kept(module, 0.4, seed=2)
        with torch.no_grad():
            net.gates.log_alpha.fill_(-4.6)
            for layer, ids in kept.items():
                net.gates.log_alpha[[net.layout.offsets[layer][0] + i for i in ids]] = 4.6
            images = contrasting(3, 3, 8, 8)
            assert difference(masked_answer(module, kept, images), net(images)) < FLOAT64, name


@pytest.mark.parametrize("decision", ["louizos", "median"])
def test_both_decisions(decision: hard_concrete.GateDecision) -> None:
    module = randomise(NETS["resnet20"]().double())
    network = trace(module.eval(), torch.zeros(2, 3, 8, 8).double())
    net = GatedNetwork(GateLayout(network), decision=decision).double().eval()
    set_gates(net, -3, 3)
    images = contrasting(3, 3, 8, 8)
    with torch.no_grad():
        assert difference(net(images), sliced(network, net)(images)) < FLOAT64
    opened = net.gates.log_alpha > (-2.3978952728 if decision == "louizos" else -1.5985968485)
    assert torch.equal(net.gates.opened(), opened) and 0 < opened.sum() < len(opened)


# ------------------------------------------------------------------------------------ training mode


def factors_of(net: GatedNetwork) -> Tensor:
    """The gates of the next forward pass, by the formula, from a copy that draws the same noise."""
    gates = copy.deepcopy(net.gates)
    return hard_concrete.sample(gates.log_alpha, gates._noise()).detach()


class Block(nn.Module):
    """Post-activation: every BatchNorm is followed by its own gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b, self.m = conv(3), nn.BatchNorm2d(8), conv(), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((F.relu(self.m(self.b(F.relu(self.n(self.a(x)))))) ** 2).mean((2, 3)))


def test_a_sampled_gate_multiplies_the_norms_output() -> None:
    module = randomise(Block().double()).train()
    network = trace(module, torch.zeros(2, 3, 8, 8).double())
    net = GatedNetwork(GateLayout(network), seed=3).double().train()
    set_gates(net, -2, 2)
    z = factors_of(net)
    assert ((z > 0) & (z < 1)).any() and (z == 0).any()
    for name, norm in (("a", module.n), ("b", module.m)):
        first, n = net.layout.offsets[name]
        norm.register_forward_hook(lambda _m, _i, out, f=z[first : first + n]: out * f.view(1, -1, 1, 1))
    images = contrasting(4, 3, 8, 8)
    wanted, got = module(images), net(images)
    assert difference(wanted, got) < FLOAT64
    wanted.square().sum().backward()
    got.square().sum().backward()
    for name, value in module.named_parameters():
        # a bias before a BatchNorm has a gradient of 0 and rounding
        torch.testing.assert_close(value.grad, network.body.get_parameter(name).grad, rtol=1e-9, atol=1e-9)
    for name, value in module.named_buffers():
        torch.testing.assert_close(value, network.body.get_buffer(name), rtol=1e-12, atol=1e-12)
    grad = net.gates.log_alpha.grad
    assert grad is not None and ((grad != 0) == ((z > 0) & (z < 1))).all()


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n, self.a, self.m, self.b = conv(3), nn.BatchNorm2d(8), conv(), nn.BatchNorm2d(8), conv()
        self.last, self.c, self.fc = nn.BatchNorm2d(8), conv(3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x) + self.stem(x)
        y = self.b(F.relu(self.m(self.a(F.relu(self.n(x))))))
        return self.fc(F.relu(self.last(x + y)).mean((2, 3)))


def test_sampled_gates_of_a_pre_activation_stream_act_behind_the_readers_norm() -> None:
    module = randomise(PreActivation().double()).train()
    network = trace(module, torch.zeros(2, 3, 8, 8).double())
    net = GatedNetwork(GateLayout(network), seed=1).double().train()
    set_gates(net, -3, 1)
    values = factors_of(net)
    z = {name: values[first : first + n].view(1, -1, 1, 1) for name, (first, n) in net.layout.offsets.items()}
    stream = (z["stem"] + z["c"]).clamp(max=1)
    late = (z["stem"] + z["c"] + z["b"]).clamp(max=1)
    assert (late == 0).any() and (stream == 0).any()
    images = contrasting(4, 3, 8, 8)
    x = z["c"] * module.c(images) + z["stem"] * module.stem(images)
    y = z["a"] * module.m(module.a(F.relu(module.n(x)) * stream))
    y = z["b"] * module.b(F.relu(y))
    wanted = module.fc((F.relu(module.last(x + y)) * late).mean((2, 3)))
    assert difference(wanted, net(images)) < FLOAT64


def test_noise_is_that_of_seed_step_and_pass() -> None:
    network = trace(Block(), torch.zeros(2, 3, 8, 8))
    images = torch.randn(2, 3, 8, 8)

    def draws(seed: int, step: int, passes: int = 2) -> list[Tensor]:
        net = GatedNetwork(GateLayout(network), seed=seed)
        net.gates.step = step
        torch.rand(7)  # whatever else uses torch's generator changes nothing
        return [net.gates._noise() for _ in range(passes)]

    assert all(torch.equal(a, b) for a, b in zip(draws(1, 4), draws(1, 4), strict=True))
    first, second = draws(1, 4)
    assert not torch.equal(first, second)
    assert not torch.equal(first, draws(2, 4)[0]) and not torch.equal(first, draws(1, 5)[0])
    net = GatedNetwork(GateLayout(network), seed=1).train()
    state = torch.get_rng_state()
    net(images)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_takes_no_noise_and_follows_the_gates() -> None:
    net = GatedNetwork(GateLayout(trace(randomise(Block()), torch.zeros(2, 3, 8, 8)))).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        set_gates(net, -2, 3)
        first = net(images)
        assert torch.equal(first, net(images)) and net.gates.passes == 0
        set_gates(net, -2, 3, seed=1)
        assert not torch.equal(first, net(images))
        average = copy.deepcopy(net)
        average.gates.log_alpha.data.lerp_(torch.full_like(average.gates.log_alpha, 4.0), 0.9)  # EMA as often written
        assert not torch.equal(net(images), average(images))


# --------------------------------------------------------------------------- protection, projection


@pytest.fixture(scope="module")
def wrn() -> GateLayout:
    return GateLayout(trace(build("wrn-16-2", input_shape=(3, 16, 16), classes=10), torch.zeros(1, 3, 16, 16)))


def scores_for(layout: GateLayout, seed: int = 0) -> Tensor:
    return torch.randn(layout.size, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("metric", ["volume", "flops", "params"])
@pytest.mark.parametrize("factor", [1.0, 2.0, 16.0, 60.0])
def test_projection_never_exceeds_the_budget(wrn: GateLayout, metric: Metric, factor: float) -> None:
    full = count(wrn.network).of(metric)
    limit = max(full / factor, smallest_cost(wrn, metric))
    scores = scores_for(wrn)
    opened = scores > -1
    plan, forced = project(wrn, scores, opened, metric, limit)
    assert count(wrn.network, plan).of(metric) <= limit
    left = torch.zeros(wrn.size, dtype=torch.bool)
    for name, ids in plan.kept.items():
        left[[wrn.offsets[name][0] + i for i in ids]] = True
    for name in protected_layers(wrn, metric):
        first, n = wrn.offsets[name]
        assert left[first + int(scores[first : first + n].argmax())], name
    closed = opened & ~left
    assert forced == int(closed.sum())
    # the lowest scores were closed, protected ones aside, and no more than needed
    if forced and count(wrn.network, plan).of(metric) < 0.97 * limit:
        for gate in (~left).nonzero().flatten()[::7]:
            again = left.clone()
            again[gate] = True
            alive = bool(wrn.living(again)[gate])
            assert not alive or count(wrn.network, wrn.plan(again)).of(metric) > limit
    assert not forced or factor > 16 or scores[left].mean() > scores[closed].mean() + 1


def test_ties_close_the_larger_map_first(wrn: GateLayout) -> None:
    full = count(wrn.network).volume
    plan, forced = project(wrn, torch.zeros(wrn.size), torch.ones(wrn.size, dtype=torch.bool), "volume", full - 1)
    assert forced == 1
    (shorter,) = [name for name, (_, n) in wrn.offsets.items() if len(plan.kept[name]) < n]
    assert shorter == "conv1" or shorter.startswith("stages.0")


def test_what_fits_stays_open(wrn: GateLayout) -> None:
    opened = scores_for(wrn) > 0
    plan, forced = project(wrn, scores_for(wrn), opened, "volume", count(wrn.network).volume)
    assert forced == 0 and all(set(ids) <= set(plan.kept[name]) for name, ids in wrn.kept(opened).items())


def test_protected_layers_are_a_path(wrn: GateLayout) -> None:
    protected = protected_layers(wrn, "volume")
    assert protected == ["conv1", "stages.0.0.shortcut", "stages.1.0.shortcut", "stages.2.0.shortcut"]
    # one map of each: 256 + 256 + 64 + 16
    assert smallest_cost(wrn, "volume") == 592


def test_protection_before_a_split() -> None:
    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = conv(3), conv(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            first, second = F.relu(self.a(x)).chunk(2, 1)
            return self.fc(F.relu(self.b(torch.cat([second, first], 1))).mean((2, 3)))

    layout = GateLayout(trace(Shuffle(), torch.zeros(1, 3, 8, 8)))
    assert protected_layers(layout, "volume") == ["a", "b"]


def test_a_budget_below_the_smallest_names_it(wrn: GateLayout) -> None:
    with pytest.raises(InputError, match="592"):
        budget_limit(wrn, Budget.parse("591act"))
    with pytest.raises(InputError, match="592"):
        budget_limit(wrn, Budget.parse("1000x"))
    assert budget_limit(wrn, Budget.parse("592act")) == 592
    plan = random_plan(wrn, "volume", 592, seed=0)
    assert count(wrn.network, plan).volume == 592
    with pytest.raises(InputError, match="latency table"):
        budget_limit(wrn, Budget.parse("8ms"))


def test_random_plan_keeps_the_same_share_everywhere(wrn: GateLayout) -> None:
    limit = count(wrn.network).volume / 4
    plan = random_plan(wrn, "volume", limit, seed=3)
    assert limit - 256 <= count(wrn.network, plan).volume <= limit
    shares = {name: len(plan.kept[name]) / n for name, (_, n) in wrn.offsets.items()}
    for name, (_, n) in wrn.offsets.items():
        assert abs(shares[name] - 0.25) <= 1 / n + 1e-9, name  # rounding to whole channels
    assert plan == random_plan(wrn, "volume", limit, seed=3)
    other = random_plan(wrn, "volume", limit, seed=4)
    assert other != plan
    assert {name: len(ids) for name, ids in other.kept.items()} == {name: len(ids) for name, ids in plan.kept.items()}


def test_every_convolution_has_its_gates_once() -> None:
    module = build("mobilenetv2", input_shape=(3, 8, 8), classes=4, model_args=("width=0.25",))
    layout = GateLayout(trace(module, torch.zeros(1, 3, 8, 8)))
    spans = sorted(layout.offsets.values())
    assert spans[0][0] == 0 and all(a + n == b for (a, n), (b, _) in zip(spans, spans[1:], strict=False))
    assert sum(n for _, n in spans) == layout.size == sum(c.out_channels for c in convolutions(module).values())
