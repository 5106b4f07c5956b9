"""What a graph makes of weights, numbers and the size of the batch alone."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from bar_edge.network.channels.passage import operators
from bar_edge.network.movement import COPIES, MOVEMENTS
from bar_edge.network.network import Network

#: what takes only type and device from its first argument
MAKERS = {*operators("new_zeros new_ones new_full new_empty")}
#: functions of constants whose every element comes of the elements at its place
ELEMENTWISE = {
    *operators(
        "exp sigmoid softplus relu tanh abs neg sqrt rsqrt reciprocal log square clamp clamp_min to.dtype _to_copy "
        "pow.Tensor_Scalar add.Tensor sub.Tensor mul.Tensor div.Tensor rsub.Scalar"
    ),
    *COPIES,
}


def reads(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values an operator reads."""
    first = node.args[0] if node.target in MAKERS else None
    return [n for n in node.all_input_nodes if n is not first]


def constant_nodes(network: Network) -> frozenset[fx.Node]:
    """Return the tensors that depend on parameters, buffers and numbers alone."""
    found: set[fx.Node] = set()
    for node in network.nodes:
        alike = node.op == "call_function" and node.name in network.shapes and not _is_drawn(node)
        if node.op == "get_attr" or (alike and found.issuperset(reads(node))):
            found.add(node)
    return frozenset(found)


def made_nodes(network: Network) -> frozenset[fx.Node]:
    """Return the tensors that depend on the size of the batch besides."""
    found: set[fx.Node] = set()
    for node in network.nodes:
        known = (n in network.constants or n in found or n.name in network.sizes for n in reads(node))
        if node.op == "call_function" and node.name in network.shapes and not _is_drawn(node) and all(known):
            found.add(node)
    return frozenset(found - network.constants)


def _is_drawn(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def attribute(network: Network, node: fx.Node) -> Tensor:
    """Return the value of a constant: the parameter or buffer itself, or what the graph makes of them."""
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(network.body)
    else:
        like = next(network.body.parameters(), torch.empty(0)).detach().new_empty(0)

        def argument(n: fx.Node) -> Any:
            return like if node.target in MAKERS and n is node.args[0] else attribute(network, n)

        value = node.target(*fx.map_arg(node.args, argument), **fx.map_arg(dict(node.kwargs), argument))  # type: ignore[operator]
    assert isinstance(value, Tensor)
    return value


def parameter_axis(network: Network, parameter: fx.Node, node: fx.Node, axis: int) -> int | None:
    """Return along which axis a tensor broadcast to a node's shape holds its channels, None if along none."""
    shape = network.shapes[parameter.name]
    own = axis - (len(network.shapes[node.name]) - len(shape))
    return own if own >= 0 and shape[own] > 1 else None


def cut_parameters(network: Network, node: fx.Node, axis: int) -> list[fx.Node] | None:
    """Return the parameters and buffers to cut so that a constant is cut along an axis, None if that is not enough.

    Enough where it is read once, and made of what is read once: moved without loss, or by functions of each element.
    """
    if len(node.users) > 1:
        return None
    if node.op == "get_attr":
        return [node]
    if node.target in MOVEMENTS:
        root = node.all_input_nodes[0]
        while root.target in MOVEMENTS and len(root.users) == 1 and len(root.all_input_nodes) == 1:
            root = root.all_input_nodes[0]
        numel = [torch.Size(network.shapes[n.name]).numel() for n in (root, node)]
        fits = root.op == "get_attr" and len(root.users) == 1 and len(node.all_input_nodes) == 1
        return [root] if fits and numel[0] == numel[1] else None
    if node.target not in ELEMENTWISE:
        return None
    found: list[fx.Node] = []
    for source in node.all_input_nodes:
        own = parameter_axis(network, source, node, axis)
        if own is not None:
            cut = cut_parameters(network, source, own)
            if cut is None:
                return None
            found += cut
    return found


def is_parameter(network: Network, node: fx.Node) -> bool:
    """Tell whether a node reads a parameter."""
    return node.op == "get_attr" and isinstance(attribute(network, node), nn.Parameter)
