"""Rules of functions of one tensor that work on each of its channels alone."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from bar_edge.network.channels.passage import Passage, Passages, Rule, identity, is_whole, only_source, operators, whole
from bar_edge.network.network import Network

aten = torch.ops.aten
REDUCTIONS = {*operators("mean.dim sum.dim_IntList amax amin var.dim var.correction std.dim std.correction")}


def same_axis(keeps_zero: bool) -> Rule:
    """Rule of an operator on one tensor that works on each channel alone and keeps the channel axis."""

    def rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
        source = only_source(node, found)
        if source is None or is_whole(found[source]):
            return None if source is None else whole(network, node)
        axis, width = found[source].axis, found[source].width
        shape = network.shapes[node.name]
        if len(shape) != len(network.shapes[source.name]) or shape[axis] != width:
            return None
        return identity(source, found, axis, keeps_zero)

    return rule


def first_axis(keeps_zero: bool) -> Rule:
    """Rule of an operator that works on each index of axis 1 alone: pooling, per-channel modules."""

    def rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
        source = only_source(node, found)
        if source is None or (found[source].axis != 1 and not is_whole(found[source])):
            return None
        return same_axis(keeps_zero)(network, node, found)

    return rule


def reduced_axes(node: fx.Node, rank: int) -> set[int]:
    """Return the axes over which a reduction goes, all of them if it names none."""
    dims = node.args[1] if len(node.args) > 1 else None
    dims = (dims,) if isinstance(dims, int) else dims
    return {int(d) % rank for d in dims} if isinstance(dims, list | tuple) and dims else set(range(rank))


def reduce(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of a mean, sum or maximum over axes without channels."""
    source = only_source(node, found)
    if source is None or len(node.args) < 2 or not node.args[1] and node.args[1] != 0:
        return None
    rank, axis = len(network.shapes[source.name]), found[source].axis
    gone = reduced_axes(node, rank)
    if is_whole(found[source]):
        return whole(network, node)
    if axis in gone or 0 in gone:
        return None
    keepdim = len(network.shapes[node.name]) == rank
    return identity(source, found, axis if keepdim else axis - sum(d < axis for d in gone), True)


def first_of_two(rule: Rule) -> Rule:
    """Rule of an operator that returns values and indices, of which only the values are read."""

    def first(network: Network, node: fx.Node, found: Passages) -> Passage | None:
        values = all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
        return rule(network, node, found) if values else None

    return first


def over_positions(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of an operator along one axis without channels (softmax, cumsum): of each channel alone, f(0) != 0."""
    source, dim = only_source(node, found), node.args[1]
    if source is None or not isinstance(dim, int):
        return None
    if dim % len(network.shapes[source.name]) in (0, found[source].axis) and not is_whole(found[source]):
        return None
    return same_axis(False)(network, node, found)


def pad(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of padding: not along the channels."""
    source, widths = only_source(node, found), node.args[1]
    mode = node.args[2] if node.target is aten.pad.default and len(node.args) > 2 else "constant"
    value = node.args[-1] if len(node.args) == (4 if node.target is aten.pad.default else 3) else 0
    if source is None or not isinstance(widths, list | tuple):
        return None
    after = 2 * (len(network.shapes[source.name]) - 1 - found[source].axis)
    if any(widths[after : after + 2]):  # channels are moved
        return whole(network, node) if is_whole(found[source]) else None
    return same_axis(mode != "constant" or not value)(network, node, found)


def hardtanh(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of bounds on both sides, of which one may be absent."""
    bounds: list[Any] = [-1, 1] if node.target is aten.hardtanh.default else [None, None]
    bounds[: len(node.args) - 1] = node.args[1:]
    low, high = bounds
    holds_zero = (low is None or low <= 0) and (high is None or high >= 0)
    return same_axis(bool(holds_zero))(network, node, found)


def bounded(low: bool) -> Rule:
    """Rule of a bound on one side, a number."""

    def rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
        bound = node.args[1]
        assert isinstance(bound, int | float)
        return same_axis(bound <= 0 if low else bound >= 0)(network, node, found)

    return rule


def threshold(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of x where it is above a threshold, else of a value."""
    limit, value = node.args[1:3]
    assert isinstance(limit, int | float) and isinstance(value, int | float)
    return same_axis(limit < 0 or value == 0)(network, node, found)


def power(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of a power that is a number."""
    exponent = node.args[1]
    assert isinstance(exponent, int | float)
    return same_axis(exponent > 0)(network, node, found)


def filled(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of a tensor of one number in the shape of another."""
    zero = node.target is aten.zeros_like.default or (node.target is aten.full_like.default and node.args[1] == 0)
    return same_axis(bool(zero))(network, node, found)
