"""Which channels are really there: a plan, closed over dead readers and dead writers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from bar_edge.network.channels import Passages, passages
from bar_edge.network.network import Network

Held = dict[fx.Node, Tensor]


def held_channels(network: Network, kept: Mapping[str, Sequence[int]], found: Passages | None = None) -> Held:
    """Return for every tensor the mask (width,) of dense channels that the sliced network computes.

    kept: convolution name -> output channels whose gate is open (absent name: all). A convolution
    without live inputs has no live outputs; what nobody reads is not computed. One pass forward and one
    backward close the plan, because a reader reads every live channel of its input.
    """
    found = passages(network) if found is None else found
    live: Held = {}
    for node, passage in found.items():
        mask = torch.zeros(passage.width, dtype=torch.bool)
        if passage.kind in ("source", "opaque"):
            mask[:] = True
        elif passage.kind == "read" and live[node.all_input_nodes[0]].any():
            ids = kept.get(str(node.target))
            mask[:] = True if ids is None else mask.index_fill(0, torch.tensor(ids, dtype=torch.int64), True)
        for link in passage.links:
            mask[link.outputs] |= live[link.source][link.inputs]
        live[node] = mask
    return _needed(network, found, live)


def _needed(network: Network, found: Passages, live: Held) -> Held:
    needed = {node: torch.zeros(passage.width, dtype=torch.bool) for node, passage in found.items()}
    running: set[fx.Node] = set()
    for node in reversed(network.nodes):
        passage = found.get(node)
        if passage is None:  # the output, or an operator on something without channels
            if node.op != "output" and not running & node.users.keys():
                continue
            wanted = node.all_input_nodes
        elif not (live[node] & needed[node]).any():
            continue
        else:
            wanted = node.all_input_nodes if passage.kind in ("read", "opaque") else []
            for link in passage.links:
                needed[link.source][link.inputs] |= (live[node] & needed[node])[link.outputs]
        running.add(node)
        for source in wanted:
            if source in needed:
                needed[source][:] = True
    return {node: live[node] & needed[node] for node in found}
