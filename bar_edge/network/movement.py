"""Operators that only move elements: where every channel goes is read off by moving numbers instead of values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

MOVEMENTS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.index_select.default,
    aten.expand.default,
    aten.repeat.default,
    aten.tile.default,
    aten.flip.default,
    aten.roll.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
}

#: movements that repeat elements
BROADCASTS = {aten.expand.default, aten.repeat.default, aten.tile.default}
#: movements of nothing
COPIES = {aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default}
#: movements whose arguments do not depend on the number of channels
SHAPELESS = {aten.flatten.using_ints, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
#: movements whose second argument is the shape of their result
RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default}


def numbered(shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of a shape that numbers its elements 0, 1, 2, ..."""
    return torch.arange(torch.Size(shape).numel()).view(shape)


def moved(node: fx.Node, numbers: Tensor, sizes: dict[str, Any], constants: dict[str, Tensor]) -> Tensor:
    """Return what a movement makes of numbers; sizes, constants: values of its other arguments by node name."""

    def value(argument: fx.Node) -> Any:
        if argument is node.args[0]:
            return numbers
        return constants[argument.name] if argument.name in constants else sizes[argument.name]

    result = node.target(*fx.map_arg(node.args, value), **fx.map_arg(dict(node.kwargs), value))  # type: ignore[operator]
    assert isinstance(result, Tensor)
    return result


def labels(numbers: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """Return of which channel (index along `axis` of a tensor of that shape) every numbered element is."""
    inner = torch.Size(shape[axis + 1 :]).numel()
    return (numbers // inner) % shape[axis]


def one_to_one(numbers: Tensor, shape: tuple[int, ...], axis: int, new_axis: int) -> Tensor | None:
    """Return the old channel of every new one, None if `new_axis` does not hold one old channel per index.

    numbers: the moved numbers of a tensor of `shape` with channels along `axis`. An axis that the batch
    is part of holds no channels.
    """
    rows = numbers.movedim(new_axis, 0).flatten(1)
    old = labels(rows, shape, axis)
    if not bool((old == old[:, :1]).all()):
        return None
    batch = rows // torch.Size(shape[1:]).numel()
    return None if bool((batch.amin(1) == batch.amax(1)).any()) else old[:, 0]


def many_to_one(numbers: Tensor, shape: tuple[int, ...], axis: int, new_axis: int) -> tuple[Tensor, Tensor] | None:
    """Return the pairs (old channel, new channel), None if two new channels share an old one."""
    old = labels(numbers.movedim(new_axis, 0).flatten(1), shape, axis)
    table = torch.zeros(shape[axis], len(old), dtype=torch.bool)
    table[old, torch.arange(len(old)).unsqueeze(1).expand_as(old)] = True
    inputs, outputs = table.nonzero(as_tuple=True)
    return None if bool((table.sum(1) > 1).any()) else (inputs, outputs)
