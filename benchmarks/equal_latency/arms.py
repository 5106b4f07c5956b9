"""Who takes part: how each arm cuts the dense network, and what it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from bar_edge.config import BarConfig
from bar_edge.methods import BAR, random_plan, smallest_cost
from bar_edge.methods.bar.closing import Closer
from bar_edge.network import Network
from bar_edge.records import ChannelPlan
from bar_edge.surgery import slice_network
from bar_edge.training import train
from benchmarks.equal_latency.bed import TASK, Bed
from benchmarks.equal_latency.torch_pruned import group_norm, torch_pruned

#: batches that give the first-order scores
SCORED = 100


@dataclasses.dataclass(frozen=True)
class Arm:
    """cut: the network to tune at a share of the dense network's cost. prunes: spends the pruning epochs on that."""

    cut: Callable[[Bed, float], Network]
    prunes: bool = False
    #: has new weights, trained for the dense network's epochs first
    new: bool = False

    def tuned(self, bed: Bed, network: Network) -> Network:
        """Return the network after all epochs that are left to it."""
        if self.new:
            dense = dataclasses.replace(bed.train, dense=bed.options.dense_epochs)
            train(network, bed.data, TASK, dense, "dense", seed=bed.seed)
        return bed.tuned(network, bed.options.epochs - (bed.options.prune if self.prunes else 0))


def ours(bed: Bed, share: float) -> Network:
    """Prune with the product's defaults."""
    sliced, _, _ = bed.run(share).pruned(bed.dense, bed.teacher)
    return sliced


def taylor(bed: Bed, share: float) -> Network:
    """Cut at once by first-order scores over the price, greedy, neighbours priced anew (what HALP does)."""
    plan_for = _scored(bed)
    least = smallest_cost(bed.layout, bed.by)
    return bed.matched(
        lambda less: slice_network(bed.dense, plan_for(max((1 - less) * bed.full, least))), share, 0.0, 1.0
    )


def _scored(bed: Bed) -> Callable[[float], ChannelPlan]:
    """Return what makes the greedy plan within a limit, by first-order scores of the dense network's channels."""
    closer, scores = Closer(bed.layout, bed.by), torch.zeros(bed.layout.size)
    pruner = BAR(bed.dense, budget="99%", steps=SCORED, config=BarConfig(), seed=bed.seed)
    gates = pruner.network.gates
    batches = bed.data.fit.batches(bed.batch, train=True, seed=bed.seed, epoch=0, device="cpu")
    for (images, targets), _ in zip(batches, range(SCORED), strict=False):
        TASK.loss(pruner.network(images), targets).backward()
        assert gates.log_alpha.grad is not None
        scores += gates.log_alpha.grad.square()
        gates.log_alpha.grad = None

    def plan_for(limit: float) -> ChannelPlan:
        opened = torch.ones(bed.layout.size, dtype=torch.bool)
        for closed, _ in closer.close(opened, scores, limit):
            opened[closed] = False
        return bed.layout.plan(opened)

    return plan_for


def random(bed: Bed, share: float) -> Network:
    """Cut random channels, an equal share of every layer."""
    volume = bed.layout.cost({}, "volume")
    least = smallest_cost(bed.layout, "volume")

    def make(closed: float) -> Network:
        limit = max((1 - closed) * volume, least)
        return slice_network(bed.dense, random_plan(bed.layout, "volume", limit, bed.seed))

    return bed.matched(make, share, 0.0, 1.0)


def scratch(bed: Bed, share: float) -> Network:
    """Make a narrow network of the same kind, all widths alike."""

    def make(narrower: float) -> Network:
        torch.manual_seed(bed.seed)
        return bed.traced(bed.module(1 - narrower))

    return bed.matched(make, share, 0.0, 0.95)


#: name -> arm; the first is what the others are matched to
ARMS = {
    "ours": Arm(ours, prunes=True),
    "taylor": Arm(taylor),
    "tp-l2": Arm(lambda bed, share: torch_pruned(bed, share, "tp-l2")),
    "tp-l2-global": Arm(lambda bed, share: torch_pruned(bed, share, "tp-l2-global")),
    "tp-l2-round8": Arm(lambda bed, share: torch_pruned(bed, share, "tp-l2-round8")),
    "tp-l2-round16": Arm(lambda bed, share: torch_pruned(bed, share, "tp-l2-round16")),
    "tp-groupnorm": Arm(group_norm, prunes=True),
    "scratch": Arm(scratch, new=True),
    "random": Arm(random),
}
