"""A seeded share of the random networks, and that their reference, their checker and their shrinker can fail."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from bar_edge.network import Network
from bar_edge.records import ChannelPlan
from bar_edge.surgery import slice_network
from tests.meaning import masked_answer, masked_run
from tests.network.random_networks import blocks, grower, proof
from tests.network.random_networks.blocks import BLOCKS
from tests.network.random_networks.case import Case, Step
from tests.network.random_networks.grower import Grower, random_case
from tests.network.random_networks.proof import check, enliven, examine, inputs_of
from tests.network.random_networks.shrinking import shrink, shrunk
from tests.network.random_networks.steps import KINDS, RandomNetwork
from tests.reference import contrasting, difference, randomise
from tests.reference import masked_answer as older_answer

ROUNDING = 1e-12  # other memory layouts choose other kernels: 1e-16 per layer


@pytest.mark.parametrize("seed", range(60))
def test_masked_equals_sliced(seed: int) -> None:
    failure = check(seed, removed=(0.25, 0.5, 0.75, 0.9)[seed % 4], blocks=1 + seed % 2)
    if failure is not None:
        pytest.fail(str(shrunk(failure)))


# the reference ------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A function of one tensor and the parts given by name."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)
        enliven(self.double(), seed=3).eval()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(inputs: int, outputs: int, k: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, k, padding=k // 2, **options)


def without(x: Tensor, *absent: int, axis: int = 1) -> Tensor:
    return x.index_fill(axis, torch.tensor(absent), 0)


def meets(net: nn.Module, kept: dict[str, tuple[int, ...]], expected: Callable[[Any, Tensor], Any]) -> None:
    """Require that the reference answers what `expected` writes out by hand, and that the dense network does not."""
    images = contrasting(3, 3, 4, 6)
    with torch.no_grad():
        wanted, got, dense = expected(net, images), masked_answer(net, kept, images), net(images)
    assert difference(wanted, got) < ROUNDING
    assert difference(wanted, dense) > 0.01


def test_absent_channels_are_zero_again_after_functions_that_are_not_zero_at_zero() -> None:
    net = Net(lambda s, x: s.b(torch.sigmoid(s.n(s.a(x))) + 0.5), a=conv(3, 4), n=nn.BatchNorm2d(4), b=conv(4, 2))
    meets(net, {"a": (0, 3)}, lambda s, x: s.b(without(torch.sigmoid(s.n(s.a(x))) + 0.5, 1, 2)))


def test_outputs_have_zeros_where_channels_are_absent() -> None:
    net = Net(lambda s, x: torch.exp(s.a(x)), a=conv(3, 4))
    meets(net, {"a": (1,)}, lambda s, x: without(torch.exp(s.a(x)), 0, 2, 3))


def test_a_group_without_live_inputs_has_no_live_outputs() -> None:
    net = Net(lambda s, x: s.g(s.a(x)), a=conv(3, 4), g=conv(4, 6, 3, groups=2))
    meets(net, {"a": (2, 3), "g": (0, 4, 5)}, lambda s, x: without(s.g(without(s.a(x), 0, 1)), 0, 1, 2, 3))


def test_a_depthwise_convolution_follows_its_input() -> None:
    net = Net(lambda s, x: s.d(s.a(x)), a=conv(3, 2), d=conv(2, 4, 3, groups=2))
    meets(net, {"a": (1,)}, lambda s, x: without(s.d(without(s.a(x), 0)), 0, 1))


def test_a_transposed_convolution_drops_its_bias_with_its_channels() -> None:
    net = Net(lambda s, x: torch.cos(s.t(s.a(x))), a=conv(3, 4), t=nn.ConvTranspose2d(4, 3, 2, 2))
    meets(net, {"a": (0, 2), "t": (1, 2)}, lambda s, x: without(torch.cos(s.t(without(s.a(x), 1, 3))), 0))


def test_a_sum_exists_where_either_does_and_a_product_where_both_do() -> None:
    parts = {"a": conv(3, 4), "b": conv(3, 4)}
    kept = {"a": (0, 1), "b": (1, 2)}
    net = Net(lambda s, x: torch.sigmoid(s.a(x) + s.b(x)), **parts)
    meets(net, kept, lambda s, x: without(torch.sigmoid(without(s.a(x), 2, 3) + without(s.b(x), 0, 3)), 3))
    net = Net(lambda s, x: torch.sigmoid(s.a(x) * s.b(x)), **parts)
    meets(net, kept, lambda s, x: without(torch.sigmoid(s.a(x) * s.b(x)), 0, 2, 3))


def test_squeeze_and_excite_keeps_the_channels_that_both_have() -> None:
    def squeeze_excite(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        return torch.cos(y * torch.sigmoid(s.fc(y.mean((2, 3)))).view(-1, 4, 1, 1))

    def by_hand(s: Any, x: Tensor) -> Tensor:
        y = without(s.a(x), 3)
        gate = without(torch.sigmoid(s.fc(y.mean((2, 3)))), 0)
        return without(torch.cos(y * gate[:, :, None, None]), 0, 3)

    meets(Net(squeeze_excite, a=conv(3, 4), fc=nn.Linear(4, 4)), {"a": (0, 1, 2), "fc": (1, 2, 3)}, by_hand)


def test_norms_count_absent_channels_as_zeros() -> None:
    net = Net(lambda s, x: s.n(s.a(x)), a=conv(3, 4), n=nn.GroupNorm(2, 4))
    meets(net, {"a": (0, 3)}, lambda s, x: without(s.n(without(s.a(x), 1, 2)), 1, 2))

    def last(s: Any, x: Tensor) -> Tensor:
        return s.l(s.n(s.a(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    def by_hand(s: Any, x: Tensor) -> Tensor:
        y = without(s.n(without(s.a(x), 1).permute(0, 2, 3, 1)), 1, axis=-1)
        return without(s.l(y), 0, 2, axis=-1).permute(0, 3, 1, 2)

    net = Net(last, a=conv(3, 4), n=nn.LayerNorm(4), l=nn.Linear(4, 5))
    meets(net, {"a": (0, 2, 3), "l": (1, 3, 4)}, by_hand)


def test_parameters_do_not_bring_channels_back() -> None:
    net = Net(lambda s, x: s.p + s.a(x) * s.p, a=conv(3, 4), p=nn.Parameter(torch.rand(4, 1, 1)))
    meets(net, {"a": (0, 3)}, lambda s, x: without(s.p + s.a(x) * s.p, 1, 2))


def test_a_channel_shuffle_moves_what_is_absent() -> None:
    net = Net(lambda s, x: torch.cos(s.a(x).unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)), a=conv(3, 6))
    order = [0, 3, 1, 4, 2, 5]
    meets(net, {"a": (0, 1, 5)}, lambda s, x: without(torch.cos(s.a(x)), 2, 3, 4)[:, order])


def by_views(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


@pytest.mark.parametrize("function", [lambda x: F.pixel_shuffle(x, 2), by_views])
def test_a_channel_of_several_sources_is_zero_again_only_as_a_whole(function: Callable[[Tensor], Tensor]) -> None:
    net = Net(lambda s, x: torch.cos(function(s.a(x))), a=conv(3, 8))
    meets(net, {"a": (1,)}, lambda s, x: without(torch.cos(F.pixel_shuffle(without(s.a(x), 0, 2, 3), 2)), 1))


def test_a_linear_layer_after_flatten_reads_whole_maps() -> None:
    net = Net(lambda s, x: s.l(torch.sigmoid(s.a(x)).flatten(1)), a=conv(3, 2), l=nn.Linear(48, 3))
    meets(net, {"a": (1,)}, lambda s, x: s.l(without(torch.sigmoid(s.a(x)), 0).flatten(1)))
    dead = masked_answer(net, {"a": ()}, contrasting(3, 3, 4, 6))
    assert torch.equal(dead, torch.zeros(3, 3).double())  # the bias goes too


def test_operators_without_a_rule_see_zeros_and_exist() -> None:
    net = Net(lambda s, x: torch.cos(s.a(x).cumsum(1)), a=conv(3, 4))
    meets(net, {"a": (0, 3)}, lambda s, x: torch.cos(without(s.a(x), 1, 2).cumsum(1)))


def test_the_larger_of_two_and_a_choice_between_them_exist_where_either_does() -> None:
    parts = {"a": conv(3, 4), "b": conv(3, 4)}
    kept = {"a": (0, 1), "b": (1, 2)}
    absent = lambda s, x: (without(s.a(x), 2, 3), without(s.b(x), 0, 3))  # noqa: E731
    net = Net(lambda s, x: torch.cos(torch.maximum(s.a(x), s.b(x))), **parts)
    meets(net, kept, lambda s, x: without(torch.cos(torch.maximum(*absent(s, x))), 3))

    def choice(s: Any, x: Tensor) -> Tensor:
        return (lambda a, b: torch.where(a > 0.1, a, b) + 0.5)(s.a(x), s.b(x))

    def by_hand(s: Any, x: Tensor) -> Tensor:
        a, b = absent(s, x)
        return without(torch.where(a > 0.1, a, b) + 0.5, 3)

    meets(Net(choice, **parts), kept, by_hand)
    net = Net(lambda s, x: s.a(x).masked_fill(s.a(x) <= 0, 0.5), a=conv(3, 4))
    masked = lambda a: a.masked_fill(a <= 0, 0.5)  # noqa: E731
    meets(net, {"a": (0, 1)}, lambda s, x: without(masked(without(s.a(x), 2, 3)), 2, 3))


def test_one_half_by_the_other_exists_where_both_do() -> None:
    net = Net(lambda s, x: torch.cos(F.glu(s.a(x), 1)), a=conv(3, 6))
    meets(net, {"a": (0, 1, 3, 5)}, lambda s, x: without(torch.cos(F.glu(without(s.a(x), 2, 4), 1)), 1, 2))


def test_joining_along_another_axis_exists_where_any_part_does() -> None:
    parts = {"a": conv(3, 3), "b": conv(3, 3)}
    kept = {"a": (0, 1), "b": (1,)}
    net = Net(lambda s, x: torch.cos(torch.cat([s.a(x), s.b(x)], 2)), **parts)
    meets(net, kept, lambda s, x: without(torch.cos(torch.cat([without(s.a(x), 2), without(s.b(x), 0, 2)], 2)), 2))
    net = Net(lambda s, x: torch.cos(torch.stack([s.a(x), s.b(x)], 1).sum(1)), **parts)
    meets(net, kept, lambda s, x: without(torch.cos(without(s.a(x), 2) + without(s.b(x), 0, 2)), 2))


def test_a_layer_called_twice_has_the_same_plan_twice() -> None:
    net = Net(lambda s, x: s.a(torch.sigmoid(s.a(x))), a=conv(3, 3))
    meets(net, {"a": (0, 2)}, lambda s, x: without(s.a(without(torch.sigmoid(s.a(x)), 1)), 1))


def test_writing_in_place_is_seen_through_every_name() -> None:
    def in_place(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        y[:, :2].add_(0.5)
        F.relu(y[:, 2:], inplace=True)
        y += s.b(x)
        return y

    def by_hand(s: Any, x: Tensor) -> Tensor:
        y = without(s.a(x), 1, 3)
        return torch.cat([without(y[:, :2] + 0.5, 1), F.relu(y[:, 2:])], 1) + without(s.b(x), 0, 1)

    meets(Net(in_place, a=conv(3, 4), b=conv(3, 4)), {"a": (0, 2), "b": (2, 3)}, by_hand)


def test_the_narrower_reference_agrees() -> None:
    net = Net(
        lambda s, x: s.fc(torch.cat([F.relu(s.n(s.a(x))), s.b(x) + x], 1).mean((2, 3))),
        a=conv(3, 4, 3), n=nn.BatchNorm2d(4), b=conv(3, 3), fc=nn.Linear(7, 5),
    )  # fmt: skip
    images, kept = contrasting(3, 3, 5, 5), {"a": (0, 2), "b": (1,)}
    assert difference(older_answer(net, kept, images), masked_answer(net, kept, images)) < ROUNDING


# the generator ------------------------------------------------------------------------------------------


def only(block: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, seed: int) -> Case:
    monkeypatch.setattr(grower, "BLOCKS", {block: 10, blocks.plain: 1})
    return Grower(seed, blocks=3).case


def test_a_plan_that_keeps_everything_means_the_users_network(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    for block in BLOCKS:
        for seed in (2, 3, 4):
            case = only(block, monkeypatch, seed)
            assert Case.from_json(case.to_json()) == case
            module, inputs = enliven(RandomNetwork(case), seed), inputs_of(case)
            answers, widths = masked_run(module, {}, *inputs)
            with torch.no_grad():
                wanted = module(*inputs)
            for a, b in zip(pytree.tree_leaves(wanted), pytree.tree_leaves(answers), strict=True):
                assert difference(a, b) < ROUNDING
            layers = {name: m for name, m in module.named_modules() if name in widths}
            full = {n: m.out_features if isinstance(m, nn.Linear) else m.out_channels for n, m in layers.items()}
            assert widths == full
            seen |= {step.kind for step in case.steps}
    assert seen == {*KINDS, "again"}


# the checker and the shrinker ---------------------------------------------------------------------------


@functools.cache
def with_norm() -> Case:
    """A case that is exact, with a BatchNorm that matters."""
    cases = (random_case(seed, 0.5, blocks=1) for seed in range(50))
    return next(c for c in cases if any(s.kind == "batch_norm" for s in c.steps) and examine(c).failure is None)


def other_channels(network: Network, plan: ChannelPlan) -> Network:
    """Slice by a plan with one channel of one layer exchanged."""
    name, ids = next((n, k) for n, k in plan.kept.items() if 0 in k and 1 not in k)
    return slice_network(network, dataclasses.replace(plan, kept=plan.kept | {name: (1, *ids[1:])}))


def more_channels(network: Network, plan: ChannelPlan) -> Network:
    return slice_network(network, dataclasses.replace(plan, kept={}))


def shifted_norms(network: Network, plan: ChannelPlan) -> Network:
    sliced = slice_network(network, plan)
    with torch.no_grad():
        for norm in (m for m in sliced.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean += 0.01
    return sliced


@pytest.mark.parametrize("wrong", [other_channels, more_channels, shifted_norms])
def test_a_wrong_slice_is_noticed(wrong: Callable[..., Network], monkeypatch: pytest.MonkeyPatch) -> None:
    case = with_norm()
    monkeypatch.setattr(proof, "slice_network", wrong)
    failure = examine(case).failure
    assert failure is not None and failure.kind == "answer"


def test_wrong_counts_and_files_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case, count = with_norm(), proof.count
    with monkeypatch.context() as patch:
        patch.setattr(proof, "count", lambda network, plan=None: count(network))
        failure = examine(case).failure
        assert failure is not None and failure.kind == "count"
    load = Network.load

    def forgetful(folder: Any) -> Network:
        network = load(folder)
        next(p for p in network.parameters()).data.add_(1e-6)
        return network

    monkeypatch.setattr(Network, "load", forgetful)
    failure = examine(case, files=True).failure
    assert failure is not None and failure.kind == "file"


def test_a_failure_shrinks_to_the_steps_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = with_norm()
    monkeypatch.setattr(proof, "slice_network", shifted_norms)
    failure = examine(case).failure
    assert failure is not None
    small = shrunk(failure)
    assert small.kind == "answer" and len(small.case.steps) < len(case.steps)
    assert [step.kind for step in small.case.steps] == ["batch_norm"]
    assert "batch_norm" in str(small) and Case.from_json(small.case.to_json()) == small.case


def test_shrinking_keeps_what_the_failure_depends_on() -> None:
    def fails(case: Case) -> bool:
        kinds = [step.kind for step in case.steps]
        return "split" in kinds and "cat" in kinds[kinds.index("split") :]

    case = next(c for c in (random_case(seed, 0.5, blocks=5) for seed in range(200)) if fails(c))
    small = shrink(case, fails)
    assert {step.kind for step in small.steps} >= {"cat", "split"} and len(small.steps) < 5 < len(case.steps)
    assert len(small.outputs) == 1 and RandomNetwork(small)


def test_a_step_that_is_left_out_passes_its_input_on() -> None:
    steps = (
        Step("a", "conv", ("x0",), {"out": 4}),
        Step("b", "split", ("a",), {"sizes": [2, 2], "how": "chunk"}),
        Step("c", "act", ("b.1",), {"how": "relu"}),
    )
    case = Case(((3, 5, 5),), steps, ("c",), 0, 0.5)
    small = shrink(case, lambda c: any(step.kind == "act" for step in c.steps))
    assert small.steps == (Step("c", "act", ("x0",), {"how": "relu"}),) and small.outputs == ("c",)
    assert torch.equal(RandomNetwork(small)(torch.ones(1, 3, 5, 5)), torch.ones(1, 3, 5, 5))


def test_random_weights_hide_nothing() -> None:
    module = randomise(RandomNetwork(random_case(4, 0.5)))
    for part in enliven(module, 0).modules():
        for parameter in part.parameters(recurse=False):
            assert parameter.unique().numel() == parameter.numel() or parameter.numel() > 1000
