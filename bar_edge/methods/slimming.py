"""Network Slimming: BatchNorm scales are trained towards zero, and the channels with the smallest ones go.

Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming": loss + s * sum |gamma|, then one
threshold over all layers. A layer without a BatchNorm of its own behind it is ranked by the size of its filters, at the
quantiles of the scales.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bar_edge.methods.distillation import distillation_loss
from bar_edge.methods.filters import filters
from bar_edge.methods.gating.layout import GateLayout
from bar_edge.methods.magnitude import ranks, size
from bar_edge.methods.method import Context, Scored
from bar_edge.network import Network


def score(dense: Network, context: Context) -> Scored:
    """Train with the penalty on the scales; return the network, and |gamma| as scores."""
    network = copy.deepcopy(dense)
    pruner = SparseScales(network, context)
    context.train(network, pruner)
    return Scored(network=network, scores=scale_scores(network, context.layout))


class SparseScales:
    """Adds s * sum |gamma| to the loss, and the teacher where there is one."""

    def __init__(self, network: Network, context: Context) -> None:
        self.network, self.context = network, context
        self.scales = scales(network, context.layout)

    def weights(self) -> list[nn.Parameter]:
        """Return all weights: the scales are trained with them."""
        return [weight for weight in self.network.parameters() if weight.requires_grad]

    def loss(self, data_loss: Tensor, inputs: Tensor, outputs: Any, /) -> Tensor:
        """Return data term, distillation and penalty."""
        config, teacher = self.context.config, self.context.teacher
        if teacher is not None and config.distill.alpha:
            with torch.no_grad():
                soft = teacher(inputs)
            data_loss = distillation_loss(data_loss, outputs, soft, config.distill, self.context.soft_loss)
        penalty = sum((scale.abs().sum() for scale in self.scales.values()), torch.zeros((), device=inputs.device))
        return data_loss + config.slimming.strength * penalty

    def step(self) -> None:
        """Do nothing: the optimiser of the weights moves the scales."""

    def stats(self) -> dict[str, float]:
        """Return how large the scales are together."""
        return {"sparsity": float(sum(scale.detach().abs().sum() for scale in self.scales.values()))}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: all that is trained is the network's."""
        return {}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Do nothing."""


def scales(network: Network, layout: GateLayout) -> dict[str, Tensor]:
    """Return for each gated layer the scale (channels,) of the BatchNorm that its gates act on, if there is one."""
    found: dict[str, Tensor] = {}
    for name in layout.offsets:
        norms = [network.body.get_submodule(follower) for follower in layout.followers(name)]
        own = [norm.weight for norm in norms if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine]
        if own:
            found[name] = own[0]
    return found


def scale_scores(network: Network, layout: GateLayout) -> Tensor:
    """Return |gamma| of each gate (gates,); the quantile of the scales at the filter's rank where there is none."""
    known = {name: scale.detach().abs().float().cpu() for name, scale in scales(network, layout).items()}
    everything = torch.cat(list(known.values())) if known else torch.linspace(0, 1, 101)
    parts = []
    for name in layout.offsets:
        own = known.get(name)
        if own is None:
            rank = ranks(size(filters(network.body.get_submodule(name)).float().cpu(), "l2"))
            own = torch.quantile(everything, rank)
        parts.append(own)
    return torch.cat(parts)
