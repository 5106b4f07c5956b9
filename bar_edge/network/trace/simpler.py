"""Operators said more simply: pieces of a chunk as slices, shapes taken from other tensors, pixel shuffles by name."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from bar_edge.errors import InputError
from bar_edge.network.channels import numbers_from
from bar_edge.network.movement import COPIES, MOVEMENTS, numbered
from bar_edge.network.network import Network
from bar_edge.network.trace.refusals import arguments

aten = torch.ops.aten

#: operators that take a shape from another tensor, and those that are told it
AS: dict[object, Any] = {
    aten.view_as.default: aten.reshape.default,
    aten.reshape_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}
PIECES: set[object] = {
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.unbind.int,
    aten.unsafe_chunk.default,
    aten.unsafe_split.Tensor,
}


def piece(node: fx.Node) -> tuple[Any, ...] | None:
    """Return operator and arguments of one piece of a chunk, split or unbind: a slice or an index, None if no such."""
    if node.target is not operator.getitem:
        return None
    cut, which = node.args
    assert isinstance(cut, fx.Node) and isinstance(which, int)
    if cut.target not in PIECES:
        return None
    dim = int(arguments(cut)["dim"])
    if cut.target is aten.unbind.int:
        return aten.select.int, dim, which
    lengths = [value.shape[dim] for value in cut.meta["val"]]
    which %= len(lengths)
    if not all(isinstance(length, int) for length in lengths):
        raise InputError("a forward that splits no batch", got=str(cut.target), remedy="split along another axis")
    return aten.slice.Tensor, dim, sum(lengths[:which]), sum(lengths[: which + 1])


def is_whole_slice(node: fx.Node) -> bool:
    """Tell whether an operator is the slice of everything that x[:, i] makes of its first axis."""
    a = arguments(node) if node.target is aten.slice.Tensor else {}
    return bool(a) and a["start"] in (None, 0) and a["end"] in (None, 2**63 - 1) and a["step"] == 1


def is_flatten(node: fx.Node) -> bool:
    """Tell whether a view or reshape only merges all axes after the batch."""
    if node.target not in (aten.view.default, aten.reshape.default):
        return False
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    return (
        len(after) == 2 and len(before) > 2 and isinstance(after[0], torch.SymInt) and str(after[0]) == str(before[0])
    )


def name_pixel_shuffles(network: Network) -> bool:
    """Replace views and permutations that make a pixel shuffle by that one operator; tell whether there were any.

    Proven on the elements' numbers: the views of a space-to-depth in another order stay as they are.
    """
    replaced = False
    for node in network.nodes:
        shape, base = network.shapes.get(node.name, ()), _before_views(network, node)
        before = network.shapes[base.name] if base is not None else ()
        if base is None or len(shape) != 4 or len(before) != 4 or shape[0] != before[0]:
            continue
        up = shape[2] > before[2]
        factor = shape[2] // before[2] if up else before[2] // max(1, shape[2])
        operator_ = aten.pixel_shuffle.default if up else aten.pixel_unshuffle.default
        sizes = shape[1] * factor**2 == before[1] if up else before[1] * factor**2 == shape[1]
        if factor < 2 or not sizes or before[2:] == shape[2:]:
            continue
        if torch.equal(operator_(numbered(before), factor), numbers_from(network, base, node)):
            with network.body.graph.inserting_before(node):
                named = network.body.graph.call_function(operator_, (base, factor))
            named.meta |= node.meta
            node.replace_all_uses_with(named)
            replaced = True
    network.body.graph.eliminate_dead_code()
    network.body.recompile()
    return replaced


def _before_views(network: Network, node: fx.Node) -> fx.Node | None:
    """Return the tensor with four axes that a chain of views and permutations with more axes starts from."""
    while node.target in MOVEMENTS | COPIES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if len(network.shapes.get(node.name, ())) <= 4:
            return node if node.name in network.shapes and node.op != "get_attr" else None
    return None
