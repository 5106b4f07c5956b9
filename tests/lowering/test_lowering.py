"""Each lowering computes what the sliced network computes, and is what it says it is."""

import copy
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bar_edge.errors import InputError
from bar_edge.lowering import placement
from bar_edge.lowering.lower import lower, stream_sizes
from bar_edge.lowering.packing import pack
from bar_edge.lowering.widen import regular_form
from bar_edge.models import build
from bar_edge.network import Expand, MixedAdd, Network, count, trace
from bar_edge.network.counted_cost import count_executed
from bar_edge.records import ChannelPlan
from bar_edge.records.lowering import KINDS, PAPER, Lowering
from bar_edge.surgery import slice_network
from bar_edge.targets.onnx.file import export_onnx, parity_onnx
from bar_edge_kernels import gather, scatter_add
from tests.reference import Kept, contrasting, difference, hooked_counts, random_kept, randomise, visible

FLOAT64 = 1e-9  # the issue's; the same sums in another order


def conv(inputs: int = 8, outputs: int = 8) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Net(nn.Module):
    """A stem, a function of parts that are convolutions or BatchNorms of eight channels, a classifier."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], features: int = 8) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c, self.d = conv(3), conv(), conv(), conv(), conv()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.n, self.m = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.body, self.fc = body, nn.Linear(features, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self, self.stem(x)).mean((2, 3)))


def sigmoid_stream(s: Any, x: Tensor) -> Tensor:
    """Not 0 at 0: what is absent must not come back."""
    x = torch.sigmoid(s.n(x) + s.a(x))
    return x + s.b(x)


def joined_streams(s: Any, x: Tensor) -> Tensor:
    left, right = x + s.a(x), s.b(x) + s.c(x)
    return F.relu(left + right) + F.relu(right)


def taps(s: Any, x: Tensor) -> Tensor:
    x = F.relu(x + s.a(x))
    y = F.max_pool2d(x, 2) + F.avg_pool2d(s.b(x), 2)
    return torch.cumsum(y, 1)  # no rule: full width


def concatenated(s: Any, x: Tensor) -> Tensor:
    return torch.cat([x + s.a(x), F.relu(s.b(x)) + s.c(x)], 1)


def linear_bottleneck(s: Any, x: Tensor) -> Tensor:
    for first, last in ((s.a, s.b), (s.c, s.d)):
        x = x + s.n(last(F.relu6(s.m(first(x))))) if first is s.a else x + last(s.depthwise(first(x)))
    return x


MADE = {
    "linear bottleneck": Net(linear_bottleneck),
    "sigmoid": Net(sigmoid_stream), "joined": Net(joined_streams), "taps": Net(taps), "cat": Net(concatenated, 16),
    "normed": Net(lambda s, x: F.relu(s.n(x + s.a(x))) + s.m(s.b(x)) + x),
}  # fmt: skip
FORMS = [PAPER, *KINDS, "slices:4", "pad:3", "gather:4", "scatter:2", "blocks:2", "blocks:8", "pointwise:4"]
FORMS += ["deferred:4", "zero-filled:4", "regular:8", "slices@2x2", "gather:8@1x2", "regular:3@8x4", "zero-filled:3-6"]
ZOO = {"wrn-16-1": 1.0, "resnet20": 0.5, "resnet18": 0.0625}


def sliced_network(name: str, removed: float = 0.5, seed: int = 3) -> tuple[Network, Network, Kept]:
    """Return the dense network, what a random plan leaves of it, and the plan's channels; float64."""
    if name in MADE:
        module = copy.deepcopy(MADE[name])
    else:
        module = build(name, input_shape=(3, 8, 8), classes=4, model_args=(f"width={ZOO[name]}",))
    module = randomise(module.double().eval(), removed=removed)
    network = trace(module, torch.zeros(1, 3, 8, 8).double())
    kept = random_kept(module, removed, seed)
    kept = {name: ids for name, ids in kept.items() if name in dict(network.body.named_modules())}
    return network, slice_network(network, ChannelPlan(network=network.fingerprint, kept=kept)), kept


@pytest.mark.parametrize("name", [*ZOO, *MADE])
def test_every_form_equals_the_sliced_network(name: str) -> None:
    _, sliced, _ = sliced_network(name)
    images = contrasting(3, 3, 8, 8)
    sliced.train()
    before, print_before = copy.deepcopy(sliced.state_dict()), sliced.fingerprint
    with torch.no_grad():
        expected = copy.deepcopy(sliced).eval()(images)
    assert visible(expected)
    assert [m for m in sliced.modules() if isinstance(m, MixedAdd)], "a plan without mixed additions shows nothing"
    for form in FORMS:
        lowered = lower(sliced, Lowering.parse(form))
        assert difference(expected, lowered(images)) < FLOAT64, form
        assert lowered(images[:1]).shape == (1, 4), form
        left = {type(lowered.module_of(node)) for node in lowered.nodes}
        assert not left & {MixedAdd, Expand}, form
    # a stage changes nothing
    assert sliced.fingerprint == print_before
    assert sliced.training and all(m.training for m in sliced.modules())
    assert sliced.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in sliced.state_dict().items())


@pytest.mark.parametrize("name", ["wrn-16-1", "linear bottleneck", "cat"])
def test_the_file_equals_the_sliced_network(name: str, tmp_path: Path) -> None:
    _, sliced, _ = sliced_network(name)
    images = contrasting(3, 3, 8, 8).float()
    assert visible(sliced.float()(images).detach())
    for form in ("paper", "slices:4", "pad:3", "gather:4", "scatter:2", "deferred:4", "blocks:2", "scatter@2x2"):
        export_onnx(lower(sliced, Lowering.parse(form)), (3, 8, 8), tmp_path / "model.onnx")
        # float32 in two runtimes that sum in different orders
        assert parity_onnx(sliced, tmp_path / "model.onnx", images) < 1e-4, form


def targets(network: Network) -> list[object]:
    return [node.target for node in network.nodes if node.op == "call_function"]


def test_paper_gathers_and_scatters() -> None:
    _, sliced, _ = sliced_network("wrn-16-1")
    called = targets(lower(sliced, Lowering.parse("paper")))
    additions = sum(isinstance(m, MixedAdd) for m in sliced.modules())
    assert called.count(scatter_add) == additions
    assert called.count(gather) >= additions
    assert torch.ops.aten.cat.default not in called


@pytest.mark.parametrize(
    "form", ["slices", "pad", "gather", "pointwise", "deferred", "blocks:2", "zero-filled", "regular"]
)
def test_other_forms_do_not_scatter(form: str) -> None:
    _, sliced, _ = sliced_network("wrn-16-1")
    called = targets(lower(sliced, Lowering.parse(form)))
    assert not {gather, scatter_add, torch.ops.aten.index_add.default} & set(called)


def convolutions(network: Network) -> list[nn.Conv2d]:
    return [m for node in network.nodes if isinstance(m := network.module_of(node), nn.Conv2d)]


@pytest.mark.parametrize(
    "form", ["slices:4", "gather:4", "pointwise:4", "deferred:4", "blocks:4", "zero-filled:4", "regular:4"]
)
@pytest.mark.parametrize("name", ["wrn-16-1", "resnet20", "linear bottleneck"])
def test_rounded_widths_are_multiples(name: str, form: str) -> None:
    _, sliced, _ = sliced_network(name, removed=0.4)
    plain, rounded = (
        convolutions(lower(sliced, Lowering.parse(form.partition(":")[0]))),
        convolutions(lower(sliced, Lowering.parse(form))),
    )
    assert any(c.out_channels % 4 for c in plain), "the plan has odd widths"
    for c in rounded:
        assert c.out_channels % 4 == 0
        assert c.groups == c.in_channels or c.in_channels % 4 == 0 or c.in_channels == 3


@pytest.mark.parametrize("form", ["pointwise:2-8", "gather:2-8", "zero-filled:2-8", "regular:2-8"])
def test_narrow_widths_are_rounded_less(form: str) -> None:
    _, sliced, _ = sliced_network("wrn-16-1", removed=0.7)
    widths = {c.out_channels for c in convolutions(lower(sliced, Lowering.parse(form)))}
    narrow = {width for width in widths if width < 8}
    assert narrow and not any(width % 2 for width in narrow)
    assert widths - narrow and not any(width % 8 for width in widths - narrow)
    assert any(
        c.out_channels % 2 and c.out_channels < 8
        for c in convolutions(lower(sliced, Lowering.parse(form.partition(":")[0])))
    )


def test_deferred_sums_in_the_convolution_that_a_norm_becomes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, sliced, _ = sliced_network("wrn-16-1")
    images = contrasting(3, 3, 8, 8)
    lowered = lower(sliced, Lowering.parse("deferred"))
    joined = targets(lowered).count(torch.ops.aten.cat.default)
    assert joined == sum(isinstance(m, MixedAdd) for m in sliced.modules()) == 6
    assert torch.ops.aten.add.Tensor not in targets(lowered)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in lowered.modules()) == 1  # it reads what the stem writes
    assert len(convolutions(lowered)) == len(convolutions(lower(sliced, Lowering.parse("gather")))) + 6
    # a sum that would be too long a sum is made before it is added to: here the first of every stage
    monkeypatch.setattr("bar_edge.lowering.forms.deferred.LONGEST", 0)
    made = lower(sliced, Lowering.parse("deferred"))
    assert len(convolutions(made)) == len(convolutions(lowered)) + 3
    assert difference(sliced.eval()(images).detach(), made(images)) < FLOAT64


@pytest.mark.parametrize("form", ["slices:4", "gather:4", "deferred:4", "pointwise:4", "blocks:4", "regular:4"])
def test_an_activation_with_one_weight_stays_as_it_is(form: str) -> None:
    def joined(s: Any, x: Tensor) -> Tensor:
        x = s.shared(x)
        return x + s.a(x)

    net = Net(joined)
    net.shared = nn.PReLU()
    network = trace(randomise(net.double().eval()), torch.zeros(1, 3, 8, 8).double())
    kept = {"stem": (0, 1, 2, 3), "a": (2, 3, 4, 5)}  # of which one is full as it is
    sliced = slice_network(network, ChannelPlan(network=network.fingerprint, kept=kept)).eval()
    images = contrasting(3, 3, 8, 8)
    assert difference(sliced(images).detach(), lower(sliced, Lowering.parse(form))(images)) < FLOAT64


@pytest.mark.parametrize("form", ["slices:2", "slices:3", "pad:3", "gather:3", "deferred:3"])
def test_a_sum_of_sums_may_have_channels_that_neither_has(form: str) -> None:
    def crossed(s: Any, x: Tensor) -> Tensor:
        left, right = x + s.a(x), x + s.b(x)
        return left + right + left

    net = Net(crossed)
    network = trace(randomise(net.double().eval()), torch.zeros(1, 3, 8, 8).double())
    images, before = contrasting(3, 3, 8, 8), 0
    for seed in range(12):
        kept = {name: ids for name, ids in random_kept(net, 0.5, seed).items() if name in ("stem", "a", "b")}
        sliced = slice_network(network, ChannelPlan(network=network.fingerprint, kept=kept)).eval()
        before += any(isinstance(m, MixedAdd) for m in sliced.modules())
        assert difference(sliced(images).detach(), lower(sliced, Lowering.parse(form))(images)) < FLOAT64, seed
    assert before > 6


def test_blocks_add_where_they_write_and_join_where_they_are_read() -> None:
    _, sliced, _ = sliced_network("wrn-16-1", removed=0.7)
    called = targets(lower(sliced, Lowering.parse("blocks:2")))
    assert called.count(torch.ops.aten.slice.Tensor) <= 1  # the classifier gets what it had
    assert torch.ops.aten.cat.default in called
    # one convolution per run: more of them, of no more than the widths written
    more = convolutions(lower(sliced, Lowering.parse("blocks:2")))
    assert len(more) > len(convolutions(sliced))


def test_pointwise_moves_channels_by_convolutions_alone() -> None:
    aten = torch.ops.aten
    _, sliced, _ = sliced_network("wrn-16-1", removed=0.7)
    called = targets(lower(sliced, Lowering.parse("pointwise:4")))
    assert not {aten.slice.Tensor, aten.index_select.default, aten.constant_pad_nd.default} & set(called)
    moving = [
        c
        for c in convolutions(lower(sliced, Lowering.parse("pointwise:4")))
        if c.weight.count_nonzero() <= c.out_channels
    ]
    assert len(moving) >= sum(isinstance(m, MixedAdd) for m in sliced.modules())


def test_a_writer_makes_the_whole_stream_where_that_costs_no_more() -> None:
    """4 of 8 channels: with 1 channel read, 8 filters of 1x1 cost 8, 4 of them and a placing convolution 4 + 32."""
    for kernel, channels_read, moved in ((1, 1, 0), (3, 6, 1)):
        module = nn.Module()
        module.stem, module.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, kernel, padding=kernel // 2)
        module.fc = nn.Linear(8, 4)
        plan = {"stem": tuple(range(8)), "a": (1, 3, 5, 7), "b": tuple(range(channels_read))}
        module.b = nn.Conv2d(8, 8, 1)

        class Block(nn.Module):
            def __init__(self, s: nn.Module) -> None:
                super().__init__()
                self.s = s

            def forward(self, x: Tensor) -> Tensor:
                x = self.s.stem(x)
                return self.s.fc(F.relu(x + self.s.a(F.relu(self.s.b(x)))).mean((2, 3)))

        network = trace(randomise(Block(module).double().eval(), removed=0.5), torch.zeros(1, 3, 8, 8).double())
        kept = {f"s.{name}": ids for name, ids in plan.items()}
        sliced = slice_network(network, ChannelPlan(network=network.fingerprint, kept=kept))
        lowered, images = lower(sliced, Lowering.parse("pointwise")), contrasting(2, 3, 8, 8)
        assert difference(sliced(images), lowered(images)) < FLOAT64
        assert len(convolutions(lowered)) == len(convolutions(sliced)) + moved


def test_gather_takes_zeros_from_an_empty_filter() -> None:
    _, sliced, _ = sliced_network("wrn-16-1")
    pad, select = torch.ops.aten.constant_pad_nd.default, torch.ops.aten.index_select.default
    plain, rounded = (
        targets(lower(sliced, Lowering.parse("gather"))),
        targets(lower(sliced, Lowering.parse("gather:8"))),
    )
    assert plain.count(select) > 0
    assert rounded.count(select) > 0
    assert rounded.count(pad) < plain.count(pad)


def test_each_stream_may_have_its_own_form() -> None:
    _, sliced, _ = sliced_network("wrn-16-1")
    images = contrasting(2, 3, 8, 8)
    assert stream_sizes(sliced) == [(8, 8), (4, 4), (2, 2)]
    lowered = lower(sliced, Lowering.parse("regular,scatter,slices:4"))
    assert difference(copy.deepcopy(sliced).eval()(images), lowered(images)) < FLOAT64
    called = targets(lowered)
    additions = sum(isinstance(m, MixedAdd) for m in sliced.modules())
    assert 0 < called.count(torch.ops.aten.index_add.default) < additions
    with pytest.raises(InputError, match="3 residual streams"):
        lower(sliced, Lowering.parse("slices,regular"))


def test_an_activation_that_is_not_idempotent_is_applied_again() -> None:
    """A part of a stream that a block does not write passes through its activation all the same."""

    def body(s: Any, x: Tensor) -> Tensor:
        x = F.silu(x + s.a(x))
        return F.silu(x + s.b(x))

    module = randomise(Net(body).double().eval(), removed=0.5)
    network = trace(module, torch.zeros(1, 3, 8, 8).double())
    kept = {"stem": (0, 1, 2, 3), "a": (2, 3, 4, 5), "b": (4, 5, 6, 7)}
    sliced = slice_network(network, ChannelPlan(network=network.fingerprint, kept=kept))
    images = contrasting(2, 3, 8, 8)
    for form in ("blocks:2", "zero-filled", "paper", "slices"):
        assert difference(sliced(images), lower(sliced, Lowering.parse(form))(images)) < FLOAT64, form


def test_batchnorms_become_part_of_their_convolution() -> None:
    _, sliced, _ = sliced_network("resnet20")
    assert not [m for m in lower(sliced, Lowering.parse("slices")).modules() if isinstance(m, nn.BatchNorm2d)]
    _, sliced, _ = sliced_network("wrn-16-1")  # those that read the stream stay
    left = [n for n in lower(sliced, Lowering.parse("slices")).nodes if n.op == "call_module" and "bn" in str(n.target)]
    assert 0 < len(left) < sum(isinstance(m, nn.BatchNorm2d) for m in sliced.modules())


def test_zero_filled_has_one_convolution_per_writer_and_no_concatenation() -> None:
    _, sliced, _ = sliced_network("joined")
    targets = [node.target for node in lower(sliced, Lowering.parse("zero-filled")).nodes]
    convolutions = [m for m in lower(sliced, Lowering.parse("zero-filled")).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == sum(isinstance(m, nn.Conv2d) for m in sliced.modules())
    assert torch.ops.aten.cat.default not in targets
    assert torch.ops.aten.cat.default in [node.target for node in lower(sliced, Lowering.parse("slices")).nodes]


class Stem(nn.Module):
    """A narrow stem that much reads, and a wide stream behind it."""

    def __init__(self, groups: int = 0) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 8, 1)
        self.c, self.d, self.fc = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.norm = nn.GroupNorm(groups, 8) if groups else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm(x + self.b(self.a(x).relu()))
        output: Tensor = self.fc((x + self.d(self.c(x).relu())).mean((2, 3)))
        return output


def stem_network(groups: int = 0) -> Network:
    network = trace(randomise(Stem(groups).double().eval(), removed=0.0), torch.zeros(1, 3, 8, 8).double())
    kept = {"stem": tuple(range(4)), "b": tuple(range(4))}
    return slice_network(network, ChannelPlan(network=network.fingerprint, kept=kept))


@pytest.mark.parametrize("copied", [0, 20, 200, 10**9])
@pytest.mark.parametrize("name", ["stem", "wrn-16-1", "resnet18", "linear bottleneck"])
def test_a_zero_filled_stream_grows_where_that_costs_least(
    monkeypatch: pytest.MonkeyPatch, name: str, copied: int
) -> None:
    """Against all widths of each stream's sums, by multiplications of the lowered layers and copied values."""
    sliced = stem_network() if name == "stem" else sliced_network(name)[1]
    monkeypatch.setattr(placement, "PAD", copied)
    grown, calls = placement._grown, list[tuple[list[int], list[int]]]()

    def cost() -> float:
        lowered = lower(sliced, Lowering.parse("zero-filled"))
        shapes = [lowered.shapes[n.name] for n in lowered.nodes if n.target is torch.ops.aten.constant_pad_nd.default]
        return count_executed(lowered).flops / 2 + copied * sum(torch.Size(shape[1:]).numel() for shape in shapes)

    def recorded(*args: Any) -> dict[Any, int]:
        widths = grown(*args)
        calls.append((list(args[-1].values()), list(widths.values())))
        return widths

    monkeypatch.setattr(placement, "_grown", recorded)
    least, tried = cost(), 0
    assert copied < 10**9 or least < copied, "it never grows"
    ours = [widths for _, widths in calls]
    for i, (needs, _) in enumerate(list(calls)):
        for widths in itertools.product(*([w for w in {*needs} if w >= need] for need in needs)):
            if list(widths) == sorted(widths):
                stream = iter([*ours[:i], widths, *ours[i + 1 :]])
                monkeypatch.setattr(
                    placement, "_grown", lambda *args, s=stream: dict(zip(args[-1], next(s), strict=True))
                )
                assert cost() >= least
                tried += 1
    assert tried > len(calls)


def test_what_cannot_hold_zeros_in_advance_is_zero_filled_as_before() -> None:
    """A norm over channels between two sums: the stream cannot grow before it."""
    targets = [node.target for node in lower(stem_network(groups=2), Lowering.parse("zero-filled")).nodes]
    assert torch.ops.aten.constant_pad_nd.default in targets and torch.ops.aten.cat.default not in targets


def test_a_branch_of_a_stream_stays_as_narrow_as_it_was() -> None:
    """Widths of one resolution say nothing of another's."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.low, self.high = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
            self.fc = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            small = F.avg_pool2d(x, 4)
            small = small + self.low(small)
            large = x + self.high(x)
            output: Tensor = self.fc(torch.cat([small.mean((2, 3)), large.mean((2, 3))], 1))
            return output

    network = trace(randomise(Branches().double().eval(), removed=0.0), torch.zeros(1, 3, 16, 16).double())
    kept = {"stem": tuple(range(2)), "high": tuple(range(2))}
    sliced = slice_network(network, ChannelPlan(network=network.fingerprint, kept=kept))
    lowered = lower(sliced, Lowering.parse("zero-filled"))
    assert {m.out_channels for n, m in lowered.named_modules() if "high" in n and isinstance(m, nn.Conv2d)} == {2}


def test_blocks_of_a_stream_of_linear_layers() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.fc = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.a(x.relu())
            output: Tensor = self.fc((x + self.b(x.relu())).relu())
            return output

    module = randomise(Dense().double().eval(), removed=0.0)
    network = trace(module, torch.zeros(2, 3).double())
    kept = {"stem": (0, 2, 3, 5, 6), "a": (1, 2, 4, 5, 7), "b": (0, 1, 2, 3, 4)}
    sliced = slice_network(network, ChannelPlan(network=network.fingerprint, kept=kept))
    images = torch.randn(4, 3, dtype=torch.float64)
    for form in FORMS:
        assert difference(sliced(images), lower(sliced, Lowering.parse(form))(images)) < FLOAT64, form


def test_slices_execute_what_is_counted() -> None:
    _, sliced, _ = sliced_network("wrn-16-1")
    images = contrasting(1, 3, 8, 8)
    counts = count(sliced)
    for form in ("slices", "pad", "gather", "scatter", "paper"):
        assert hooked_counts(lower(sliced, Lowering.parse(form)), images)[:2] == (counts.volume, counts.flops)


# ------------------------------------------------------------------------------- the regular count


def union(*parts: Any) -> set[int]:
    return set().union(*parts)


def wrn_regular(kept: Kept, blocks: int, areas: tuple[int, ...]) -> tuple[int, int]:
    """Methods, section 0, for a pre-activation network whose first blocks have shortcuts: (volume, FLOPs)."""
    k = {name: set(ids) for name, ids in kept.items()}
    volume, flops = len(k["conv1"]) * areas[0], 2 * 9 * 3 * len(k["conv1"]) * areas[0]
    before = k["conv1"]
    for stage, area in enumerate(areas):
        names = [f"stages.{stage}.{i}" for i in range(blocks)]
        alive = [n for n in names if k[f"{n}.conv1"] and k[f"{n}.conv2"]]
        stream = union(k[f"{names[0]}.shortcut"], *(k[f"{n}.conv2"] for n in alive))
        if k[f"{names[0]}.shortcut"]:
            volume, flops = volume + len(stream) * area, flops + 2 * len(before) * len(stream) * area
        for n in alive:
            read, inner = before if n == names[0] else stream, k[f"{n}.conv1"]
            volume += (len(inner) + len(stream)) * area
            flops += 2 * 9 * area * (len(read) * len(inner) + len(inner) * len(stream))
        before = stream
    return volume, flops


def resnet_regular(kept: Kept, blocks: int, areas: tuple[int, ...]) -> tuple[int, int]:
    """The same for a post-activation CIFAR ResNet: the stem writes the first stage's stream."""
    k = {name: set(ids) for name, ids in kept.items()}
    volume = flops = 0
    before: set[int] = set()
    for stage, area in enumerate(areas, start=1):
        names = [f"layer{stage}.{i}" for i in range(blocks)]
        alive = [n for n in names if k[f"{n}.conv1"] and k[f"{n}.conv2"]]
        entry = "conv1" if stage == 1 else f"{names[0]}.downsample.0"
        stream = union(k[entry], *(k[f"{n}.conv2"] for n in alive))
        if k[entry]:
            volume += len(stream) * area
            flops += 2 * area * len(stream) * (9 * 3 if stage == 1 else len(before))
        for n in alive:
            read, inner = (before if stage > 1 and n == names[0] else stream), k[f"{n}.conv1"]
            volume += (len(inner) + len(stream)) * area
            flops += 2 * 9 * area * (len(read) * len(inner) + len(inner) * len(stream))
        before = stream
    return volume, flops


@pytest.mark.parametrize("removed", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    ("name", "by_hand", "blocks", "dead"),
    [
        ("wrn-16-2", wrn_regular, 2, ["stages.0.1.conv1", "stages.1.0.conv2", "stages.2.1.conv2"]),
        ("resnet20", resnet_regular, 3, ["layer1.1.conv2", "layer2.0.conv1", "layer3.2.conv1"]),
    ],
)
def test_regular_counts_the_union(
    name: str, by_hand: Callable[..., tuple[int, int]], blocks: int, dead: list[str], removed: float
) -> None:
    module = build(name, input_shape=(3, 16, 16), classes=10, model_args=("width=0.5",)).eval()
    network = trace(module, torch.zeros(1, 3, 16, 16))
    kept = random_kept(module, removed, seed=4, dead=dead)
    plan = ChannelPlan(network=network.fingerprint, kept=kept)
    regular = regular_form(slice_network(network, plan))
    expected = by_hand(kept, blocks, (256, 64, 16))
    assert (count(regular).volume, count(regular).flops) == expected
    assert hooked_counts(regular, torch.zeros(1, 3, 16, 16))[:2] == expected
    assert expected[0] >= count(network, plan).volume


def test_regular_of_the_dense_network_is_the_dense_network() -> None:
    module = build("wrn-10-1", input_shape=(3, 8, 8), classes=4).eval()
    network = trace(module, torch.zeros(1, 3, 8, 8))
    assert count(regular_form(network)) == count(network)


def test_unknown_form_lists_the_known() -> None:
    _, sliced, _ = sliced_network("joined")
    with pytest.raises(InputError, match="zero-filled"):
        lower(sliced, Lowering.parse("magic"))
    roundings = ["0", "x", "", "257", "8-4", "3-4", "4-", "0-4", "4@9x1"]
    for text in [
        "",
        "paper:4",
        "paper@2x2",
        "slices@",
        "slices@2",
        "slices@0x2",
        "slices@2x2:4",
        *(f"slices:{r}" for r in roundings),
    ]:
        with pytest.raises(InputError, match="a lowering: slices"):
            lower(sliced, Lowering.parse(text))


# ------------------------------------------------------------------------------------------ packed pixels


class Strided(nn.Module):
    """A stem, an operator between convolutions of one size, and a convolution that ends it; (N, 4) outputs."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], last: nn.Conv2d) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), conv(6, 6), conv(6, 6)
        self.norm, self.drop, self.one = nn.BatchNorm2d(6), nn.Dropout(), nn.PReLU()
        self.register_buffer("three", torch.tensor([5, 0, 4]))
        self.register_buffer("number", torch.tensor(3))
        self.between, self.last, self.fc = between, last, nn.Linear(last.out_channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.a(x)  # the stream that a form is of
        return self.fc(self.last(self.between(self, x)).mean((2, 3)))


def end(
    inputs: int = 6, kernel: int | tuple[int, int] = 3, stride: int | tuple[int, int] = 2, **more: Any
) -> nn.Conv2d:
    return nn.Conv2d(inputs, 5, kernel, stride, **{"padding": 1, **more})


def by_a_number(s: Any, x: Tensor) -> Tensor:
    return torch.cat([x.index_select(1, s.number), x[:, 1:]], 1)


def every_other(s: Any, x: Tensor) -> Tensor:
    return torch.cat([x[:, 1:4], x.index_select(1, s.three)], 1)


PACKED = {
    "nothing": (lambda s, x: x, end()),
    "no padding": (lambda s, x: x, end(padding=0)),
    "1x1": (lambda s, x: x, end(kernel=1, padding=0)),
    "5x3": (lambda s, x: x, end(kernel=(5, 3), padding=(2, 1))),
    "even kernel": (lambda s, x: x, end(kernel=4)),
    "dilated": (lambda s, x: x, end(dilation=2, padding=2)),
    "grouped": (lambda s, x: x, nn.Conv2d(6, 4, 3, 2, 1, groups=2)),
    "no bias": (lambda s, x: s.b(x), end(bias=False)),
    "stride 4": (lambda s, x: x, end(stride=4)),
    "stride 2 and 4": (lambda s, x: x, end(stride=(2, 4))),
    "norm": (lambda s, x: s.norm(x), end()),
    "activations": (lambda s, x: F.silu(s.drop(torch.sigmoid(x) * x) - 0.5), end()),
    "channels": (every_other, end()),
    "a channel": (by_a_number, end(6)),
    "padded channels": (lambda s, x: torch.constant_pad_nd(x, (0, 0, 0, 0, 1, 2)), end(9)),
    "added channels": (lambda s, x: x.index_add(1, s.three, s.b(x)[:, :3]), end()),
    "called twice": (lambda s, x: s.b(s.b(x)), end()),
}
#: between which nothing can be packed
UNPACKED = {
    "stride 1": (lambda s, x: x, end(stride=1)),
    "stride 3": (lambda s, x: x, end(stride=3)),
    "padding by reflection": (lambda s, x: x, end(padding_mode="reflect")),
    "pooled": (lambda s, x: F.max_pool2d(x, 2), end()),
    "gated": (lambda s, x: x * x.mean((2, 3), keepdim=True), end()),
    "constant": (lambda s, x: x + torch.arange(16.0).double(), end()),
    "activation with a weight": (lambda s, x: s.one(x), end()),
    "padded pixels": (lambda s, x: F.pad(x, (1, 1, 1, 1)), end()),
    "moved": (lambda s, x: x.transpose(2, 3), end()),
}


def packed_pair(between: Any, last: nn.Conv2d, form: str) -> tuple[Network, Network, Tensor]:
    module = randomise(Strided(between, copy.deepcopy(last)).double().eval())
    network = trace(module, torch.zeros(1, 3, 16, 16).double())
    return (
        lower(network, Lowering.parse(form.partition("@")[0])),
        lower(network, Lowering.parse(form)),
        contrasting(3, 3, 16, 16),
    )


@pytest.mark.parametrize("packing", ["2x2", "1x2", "2x1"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_pixels_are_the_same_pixels(name: str, packing: str) -> None:
    plain, packed, images = packed_pair(*PACKED[name], f"regular@{packing}")
    h, w = map(int, packing.split("x"))
    assert visible(plain(images).detach())
    assert difference(plain(images).detach(), packed(images).detach()) < FLOAT64
    wide = {shape[1:] for shape in packed.shapes.values()}
    assert ((6 * h * w, 16 // h, 16 // w) in wide) == (name != "called twice")


#: kind -> operator on one or two tensors without weights
OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "act": lambda a, _: torch.tanh(a),
    "add": torch.add,
    "mul": lambda a, b: a * torch.sigmoid(b),
    "cat": lambda a, b: torch.cat([a, b], 1),
    "part": lambda a, _: a[:, : (a.shape[1] + 1) // 2],
}


class Random(nn.Module):
    """Random operators at 24x24 behind a random stem, and two random strided convolutions that end them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        r = self.random = random.Random(seed)
        self.stem = self.convolution(2, r.randint(1, 6))
        widths, self.steps = [self.stem.out_channels], list[tuple[str, int, int]]()
        for n in range(r.randint(2, 7)):
            kind = r.choice(["conv", "conv", "norm", *OPERATORS])
            i, j = r.choices(range(len(widths)), k=2)
            j = j if kind == "cat" or widths[i] == widths[j] else i
            width = {"cat": widths[i] + widths[j], "part": (widths[i] + 1) // 2}.get(kind, widths[i])
            if kind == "conv":
                width = r.randint(1, 6)
                self.add_module(str(n), self.convolution(widths[i], width))
            elif kind == "norm":
                self.add_module(str(n), nn.BatchNorm2d(width))
            self.steps.append((kind, i, j))
            widths.append(width)
        self.ends = nn.ModuleList([self.convolution(widths[-1], 3, r.choice([2, 2, 2, 4, 3])) for _ in range(2)])

    def convolution(self, inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
        r = self.random
        kernel = [r.choice([1, 2, 3, 5] if stride > 1 else [1, 3, 5]) for _ in range(2)]
        dilation = [r.choice([1, 1, 2]) for _ in range(2)]
        spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        padding = [r.randint(0, span) if stride > 1 else span // 2 for span in spans]
        groups = r.choice([g for g in (1, 1, 2, 3) if inputs % g == outputs % g == 0])
        return nn.Conv2d(inputs, outputs, (*kernel,), stride, (*padding,), (*dilation,), groups, r.random() < 0.7)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        tensors = [self.stem(x)]
        for n, (kind, i, j) in enumerate(self.steps):
            operator = OPERATORS.get(kind)
            a, b = tensors[i], tensors[j]
            tensors.append(operator(a, b) if operator else self.get_submodule(str(n))(a))
        return tuple(end(tensors[-1]) for end in self.ends)


def test_random_networks_packed_are_the_same() -> None:
    seen = 0
    for seed in range(60):
        module = randomise(Random(seed).double().eval())
        network = trace(module, torch.zeros(1, 2, 24, 24).double()).eval()
        images = contrasting(2, 2, 24, 24)
        packed = pack(copy.deepcopy(network), {(24, 24): random.Random(seed).choice([(2, 2), (1, 2), (2, 1), (3, 3)])})
        for a, b in zip(network(images), packed(images), strict=True):
            assert difference(a.detach(), b.detach()) < FLOAT64, seed
        seen += packed.shapes != network.shapes
    assert seen > 15


def test_packed_twice_as_far_between_larger_strides() -> None:
    plain, packed, images = packed_pair(*PACKED["stride 4"], "regular@4x4")
    assert (2, 6 * 16, 4, 4) in packed.shapes.values()
    assert difference(plain(images).detach(), packed(images).detach()) < FLOAT64


@pytest.mark.parametrize("name", UNPACKED)
def test_what_cannot_be_packed_stays(name: str) -> None:
    plain, packed, images = packed_pair(*UNPACKED[name], "regular@2x2")
    assert difference(plain(images).detach(), packed(images).detach()) < FLOAT64
    assert [m.weight.shape for m in convolutions(packed)] == [m.weight.shape for m in convolutions(plain)]


def test_a_packing_that_does_not_divide_the_image_changes_nothing() -> None:
    plain, packed, _ = packed_pair(*PACKED["nothing"], "regular@3x3")
    assert packed.shapes == plain.shapes


def test_a_packed_network_has_wider_and_fewer_pixels() -> None:
    _, sliced, _ = sliced_network("wrn-16-1")
    plain, packed = (
        lower(sliced, Lowering.parse("deferred:4")),
        lower(sliced, Lowering.parse("deferred:16@2x2,deferred:4,deferred:4")),
    )
    assert count_executed(packed).flops > count_executed(plain).flops
    first, (wide, *_) = convolutions(plain)[0], convolutions(packed)
    assert wide.out_channels % 16 == 0 and wide.out_channels == 4 * first.out_channels
    assert (wide.kernel_size, wide.stride, wide.padding) == ((4, 4), (2, 2), (1, 1))
    assert all(shape[2:] != (8, 8) for name, shape in packed.shapes.items() if name != "x")
    # the streams behind it are what they were
    assert [m.weight.shape for m in convolutions(packed)[-4:]] == [m.weight.shape for m in convolutions(plain)[-4:]]


def test_what_cannot_be_packed_is_rounded_as_without() -> None:
    _, sliced, _ = sliced_network("wrn-16-1")
    packed = lower(sliced, Lowering.parse("regular:16@2x2"))
    assert not any(c.out_channels % 16 for c in convolutions(packed))
    assert (2, 2) in {shape[2:] for shape in packed.shapes.values()}  # the last stage, which is pooled
