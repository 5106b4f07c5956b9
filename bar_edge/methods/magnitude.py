"""Weight magnitude: filters with the smallest weights go.

L1 within a layer is WM of Lemaire et al. 2019 (supplement 3.2), and Li et al. 2017 with one ratio for all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bar_edge.methods.filters import filters
from bar_edge.methods.method import Context, Scored
from bar_edge.network import Network


def score(dense: Network, context: Context) -> Scored:
    """Return the dense network as it is, and scores by the size of its filters."""
    options = context.config.magnitude
    sizes = [size(filters(dense.body.get_submodule(name)), options.norm) for name in context.layout.offsets]
    if options.scope == "layer":
        sizes = [ranks(own) for own in sizes]
    return Scored(network=dense, scores=torch.cat([own.cpu() for own in sizes]))


def size(rows: Tensor, norm: str) -> Tensor:
    """Return how large filters are (n,), per weight, so that layers can be compared; rows: (n, weights).

    norm: "l1", the mean of the absolute weights, or "l2", the root of the mean of their squares.
    """
    return rows.abs().mean(1) if norm == "l1" else rows.square().mean(1).sqrt()


def ranks(scores: Tensor) -> Tensor:
    """Return ranks (n,), evenly spaced in (0, 1), the lowest score first: all layers then shrink by one ratio."""
    return (torch.argsort(torch.argsort(scores, stable=True), stable=True) + 0.5) / len(scores)
