"""Networks that the zoo has not: exact surgery and gates without a list of layers, most of the cost prunable."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from bar_edge.methods import GateLayout, random_plan, smallest_cost
from bar_edge.methods.gating.gate_cost import GateCost
from bar_edge.methods.gating.gated_network import GatedNetwork, fold
from bar_edge.methods.gating.projection import project, protected_gates
from bar_edge.network import Network, count, layers, trace
from bar_edge.network.cross_check import uncounted_flops
from bar_edge.records import ChannelPlan
from bar_edge.surgery import masked_outputs, relative_difference, slice_network
from tests.meaning import masked_answer
from tests.network.architectures import ARCHITECTURES
from tests.reference import contrasting, randomise, torch_flops

#: the issue's least prunable share of the FLOPs
PRUNABLE = {"plain": 0.95, "hybrid": 0.7}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[str, nn.Module, Network]]:
    """A narrow network of its kind and its trace, float64, eval mode."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[request.param]
    module = randomise(architecture.build(0.25).double().eval(), seed=1, removed=0.5)
    yield request.param, module, trace(module, torch.zeros(2, *architecture.small_shape, dtype=torch.float64))


def random_kept(layout: GateLayout, removed: float) -> dict[str, tuple[int, ...]]:
    generator = torch.Generator().manual_seed(int(removed * 100))
    return {
        name: tuple(sorted(torch.randperm(n, generator=generator)[: max(1, round((1 - removed) * n))].tolist()))
        for name, (_, n) in layout.offsets.items()
    }


@pytest.mark.parametrize("removed", [0.25, 0.5, 0.9])
def test_masked_equals_sliced(pair: tuple[str, nn.Module, Network], removed: float) -> None:
    name, module, network = pair
    plan = ChannelPlan(network=network.fingerprint, kept=random_kept(GateLayout(network), removed))
    images = contrasting(2, *ARCHITECTURES[name].small_shape)
    sliced = slice_network(network, plan)
    with torch.no_grad():
        answer = sliced(images)
    assert relative_difference(masked_answer(module, plan.kept, images), answer) < 1e-9
    assert count(network, plan) == count(sliced)


def test_flops_are_those_of_torchs_own_counter(pair: tuple[str, nn.Module, Network]) -> None:
    name, module, network = pair
    convolutions, everything = torch_flops(module, contrasting(2, *ARCHITECTURES[name].small_shape))
    assert sum(row.flops for row in layers(network) if row.kind.startswith("Conv")) == convolutions
    assert count(network).flops + sum(uncounted_flops(network).values()) == everything


def test_gated_equals_folded_and_sliced(pair: tuple[str, nn.Module, Network]) -> None:
    name, _, network = pair
    gated = GatedNetwork(GateLayout(network)).double()
    gates, layout = gated.gates, gated.layout
    with torch.no_grad():
        gates.log_alpha.copy_(torch.rand(layout.size, generator=torch.Generator().manual_seed(0)) * 8 - 5)
        for ids, _ in protected_gates(layout, "volume"):
            gates.log_alpha[ids[0]] = 3.0
    images, plan, folded = (
        contrasting(2, *ARCHITECTURES[name].small_shape),
        layout.plan(gates.opened()),
        copy.deepcopy(network),
    )
    fold(folded, gated)
    with torch.no_grad():
        answer = gated.eval()(images)
        assert relative_difference(answer, slice_network(folded, plan)(images)) < 1e-9
        assert relative_difference(answer, masked_outputs(folded, plan, images)) < 1e-9


def test_most_of_the_cost_is_prunable(pair: tuple[str, nn.Module, Network]) -> None:
    name, _, network = pair
    layout, full = GateLayout(network), count(network)
    for metric in ("volume", "flops", "params"):
        assert GateCost(layout, metric).full == full.of(metric)
    # narrow networks on small images: the share is larger at full size (docs/any_cnn.md)
    assert 1 - smallest_cost(layout, "flops") / full.flops >= PRUNABLE[ARCHITECTURES[name].kind]
    plan = random_plan(layout, "flops", full.flops / 4, seed=0)
    assert 0 < count(network, plan).flops <= full.flops / 4


def test_widths_are_multiples() -> None:
    torch.manual_seed(0)
    architecture = ARCHITECTURES["resnext50_32x4d"]
    network = trace(architecture.build(0.25), torch.zeros(2, *architecture.small_shape))
    layout, full = GateLayout(network, keep=("*.shortcut.*", "features.1.0.*=16"), round_to=8), count(network)
    scores = torch.rand(layout.size, generator=torch.Generator().manual_seed(0))
    plan, forced = project(layout, scores, torch.ones(layout.size, dtype=torch.bool), "flops", full.flops / 3)
    assert forced and count(network, plan).flops <= full.flops / 3
    for name, ids in plan.kept.items():
        assert len(ids) % 8 == 0 or len(ids) == layout.offsets[name][1], name
        assert len(ids) >= 16 or not name.startswith("features.1.0."), name
        assert "shortcut" not in name
    # as many in every group of a grouped convolution: nothing is filled with zeros
    sliced = slice_network(network, plan)
    grouped = [m for m in sliced.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert grouped and sum(m.out_channels for m in grouped) == sum(
        len(ids) for name, ids in plan.kept.items() if layout.groups.get(name) and name.endswith("body.1.0")
    )
