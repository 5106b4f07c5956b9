"""All that must be known of every type of module: one of which a part is missing is refused here.

Parts: build (the trace makes it), settings (a file holds it), passage (channels pass through it), cut (slicing equals
masking), count (its parameters, before and after), price (a latency table has a place for it), widen (a lowering
equals it), pack (blocks of pixels go through it as channels, or are not made where it stands).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bar_edge.lowering.lower import lower
from bar_edge.lowering.packing import pack, packable
from bar_edge.network import Network, count, trace
from bar_edge.network.channels import LEAVES
from bar_edge.network.graph_json import MODULES
from bar_edge.network.priced_operations import largest_widths
from bar_edge.records import ChannelPlan
from bar_edge.records.lowering import Lowering
from bar_edge.surgery import slice_network
from tests.meaning import masked_answer
from tests.network.random_networks.proof import enliven
from tests.reference import contrasting, difference

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ChannelsLast(nn.Module):
    """A module on tensors with their channels last."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)


#: of every type: how many axes of space, and a module of it from 8 channels to 8
EXAMPLES: dict[type[nn.Module], tuple[int, Callable[[], nn.Module]]] = {
    nn.Conv1d: (1, lambda: nn.Conv1d(8, 8, 3)),
    nn.Conv2d: (2, lambda: nn.Conv2d(8, 8, 3, groups=8)),
    nn.Conv3d: (3, lambda: nn.Conv3d(8, 8, 2, groups=2)),
    nn.ConvTranspose1d: (1, lambda: nn.ConvTranspose1d(8, 8, 3, 2)),
    nn.ConvTranspose2d: (2, lambda: nn.ConvTranspose2d(8, 8, 2, 2, groups=8)),
    nn.ConvTranspose3d: (3, lambda: nn.ConvTranspose3d(8, 8, 2, groups=2)),
    nn.BatchNorm1d: (1, lambda: nn.BatchNorm1d(8)),
    nn.BatchNorm2d: (2, lambda: nn.BatchNorm2d(8)),
    nn.BatchNorm3d: (3, lambda: nn.BatchNorm3d(8)),
    nn.InstanceNorm1d: (1, lambda: nn.InstanceNorm1d(8, affine=True)),
    nn.InstanceNorm2d: (2, lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    nn.InstanceNorm3d: (3, lambda: nn.InstanceNorm3d(8)),
    nn.Linear: (2, lambda: ChannelsLast(nn.Linear(8, 8))),
    nn.PReLU: (2, lambda: nn.PReLU(8)),
    nn.GroupNorm: (2, lambda: nn.GroupNorm(2, 8)),
    nn.LayerNorm: (2, lambda: ChannelsLast(nn.LayerNorm(8))),
    nn.Dropout: (2, nn.Dropout),
    nn.Dropout1d: (1, nn.Dropout1d),
    nn.Dropout2d: (2, nn.Dropout2d),
    nn.Dropout3d: (3, nn.Dropout3d),
}
#: those of images of two axes that take blocks of pixels as channels
PACKED = {nn.Conv2d, nn.BatchNorm2d, nn.Dropout}


def test_every_type_of_a_network_file_has_an_example() -> None:
    assert set(EXAMPLES) == set(MODULES) - set(LEAVES)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_part_of_a_module_is_known(kind: type[nn.Module], tmp_path: Path) -> None:
    dims, example = EXAMPLES[kind]
    conv = CONVOLUTIONS[dims]
    module = nn.Sequential(conv(3, 8, 1), example(), nn.ReLU(), conv(8, 4, 1)).double()
    enliven(module, seed=3).eval()
    images = contrasting(2, 3, *(4,) * dims)
    network = trace(module, images)
    (node,) = [n for n in network.nodes if type(network.module_of(n)) is kind and str(n.target)[0] not in "03"]
    assert network.channels[node].kind != "opaque"
    network.save(tmp_path / "n")
    assert torch.equal(Network.load(tmp_path / "n").double().eval()(images), network(images))
    assert count(network).params == sum(p.numel() for p in module.parameters())
    assert largest_widths(network)
    plan = ChannelPlan(network=network.fingerprint, kept={"0": (1, 2, 5)})
    sliced = slice_network(network, plan)
    assert difference(masked_answer(module, plan.kept, images), sliced(images)) < 1e-12  # 1e-16 per layer
    assert count(sliced) == count(network, plan) and count(sliced).params < count(network).params
    assert difference(sliced(images), lower(sliced, Lowering.parse("regular:4"))(images)) < 1e-12


@pytest.mark.parametrize("kind", [kind for kind, (dims, _) in EXAMPLES.items() if dims == 2])
def test_packing_is_known(kind: type[nn.Module]) -> None:
    inner = nn.Conv2d(8, 8, 3, padding=1) if kind is nn.Conv2d else EXAMPLES[kind][1]()
    module = nn.Sequential(nn.Conv2d(3, 8, 1), inner, nn.ReLU(), nn.Conv2d(8, 4, 2, 2)).double()
    enliven(module, seed=3).eval()
    images, blocks = contrasting(2, 3, 4, 4), {(4, 4): (2, 2)}
    network = trace(module, images)
    (node,) = [n for n in network.nodes if type(network.module_of(n)) is kind and str(n.target)[0] not in "03"]
    assert (node in packable(network, blocks)) == (kind in PACKED)
    assert difference(network(images), pack(copy.deepcopy(network), blocks)(images)) < 1e-12
