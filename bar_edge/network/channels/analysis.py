"""The passage of every tensor of a graph."""

from __future__ import annotations

from collections import Counter

from torch import fx

from bar_edge.network.channels.constants import made_nodes
from bar_edge.network.channels.passage import Passage, Passages, is_whole
from bar_edge.network.channels.table import RULES
from bar_edge.network.network import Network


def passages(network: Network) -> Passages:
    """Return the passage of every tensor of the graph, in graph order.

    A module that is called both on tensors that are there as a whole and on others has no rule.
    """
    again, refused = called_again(network), set[str]()
    while True:
        found = _passages(network, refused)
        calls = [(str(n.target), is_whole(p)) for n, p in found.items() if n.op == "call_module" and n.target in again]
        mixed = {name for name, whole in calls if whole and (name, False) in calls} - refused
        if not mixed:
            return found
        refused |= mixed


def _passages(network: Network, refused: set[str]) -> Passages:
    found, made = dict[fx.Node, Passage](), made_nodes(network)
    for node in network.nodes:
        shape = network.shapes.get(node.name)
        if node.op == "output" or node in network.constants or shape is None or len(shape) < 2:
            continue
        if node in made:
            found[node] = Passage("made", 1, shape[1])
            continue
        if node.op == "placeholder":
            found[node] = Passage("source", 1, shape[1])
            continue
        module = network.module_of(node)
        rule = RULES.get(type(module) if module is not None else node.target)
        known = all(source in found or source in network.constants for source in _tensors(network, node))
        known = known and not (node.op == "call_module" and str(node.target) in refused)
        found[node] = (rule(network, node, found) if rule and known else None) or Passage("opaque", 1, shape[1])
    return found


def called_again(network: Network) -> set[str]:
    """Return the names of modules that are called more than once."""
    calls = Counter(str(node.target) for node in network.nodes if node.op == "call_module")
    return {name for name, number in calls.items() if number > 1}


def _tensors(network: Network, node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source.name not in network.sizes]
