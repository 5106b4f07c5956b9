"""Which channels are really there: a plan, closed over dead readers and dead writers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from bar_edge.errors import InputError
from bar_edge.network.channels import Passages, passages
from bar_edge.network.network import Network
from bar_edge.records import ChannelPlan

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
    for node in reversed(network.nodes):
        passage = found.get(node)
        if passage is None:  # the output, or an operator on something without channels
            wanted = node.all_input_nodes
        elif not (live[node] & needed[node]).any():
            continue
        else:
            wanted = node.all_input_nodes if passage.kind in ("read", "opaque") else []
            for link in passage.links:
                needed[link.source][link.inputs] |= (live[node] & needed[node])[link.outputs]
        for source in wanted:
            if source in needed:
                needed[source][:] = True
    return {node: live[node] & needed[node] for node in found}


def check_plan(network: Network, plan: ChannelPlan) -> None:
    """Raise InputError unless the plan was made for this network."""
    if plan.network != network.fingerprint:
        raise InputError(
            f"a plan for network {network.fingerprint}",
            got=f"a plan for network {plan.network}",
            consequence="its channels would mean other channels",
            remedy="use the plan.json of the run that pruned this network, with the same --model and input shape",
        )
    found = {str(node.target): passage for node, passage in passages(network).items() if passage.kind == "read"}
    for name, ids in plan.kept.items():
        if name not in found or any(not 0 <= i < found[name].width for i in ids):
            raise InputError("a plan whose layers and channels exist", got=f"layer '{name}' in the plan")
