"""The order of a stream's channels: by first write, so that what a block reads is a prefix."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from bar_edge.network.channels import Passage, Passages
from bar_edge.network.liveness import Held


def is_identity(passage: Passage) -> bool:
    """Tell whether a tensor has its channels one by one from one input."""
    return (
        passage.kind in ("map", "norm")
        and len(passage.links) == 1
        and torch.equal(passage.links[0].inputs, passage.links[0].outputs)
    )


def joins(passage: Passage) -> bool:
    """Tell whether a tensor's channels are those of its inputs: sums, products, operators on each channel."""
    return passage.kind in ("add", "mul") or is_identity(passage)


def streams(found: Passages) -> dict[fx.Node, fx.Node]:
    """Map every tensor to the first tensor of its stream: those joined by additions and per-channel operators."""
    parent: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    for node, passage in found.items():
        parent[node] = node
        if joins(passage):
            for link in passage.links:
                if passage.kind != "mul" or found[link.source].width == passage.width:
                    a, b = root(link.source), root(node)
                    parent[b] = a
    return {node: root(node) for node in found}


def first_write_ranks(found: Passages, held: Held) -> dict[fx.Node, Tensor]:
    """Return for every tensor the rank (width,) of its channels in its stream: first write, then index.

    Channels that nobody wrote come last. All tensors of a stream share one tensor of ranks.
    """
    stream = streams(found)
    first: dict[fx.Node, Tensor] = {}
    for time, (node, passage) in enumerate(found.items()):
        if joins(passage) or found[stream[node]].width != passage.width:
            continue
        times = first.setdefault(stream[node], torch.full((passage.width,), len(found)))
        times[held[node] & (times == len(found))] = time
    ranks = {root: torch.argsort(torch.argsort(times, stable=True), stable=True) for root, times in first.items()}
    return {node: ranks[stream[node]] for node in found if stream[node] in ranks}
