"""Rules of sums, products and choices of tensors, constants among them."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import fx

from bar_edge.network.channels.elementwise import same_axis
from bar_edge.network.channels.passage import (
    Link,
    Passage,
    Passages,
    Rule,
    identity,
    is_whole,
    only_source,
    operators,
    whole,
)
from bar_edge.network.network import Network

aten = torch.ops.aten
POLES = set(operators("sqrt rsqrt reciprocal log log2 log10 pow.Tensor_Tensor"))
COMPARISONS = set(operators(" ".join(f"{name}.Scalar {name}.Tensor" for name in ("gt", "lt", "ge", "le", "eq", "ne"))))
#: choices whose condition comes second
FILLS = set(operators("masked_fill.Scalar masked_fill.Tensor"))


def carries(network: Network, node: fx.Node, found: Passages) -> bool:
    """Tell whether a tensor has channels of its own: neither a constant nor made of nothing but the batch's size."""
    return node in found and found[node].kind != "made"


def elementwise(kind: Literal["add", "any", "mul"]) -> Rule:
    """Rule of a sum, difference or product of two tensors, one of them maybe a parameter, broadcast or a number."""

    def rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
        a, b = node.args[:2]
        tensors = [x for x in (a, b) if isinstance(x, fx.Node) and carries(network, x, found)]
        constants = [x for x in (a, b) if isinstance(x, fx.Node) and not carries(network, x, found)]
        if any(found[x].kind == "spread" for x in tensors):
            return None
        if len(tensors) == 2:
            return _two_tensors(network, node, found, kind, *tensors)
        if len(tensors) == 1 and constants and kind != "mul" and is_whole(found[tensors[0]]):
            return whole(network, node)
        if len(tensors) == 1 and constants:
            return _with_parameter(network, node, found, kind, tensors[0], constants[0])
        if len(tensors) == 1 and tensors[0] is a and isinstance(b, int | float):
            return same_axis(kind == "mul" or (kind == "add" and b == 0))(network, node, found)
        return None

    return rule


def _two_tensors(
    network: Network, node: fx.Node, found: Passages, kind: Literal["add", "any", "mul"], a: fx.Node, b: fx.Node
) -> Passage | None:
    wide = [x for x in (a, b) if not is_whole(found[x])]
    if not wide or (kind != "mul" and len(wide) == 1):
        return whole(network, node)
    return _broadcast(network, node, found, kind, wide)


def _broadcast(
    network: Network, node: fx.Node, found: Passages, kind: Literal["add", "any", "mul"], wide: list[fx.Node]
) -> Passage | None:
    """Return the passage of what is made of several tensors broadcast, None where their channels do not meet."""
    rank = len(network.shapes[node.name])
    axes = {found[x].axis + rank - len(network.shapes[x.name]) for x in wide}
    axis = axes.pop()
    width = network.shapes[node.name][axis]
    if axes or axis < 1 or (kind != "mul" and any(found[x].width != width for x in wide)):
        return None
    if all(found[x].width != width for x in wide):  # a whole tensor is wider
        return None
    every = torch.arange(width)
    links = [Link(x, every if found[x].width == width else torch.zeros_like(every), every) for x in wide]
    return Passage(kind, axis, width, tuple(links))


def _with_parameter(
    network: Network, node: fx.Node, found: Passages, kind: Literal["add", "any", "mul"], x: fx.Node, parameter: fx.Node
) -> Passage | None:
    if network.shapes[node.name] != network.shapes[x.name]:
        return None
    if is_whole(found[x]):
        return whole(network, node)
    return identity(x, found, found[x].axis, kind == "mul")


def has_pole(network: Network, node: fx.Node) -> bool:
    """Tell whether an operator's value or slope at 0 is infinite: absent channels must not reach it as zeros."""
    if node.target is aten.pow.Tensor_Scalar:
        return float(node.args[1]) < 1  # type: ignore[arg-type]
    if node.target is aten.div.Tensor:
        return isinstance(node.args[1], fx.Node) and node.args[1] not in network.constants
    return node.target in POLES


def comparison(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of a comparison with a number, a constant or a tensor: absent channels are False."""
    passage = elementwise("any")(network, node, found)
    if passage is None or is_whole(passage):
        return passage
    other = node.args[1] if not isinstance(node.args[1], fx.Node) else None
    alike = other is None and all(carries(network, x, found) for x in node.all_input_nodes)
    known = alike or other is not None
    holds = not known or bool(node.target(torch.zeros(()), torch.zeros(()) if alike else other))  # type: ignore[operator]
    return dataclasses.replace(passage, keeps_zero=not holds)


def choice(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of a choice between tensors, constants and numbers by a condition: it exists if one of them does.

    A condition that is there as a whole decides nothing about that.
    """
    condition = node.args[1 if node.target in FILLS else 0]
    tensors = [x for x in node.all_input_nodes if carries(network, x, found)]
    if any(found[x].kind == "spread" for x in tensors):
        return None
    wide = [x for x in tensors if not is_whole(found[x])]
    if not wide or any(is_whole(found[x]) and x is not condition for x in tensors):
        return whole(network, node)
    passage = _broadcast(network, node, found, "any", wide)
    return dataclasses.replace(passage, keeps_zero=False) if passage is not None else None


def halves(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of the first half of an axis times the sigmoid of the second."""
    source, dim = only_source(node, found), node.args[1] if len(node.args) > 1 else -1
    if source is None or is_whole(found[source]):
        return None if source is None else whole(network, node)
    assert isinstance(dim, int)
    if dim % len(network.shapes[source.name]) != found[source].axis:
        return same_axis(True)(network, node, found)
    half = torch.arange(found[source].width // 2)
    links = (Link(source, half, half), Link(source, half + len(half), half))
    return Passage("mul", found[source].axis, len(half), links)


def power_of_parameter(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of a tensor to the power of a constant (generalised-mean pooling)."""
    base, exponent = node.args[:2]
    assert isinstance(base, fx.Node) and isinstance(exponent, fx.Node)
    if base not in found or carries(network, exponent, found) or network.shapes[node.name] != network.shapes[base.name]:
        return None
    return whole(network, node) if is_whole(found[base]) else identity(base, found, found[base].axis, False)
