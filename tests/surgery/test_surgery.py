"""Masked = sliced: the user's own module with absent channels at zero, against what surgery makes of it."""

import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bar_edge.errors import InputError
from bar_edge.methods import GateLayout
from bar_edge.models import build
from bar_edge.network import MixedAdd, Network, count, trace
from bar_edge.records import ChannelPlan
from bar_edge.surgery import masked_outputs, relative_difference, slice_network
from tests import meaning
from tests.reference import (
    Kept,
    contrasting,
    convolutions,
    difference,
    hooked_counts,
    masked_answer,
    random_kept,
    randomise,
    visible,
)

FLOAT64 = 1e-9  # the issue's; sums in another order differ by about 1e-16 per layer
FLOAT32 = 5e-5  # the issue's; 1e-7 per layer, grown by up to a hundred layers

#: every network of the zoo, as narrow and on as small an image as shows all its operators
ZOO = {
    "resnet20": ((3, 16, 16), 0.5),
    "resnet18": ((3, 72, 72), 0.125),
    "resnet50": ((3, 16, 16), 0.125),
    "vgg16": ((3, 16, 16), 0.25),
    "mobilenetv2": ((3, 16, 16), 0.5),
    "wrn-28-12": ((3, 8, 8), 0.0625),
    "wrn-10-1": ((3, 16, 16), 1.0),
    "wrn-16-2": ((1, 8, 8), 0.5),
}


@pytest.fixture(scope="module", params=ZOO)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Network]]:
    """A network of the zoo and its trace, both float64, eval mode."""
    shape, width = ZOO[request.param]
    module = build(request.param, input_shape=shape, classes=10, model_args=(f"width={width}",)).double().eval()
    yield module, trace(module, torch.zeros(2, *shape, dtype=torch.float64))


def images_for(network: Network, n: int = 3) -> Tensor:
    return contrasting(n, *network.input_shapes[0])


def renew(module: nn.Module, network: Network, removed: float, seed: int = 0) -> None:
    """Give both the same new weights: parameters have the user's names."""
    randomise(module, seed=seed, removed=removed)
    network.body.load_state_dict(module.state_dict())


def plan_for(network: Network, kept: Kept) -> ChannelPlan:
    return ChannelPlan(network=network.fingerprint, kept={name: tuple(ids) for name, ids in kept.items()})


def dead_layers(module: nn.Module) -> list[str]:
    """Return convolutions of residual blocks, never both ways through a block; every third block stays whole.

    First or last convolution of a body, in turns; a shortcut where the block's body lives.
    """
    dead = []
    blocks = [name for name, m in module.named_modules() if type(m).__name__ in
              ("BasicBlock", "Bottleneck", "PreActivationBlock", "InvertedResidual")]  # fmt: skip
    for i, name in enumerate(blocks):
        block = module.get_submodule(name)
        inside = [f"{name}.{part}" for part in convolutions(block)]
        shortcuts = [part for part in inside if "shortcut" in part or "downsample" in part]
        body = [part for part in inside if part not in shortcuts]
        if i % 3 == 2 or getattr(block, "residual", True) is False:
            continue
        dead.append(shortcuts[0] if shortcuts and i % 2 else body[0] if i % 3 else body[-1])
    return dead


# the part that decides everything ---------------------------------------------------------------------


@pytest.mark.parametrize(("removed", "kill"), [(0.25, False), (0.5, True), (0.9, True)])
def test_masked_equals_sliced(pair: tuple[nn.Module, Network], removed: float, kill: bool) -> None:
    check_parity(*pair, removed, kill)


@pytest.mark.parametrize("name", ["resnet32", "resnet44", "resnet56", "resnet110"])
def test_masked_equals_sliced_at_other_depths(name: str) -> None:
    module = build(name, input_shape=(3, 8, 8), classes=10, model_args=("width=0.125",)).double().eval()
    check_parity(module, trace(module, torch.zeros(2, 3, 8, 8).double()), removed=0.5, kill=True)


def check_parity(module: nn.Module, network: Network, removed: float, kill: bool) -> None:
    dead = dead_layers(module) if kill else []
    kept = random_kept(module, removed, seed=int(removed * 10), dead=dead)
    images = images_for(network)
    for seed in range(20):  # a reference that is constant would see nothing
        renew(module, network, removed, seed)
        expected = masked_answer(module, kept, images)
        if visible(expected):
            break
    assert visible(expected)
    sliced = slice_network(network, plan_for(network, kept))
    assert difference(expected, sliced(images)) < FLOAT64
    # the same slices in float32 against the reference in float32
    single = masked_answer(copy.deepcopy(module).float(), kept, images.float())
    assert difference(single, copy.deepcopy(sliced).float()(images.float())) < FLOAT32
    # counted by hooks = counted by the plan = counted on the result
    measured = hooked_counts(sliced, images)
    planned, left = count(network, plan_for(network, kept)), count(sliced)
    assert measured == (planned.volume, planned.flops, planned.params) == (left.volume, left.flops, left.params)
    # first-write order: what a block reads is a prefix, what is new is appended
    for addition in (m for m in sliced.modules() if isinstance(m, MixedAdd)):
        n = len(addition.positions_a)
        assert addition.positions_a == tuple(range(n))
        assert sorted(set(addition.positions_b) - set(range(n))) == list(range(n, addition.width))


def test_dense_network_is_the_users_bit_for_bit(pair: tuple[nn.Module, Network]) -> None:
    module, network = pair
    renew(module, network, 0.0)
    images = images_for(network)
    assert torch.equal(module(images), network(images))
    sliced = slice_network(network, plan_for(network, {}))
    assert not [m for m in sliced.modules() if isinstance(m, MixedAdd)]
    assert torch.equal(module(images), sliced(images))


def test_gates_are_all_convolutions_but_depthwise_ones(pair: tuple[nn.Module, Network]) -> None:
    module, network = pair
    widths = {name: conv.out_channels for name, conv in convolutions(module).items()}
    assert {name: n for name, (_, n) in GateLayout(network).offsets.items()} == widths


def test_every_layer_dead(pair: tuple[nn.Module, Network]) -> None:
    module, network = pair
    renew(module, network, 0.0)
    kept = dict.fromkeys(convolutions(module), ())
    sliced = slice_network(network, plan_for(network, kept))
    images = images_for(network)
    # no live input, no live output: the classifier's bias goes too
    assert torch.equal(sliced(images), masked_answer(module, kept, images))
    assert torch.equal(sliced(images), torch.zeros(3, 10, dtype=torch.float64))
    assert count(network, plan_for(network, kept)).volume == count(sliced).volume == 0


# networks that the zoo has not --------------------------------------------------------------------------


class Net(nn.Module):
    """A stem (3 -> 8) and a function of it and the module, then the mean over the map and a classifier."""

    def __init__(self, body: Callable[["Net", Tensor], Tensor], features: int = 8, **parts: nn.Module) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.function = body
        for name, part in parts.items():
            self.add_module(name, part)
        self.fc = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.function(self, x), 1), 1))


def conv(inputs: int = 8, outputs: int = 8, k: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, k, padding=k // 2, **options)  # type: ignore[arg-type]


def squeeze_excite(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    weights = torch.sigmoid(net.up(F.relu(net.down(F.adaptive_avg_pool2d(y, 1)))))
    return net.b(y * weights)


def norm_over_channels(net: Net, x: Tensor) -> Tensor:
    y = net.a(x).permute(0, 2, 3, 1)
    return F.relu(net.b(net.ln(y).permute(0, 3, 1, 2)))


def shuffle(net: Net, x: Tensor) -> Tensor:
    first, second = net.a(x).chunk(2, 1)
    return net.b(torch.cat([second, F.relu(first)], 1))


def dense_block(net: Net, x: Tensor) -> Tensor:
    x = torch.cat([x, net.a(F.relu(net.n1(x)))], 1)
    x = torch.cat([net.b(F.relu(net.n2(x))), x], 1)
    return F.relu(net.n3(x))


def stream_of_concatenations(net: Net, x: Tensor) -> Tensor:
    left = torch.cat([net.a(x), net.b(x)], 1)
    right = torch.cat([net.d(x), net.c(x)], 1)
    return F.relu(net.n(left + right) + left)


def not_zero_at_zero(net: Net, x: Tensor) -> Tensor:
    return net.b(torch.sigmoid(net.n(net.a(x))) + 0.5)


MADE = {
    "squeeze and excite": Net(squeeze_excite, a=conv(), down=conv(8, 4, 1), up=conv(4, 8, 1), b=conv()),
    "layer norm": Net(norm_over_channels, a=conv(), ln=nn.LayerNorm(8), b=conv()),
    "grouped": Net(lambda s, x: F.relu(s.b(F.relu(s.g(s.a(x))))), a=conv(), g=conv(groups=4), b=conv()),
    "group norm": Net(lambda s, x: F.relu(s.b(s.n(s.a(x)))), a=conv(), n=nn.GroupNorm(2, 8), b=conv()),
    "shuffle": Net(shuffle, a=conv(), b=conv()),
    "densenet": Net(dense_block, 16, a=conv(8, 4), b=conv(12, 4), n1=nn.BatchNorm2d(8), n2=nn.BatchNorm2d(12),
                    n3=nn.BatchNorm2d(16)),
    "sum of concatenations": Net(stream_of_concatenations, 16, a=conv(8, 6), b=conv(8, 10), c=conv(8, 6),
                                 d=conv(8, 10), n=nn.BatchNorm2d(16)),
    "bias without BatchNorm": Net(lambda s, x: F.relu(s.b(F.leaky_relu(s.a(x), 0.1)) + x), a=conv(), b=conv()),
    "f(0) is not 0": Net(not_zero_at_zero, a=conv(), n=nn.BatchNorm2d(8), b=conv()),
    "depthwise with bias": Net(lambda s, x: F.relu(s.b(F.silu(s.d(s.a(x))))), a=conv(), d=conv(groups=8), b=conv()),
    "called twice": Net(lambda s, x: s.a(F.relu(s.a(x))), a=conv()),
    "norm called twice": Net(lambda s, x: F.relu(s.n(s.b(F.relu(s.n(s.a(x)))))), a=conv(), b=conv(),
                             n=nn.BatchNorm2d(8)),
    "pools": Net(lambda s, x: F.max_pool2d(s.b(F.avg_pool2d(s.a(x), 2)), 2), a=conv(), b=conv()),
    "a broadcast sum": Net(lambda s, x: F.relu(s.a(x) + s.b(F.adaptive_avg_pool2d(x, 1))), a=conv(), b=conv()),
    "itself twice": Net(lambda s, x: s.b(s.a(x) + s.a(x) + x), a=conv(), b=conv()),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_masked_equals_sliced_beyond_the_zoo(name: str) -> None:
    module = MADE[name].double().eval()
    images = contrasting(4, 3, 8, 8)
    network = trace(module, images)
    gated = GateLayout(network).offsets
    for removed, dead in [(0.25, ""), (0.5, ""), (0.6, ""), (0.5, "a"), (0.5, "b")]:
        for seed in range(20):
            renew(module, network, 0.5, seed)
            kept = random_kept(module, removed, seed, dead=[dead] if dead in gated else [])
            kept = {layer: ids for layer, ids in kept.items() if layer in gated}
            expected = meaning.masked_answer(module, kept, images)
            if visible(expected) or dead:
                break
        assert dead or visible(expected)
        plan = plan_for(network, kept)
        sliced = slice_network(network, plan)
        assert difference(expected, sliced(images)) < FLOAT64
        assert count(network, plan) == count(sliced)
        assert relative_difference(masked_outputs(network, plan, images), sliced(images)) < FLOAT64


def test_flatten_of_a_map_feeds_a_linear_layer() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 16, 7), nn.Linear(7, 5)
    )
    randomise(module.double().eval())
    images = torch.randn(4, 3, 8, 8).double()
    network = trace(module, images)
    kept = {"0": (1, 4)}
    sliced = slice_network(network, plan_for(network, kept))
    assert difference(masked_answer(module, kept, images), sliced(images)) < FLOAT64
    assert sliced.body.get_submodule("4").weight.shape == (7, 2 * 16)


def test_one_dimensional_network() -> None:
    module = nn.Sequential(
        nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 3), nn.Flatten(), nn.Linear(24, 3)
    )
    randomise(module.double().eval())
    x = torch.randn(4, 2, 10).double()
    network = trace(module, x)
    assert count(network).volume == 6 * 8 + 4 * 6
    assert count(network).flops == 2 * 3 * (8 * 2 * 6 + 6 * 6 * 4)
    sliced = slice_network(network, plan_for(network, {"0": (0, 5), "3": (2,)}))
    with torch.no_grad():
        y = module[2](module[1](module[0](x)))
        y[:, [1, 2, 3, 4]] = 0
        z = module[3](y)
        z[:, [0, 1, 3]] = 0
        expected = module[5](module[4](z))
    assert difference(expected, sliced(x)) < FLOAT64


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = conv(3, 8), conv(8, 4), conv(8, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(x))
        return {"map": self.left(x), "features": x, "pooled": F.relu(self.right(x)).mean((2, 3))}


def test_outputs_are_restored_to_full_width() -> None:
    module = randomise(TwoHeads().double().eval())
    images = torch.randn(2, 3, 6, 6).double()
    network = trace(module, images)
    # all three are outputs of the network: nothing here can be pruned
    assert GateLayout(network).offsets == {}


class Taps(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(x))
        return {"map": self.left(x), "moments": self.right(torch.cumsum(x, 1))}


def test_an_operator_without_a_rule_sees_zeros_at_full_width() -> None:
    module = randomise(Taps().double().eval())
    images = torch.randn(2, 3, 6, 6).double()
    network = trace(module, images)
    sliced = slice_network(network, plan_for(network, {"stem": (1, 6)}))
    with torch.no_grad():
        x = F.relu(module.stem(images))
        x[:, [0, 2, 3, 4, 5, 7]] = 0
        expected = {"map": module.left(x), "moments": module.right(torch.cumsum(x, 1))}
    answer = sliced(images)
    assert set(answer) == {"map", "moments"}
    for name in expected:
        assert difference(expected[name], answer[name]) < FLOAT64


# what surgery promises besides -------------------------------------------------------------------------


@functools.cache
def traced_once() -> tuple[nn.Module, Network]:
    module = randomise(build("wrn-10-1", input_shape=(3, 8, 8), classes=10).eval())
    return module, trace(module, torch.zeros(1, 3, 8, 8))


def small() -> tuple[nn.Module, Network]:
    return copy.deepcopy(traced_once())


def test_the_old_network_is_unchanged() -> None:
    module, network = small()
    network.train()
    before, print_before = copy.deepcopy(network.state_dict()), network.fingerprint
    sliced = slice_network(network, plan_for(network, random_kept(module, 0.5, seed=1)))
    with torch.no_grad():
        for value in sliced.parameters():
            value.add_(1)
    assert network.training and network.fingerprint == print_before
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_sliced_network_trains_at_any_batch_size() -> None:
    module, network = small()
    sliced = slice_network(network, plan_for(network, random_kept(module, 0.5, seed=1))).train()
    sliced(torch.randn(5, 3, 8, 8)).square().mean().backward()
    without = [name for name, p in sliced.named_parameters() if p.grad is None]
    assert without == []
    assert sliced(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_a_sliced_network_is_sliced_again() -> None:
    module, network = small()
    network, module = network.double(), module.double()
    outer = random_kept(module, 0.3, seed=1)
    once = slice_network(network, plan_for(network, outer))
    # keep the first half of what each layer of `once` has
    layers = GateLayout(once).offsets
    inner = {name: tuple(range((n + 1) // 2)) for name, (_, n) in layers.items()}
    twice = slice_network(once, plan_for(once, inner))
    images = torch.randn(3, 3, 8, 8).double()
    assert difference(masked_outputs(once, plan_for(once, inner), images), twice(images)) < FLOAT64
    assert count(twice) == count(once, plan_for(once, inner))
    assert hooked_counts(twice, images) == (count(twice).volume, count(twice).flops, count(twice).params)


def test_a_depthwise_layer_filters_channels_in_the_order_in_which_they_lie() -> None:
    reordered = [3, 0, 2, 7, 1, 6, 4, 5]
    module = Net(lambda s, x: s.b(F.relu(s.d(s.a(x)[:, reordered]))), a=conv(), d=conv(groups=8), b=conv())
    network, images = trace(randomise(module.double().eval()), contrasting(3, 3, 8, 8)), contrasting(3, 3, 8, 8)
    plan = plan_for(network, {"a": (1, 2, 5, 6, 7)})
    sliced = slice_network(network, plan)
    assert not any(node.target is torch.ops.aten.index_select.default for node in sliced.nodes)
    assert relative_difference(masked_outputs(network, plan, images), sliced(images)) < FLOAT64


@pytest.mark.parametrize("seed", range(4))
def test_what_a_block_reads_is_a_prefix_however_often_a_network_is_sliced(seed: int) -> None:
    module = randomise(build("resnet20", input_shape=(3, 8, 8), classes=10).double(), seed).eval()
    network, images = trace(module, torch.zeros(1, 3, 8, 8)), contrasting(3, 3, 8, 8)
    for removed in (0.4, 0.3, 0.3):
        generator = torch.Generator().manual_seed(seed)
        kept = {
            name: tuple(sorted(torch.randperm(n, generator=generator)[: max(1, round(n * (1 - removed)))].tolist()))
            for name, (_, n) in GateLayout(network).offsets.items()
        }
        plan = plan_for(network, kept)
        sliced = slice_network(network, plan)
        assert difference(masked_outputs(network, plan, images), sliced(images)) < FLOAT64
        mixed = [m for m in sliced.modules() if isinstance(m, MixedAdd)]
        assert mixed
        assert all(m.positions_a == tuple(range(len(m.positions_a))) for m in mixed)
        assert not any(node.target is torch.ops.aten.index_select.default for node in sliced.nodes)
        network = sliced


def test_frozen_parameters_stay_frozen() -> None:
    module, _ = small()
    module.conv1.weight.requires_grad_(False)
    network = trace(module, torch.zeros(1, 3, 8, 8))
    sliced = slice_network(network, plan_for(network, random_kept(module, 0.5, seed=1)))
    frozen = [name for name, p in sliced.named_parameters() if not p.requires_grad]
    assert frozen == ["body.conv1.weight"]


@pytest.mark.parametrize("kept", [{"nowhere": (0,)}, {"conv1": (0, 16)}, {"conv1": (-1,)}, {"fc": (0,)}])
def test_impossible_plans_are_refused(kept: dict[str, tuple[int, ...]]) -> None:
    _, network = small()
    with pytest.raises(InputError, match=next(iter(kept))):
        slice_network(network, plan_for(network, kept))


def test_a_plan_for_another_network_is_refused() -> None:
    _, network = small()
    other = trace(build("wrn-10-2", input_shape=(3, 8, 8), classes=10), torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match=other.fingerprint):
        slice_network(network, plan_for(other, {}))


def test_the_librarys_own_mask_agrees_with_the_reference() -> None:
    module, network = small()
    module, network = module.double(), network.double()
    kept = random_kept(module, 0.5, seed=5, dead=["stages.1.0.conv1"])
    images = torch.randn(3, 3, 8, 8).double()
    ours = masked_outputs(network, plan_for(network, kept), images)
    assert difference(masked_answer(module, kept, images), ours) < FLOAT64
