"""Which layers can be pruned, and what keeps the others from it."""

from __future__ import annotations

import torch
from torch import fx, nn

from bar_edge.network.channels import READERS, attribute
from bar_edge.network.network import Network


def prunable(network: Network) -> dict[str, str]:
    """Return every convolution and linear layer with the reason why its outputs cannot be pruned, "" if they can."""
    found = network.channels
    fixed, reasons, shared = _reaching_output(network), dict[str, str](), _read_elsewhere(network)
    for node, passage in found.items():
        if not isinstance(network.module_of(node), READERS):
            continue
        name = str(node.target)
        if passage.kind == "map":
            mixes = isinstance(network.module_of(node), nn.Linear)
            reason = f"{'mixes positions' if mixes else 'depthwise'}: follows its input"
        elif passage.kind != "read":
            reason = "its input has no channels along the axis that it reads"
        elif name in shared:
            reason = "its weights are also read elsewhere"
        elif node in fixed:
            reason = "its channels are the network's output"
        else:
            reason = "scales channels: follows them" if scaled_by(network, node) is not None else ""
        reasons[name] = reasons.get(name) or reason
    return reasons


def _read_elsewhere(network: Network) -> set[str]:
    """Return the modules one of whose parameters the graph reads by itself, or another module has too."""
    readers: dict[int, set[str]] = {}
    for node in network.nodes:
        if node.op == "get_attr":
            readers.setdefault(id(attribute(network, node)), set()).add(node.name)
        for parameter in module_parameters(network, node):
            readers.setdefault(id(parameter), set()).add(str(node.target))
    return {name for names in readers.values() if len(names) > 1 for name in names}


def _reaching_output(network: Network) -> set[fx.Node]:
    """Return all tensors whose channels reach an output of the network without another layer between."""
    found = network.channels
    fixed: set[fx.Node] = set()
    pending = [node for output in network.nodes if output.op == "output" for node in output.all_input_nodes]
    while pending:
        node = pending.pop()
        if node not in fixed:
            fixed.add(node)
            stops = isinstance(network.module_of(node), READERS) and found[node].kind != "map"
            passed = [link.source for link in found[node].links] if node in found else []
            pending += [] if stops else passed or ([] if node.op == "placeholder" else node.all_input_nodes)
    return fixed


def scaled_by(network: Network, node: fx.Node) -> fx.Node | None:
    """Return the product in which the channels of a layer scale those of a larger tensor, if they do nothing else."""
    found = network.channels
    products = set[fx.Node]()
    pending = [(user, _elements(network, node)) for user in node.users]
    while pending:
        user, least = pending.pop()
        passage = found.get(user)
        if passage is None or passage.width != found[node].width:
            return None
        if passage.kind == "mul" and len(passage.links) == 2:
            if least >= _elements(network, user):
                return None
            products.add(user)
        elif _passes_on(network, node, user):
            pending += [(later, min(least, _elements(network, user))) for later in user.users]
        else:
            return None
    return products.pop() if len(products) == 1 else None


def _passes_on(network: Network, node: fx.Node, user: fx.Node) -> bool:
    """Tell whether what an operator makes of a layer's channels is them alone, or a sum of as few elements."""
    found = network.channels
    passage, sources = found[user], [n for n in user.all_input_nodes if n in found]
    if passage.kind == "add":
        return all(_elements(network, n) <= _elements(network, node) for n in (*sources, user))
    return passage.kind in ("map", "pick", "spread") and len(sources) == 1


def _elements(network: Network, node: fx.Node) -> int:
    return torch.Size(network.shapes[node.name]).numel()


def module_parameters(network: Network, node: fx.Node) -> list[nn.Parameter]:
    """Return the parameters of the module that a node calls."""
    module = network.module_of(node)
    return list(module.parameters()) if module is not None else []
