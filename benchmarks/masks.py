"""Random masks of uneven popularity, for measuring mixed connectivity; fixed before anything was optimised for them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from bar_edge.methods import GateLayout
from bar_edge.methods.gating.projection import project
from bar_edge.network import Network, count
from bar_edge.records import ChannelPlan
from bar_edge.surgery.stream_order import streams

#: network -> input shape, factors of the volume, seeds; wrn-28-12 carries the claims
CELLS: dict[str, tuple[tuple[int, ...], tuple[int, ...], range]] = {
    "wrn-28-12": ((3, 32, 32), (8, 16), range(20)),
    "wrn-16-4": ((3, 32, 32), (2, 4, 8, 16), range(3)),
    "resnet56": ((3, 32, 32), (2, 4, 8, 16), range(3)),
    "resnet50": ((3, 128, 128), (2, 4, 8, 16), range(3)),
    "mobilenetv2": ((3, 32, 32), (2, 4, 8, 16), range(3)),
}
#: standard deviation of the logarithm of a layer's keep ratio
UNEVENNESS = 0.4


def uneven_plan(network: Network, factor: float, seed: int) -> ChannelPlan:
    """Return a plan of 1/factor of the volume.

    Channels of a residual stream are popular or not with all that write it; layers keep different shares.
    """
    layout, generator = GateLayout(network), torch.Generator().manual_seed(seed)
    stream, popularity = streams(layout.found), dict[fx.Node, Tensor]()
    scores = []
    for name, (_, n) in layout.offsets.items():
        root = stream[layout.node(name)]
        shared = popularity.setdefault(root, torch.randn(n, generator=generator))
        rank = torch.argsort(torch.argsort(torch.randn(n, generator=generator) + shared))
        weight = torch.exp(UNEVENNESS * torch.randn((), generator=generator))
        scores.append(
            -(n - rank - 0.5) / n / weight
        )  # the best of a layer first, in layers of great weight more of them
    everything = torch.ones(layout.size, dtype=torch.bool)
    return project(layout, torch.cat(scores), everything, "volume", count(network).volume / factor)[0]
