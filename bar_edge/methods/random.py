"""Random: the same share of every layer, channels drawn by the seed; the control that every method has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from bar_edge.methods.gating.layout import GateLayout
from bar_edge.methods.gating.projection import project
from bar_edge.methods.method import Context, Scored
from bar_edge.network import Network
from bar_edge.records import ChannelPlan, Metric


def score(dense: Network, context: Context) -> Scored:
    """Return the dense network as it is, and scores by which all layers shrink alike."""
    return Scored(network=dense, scores=random_scores(context.layout, context.config.seed))


def random_scores(layout: GateLayout, seed: int) -> Tensor:
    """Return scores (gates,): in every layer the same, evenly spaced in (0, 1), in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    ranks = [(torch.randperm(n, generator=generator) + 0.5) / n for _, n in layout.offsets.values()]
    return torch.cat(ranks)


def random_plan(layout: GateLayout, metric: Metric, limit: float, seed: int) -> ChannelPlan:
    """Return a plan with an equal keep ratio in every layer, channels drawn at random, within the limit."""
    everything = torch.ones(layout.size, dtype=torch.bool)
    return project(layout, random_scores(layout, seed), everything, metric, limit)[0]
