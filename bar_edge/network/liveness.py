"""Which channels are really there: a plan, closed over dead readers and dead writers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from bar_edge.network.channels import Passage, Passages, called_again, is_whole, reads
from bar_edge.network.network import Network

Held = dict[fx.Node, Tensor]


def held_channels(network: Network, kept: Mapping[str, Sequence[int]]) -> Held:
    """Return for every tensor the mask (width,) of dense channels that the sliced network computes.

    kept: layer name -> output channels whose gate is open (absent name: all). A layer without live inputs
    has no live outputs; what nobody reads is not computed. One pass forward and one backward close the
    plan, because a reader reads every live channel of its input.
    """
    found = network.channels
    live: Held = {}
    for node, passage in found.items():
        if is_whole(passage):
            mask = torch.ones(passage.width, dtype=torch.bool)
        elif passage.kind == "read":
            ids = kept.get(str(node.target))
            mask = torch.ones(passage.width, dtype=torch.bool)
            if ids is not None:
                mask = torch.zeros_like(mask).index_fill(0, torch.tensor(ids, dtype=torch.int64), True)
            mask &= fed(live, found, node).repeat_interleave(passage.width // passage.groups)
        else:
            mask = _through(passage, live)
        live[node] = mask
    return _needed(network, live)


def fed(live: Held, found: Passages, node: fx.Node) -> Tensor:
    """Return which groups (groups,) of a reader have a live input."""
    source, groups = node.all_input_nodes[0], found[node].groups
    if is_whole(found[source]):
        return torch.ones(groups, dtype=torch.bool)
    return live[source].view(groups, -1).any(1)


def _through(passage: Passage, live: Held) -> Tensor:
    """Return the channels that exist in one of the inputs, or, of a product, in all of them."""
    parts = []
    for link in passage.links:
        mask = torch.zeros(passage.width, dtype=torch.bool)
        parts.append(mask.index_put((link.outputs,), live[link.source][link.inputs], accumulate=True))
    stacked = torch.stack(parts)
    return stacked.all(0) if passage.kind == "mul" else stacked.any(0)


def _needed(network: Network, live: Held) -> Held:
    """Return the live channels that anything reads; of a module that is called again, those of all its calls."""
    again, together = called_again(network), dict[str, Tensor]()
    while True:
        held = _read_backwards(network, live, together)
        union = {
            name: torch.stack([held[call] for call in held if call.op == "call_module" and call.target == name]).any(0)
            for name in again & {str(node.target) for node in held if node.op == "call_module"}
        }
        if all(name in together and torch.equal(mask, together[name]) for name, mask in union.items()):
            return held
        together = union


def _read_backwards(network: Network, live: Held, together: dict[str, Tensor]) -> Held:
    """together: channels by the name of a module of which more than this call's own readers may read."""
    found = network.channels
    needed = {node: torch.zeros(passage.width, dtype=torch.bool) for node, passage in found.items()}
    running = set[fx.Node]()
    for node in reversed(network.nodes):
        passage = found.get(node)
        if passage is None:  # the output, or an operator on something without channels
            if node.op != "output" and not running & node.users.keys():
                continue
        else:
            if node.op == "call_module" and needed[node].any():
                needed[node] |= together.get(str(node.target), needed[node])
            if not (live[node] & needed[node]).any():
                continue
        running.add(node)
        if passage is None or is_whole(passage):
            for source in reads(node):
                if source in needed:
                    needed[source][:] = True
            continue
        if passage.kind == "norm":
            needed[node][:] = True
        alive = live[node] & needed[node]
        if passage.kind == "read":
            source = node.all_input_nodes[0]
            if is_whole(found[source]):
                needed[source][:] = True
            else:
                fed_groups = alive.view(passage.groups, -1).any(1)
                needed[source] |= fed_groups.repeat_interleave(found[source].width // passage.groups)
        for source in node.all_input_nodes:  # a factor that is there as a whole
            if source in needed and is_whole(found[source]):
                needed[source][:] = True
        for link in passage.links:
            wanted = alive[link.outputs] if passage.kind != "norm" else torch.ones_like(link.outputs, dtype=torch.bool)
            needed[link.source] |= torch.zeros_like(needed[link.source]).index_put(
                (link.inputs,), wanted, accumulate=True
            )
    return {node: live[node] & needed[node] for node in found}
