"""Operators that only move elements: where every channel goes is read off by moving numbers instead of values."""

from __future__ import annotations

from collections.abc import Iterator
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
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
    aten.numpy_T.default,
    aten.adjoint.default,
    aten.t.default,
    aten.mT.default,
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
    aten.index.Tensor,
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
#: movements that ask how their input lies in memory
VIEWS = {aten.view.default, aten._unsafe_view.default}
#: movements whose second argument is the shape of their result
RESHAPES = {*VIEWS, aten.reshape.default, aten.expand.default}


#: elements whose numbers are looked at together: what is held beside the numbers themselves stays small
CHUNK = 1 << 14


def numbered(shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of a shape that numbers its elements 0, 1, 2, ..., in 32 bits where they suffice."""
    n = torch.Size(shape).numel()
    return torch.arange(n, dtype=torch.int32 if n < 2**31 else torch.int64).view(shape)


def moved(node: fx.Node, numbers: Tensor, sizes: dict[str, Any], constants: dict[str, Tensor]) -> Tensor:
    """Return what a movement makes of numbers; sizes, constants: values of its other arguments by node name."""

    def value(argument: fx.Node) -> Any:
        if argument is node.args[0]:
            return numbers
        return constants[argument.name] if argument.name in constants else sizes[argument.name]

    result = node.target(*fx.map_arg(node.args, value), **fx.map_arg(dict(node.kwargs), value))  # type: ignore[operator]
    assert isinstance(result, Tensor)
    return result


def _rows(numbers: Tensor, axis: int) -> Iterator[Tensor]:
    """Yield the numbers at every index of an axis as rows, some indices at a time."""
    rows = numbers.movedim(axis, 0)
    step = max(1, CHUNK * len(rows) // max(1, numbers.numel()))
    return (rows[i : i + step].flatten(1) for i in range(0, len(rows), step))


def _labels(numbers: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """Return of which channel (index along `axis` of a tensor of that shape) every numbered element is."""
    inner = torch.Size(shape[axis + 1 :]).numel()
    return (numbers // inner) % shape[axis]


def one_to_one(numbers: Tensor, shape: tuple[int, ...], axis: int, new_axis: int) -> Tensor | None:
    """Return the old channel of every new one, None if `new_axis` does not hold one old channel per index.

    numbers: the moved numbers of a tensor of `shape` with channels along `axis`. An axis that the batch
    is part of holds no channels.
    """
    some = tuple(slice(None) if i == new_axis else slice(2) for i in range(numbers.ndim))
    corner = _labels(numbers[some].movedim(new_axis, 0).flatten(1), shape, axis)
    if bool((corner != corner[:, :1]).any()):  # most axes without channels fail here already
        return None
    image = torch.Size(shape[1:]).numel()
    for rows in _rows(numbers, new_axis):
        batch, found = rows // image, _labels(rows, shape, axis)
        if bool((found != found[:, :1]).any()) or bool((batch.amin(1) == batch.amax(1)).any()):
            return None
    return corner[:, 0].long()


def many_to_one(numbers: Tensor, shape: tuple[int, ...], axis: int, new_axis: int) -> tuple[Tensor, Tensor] | None:
    """Return the pairs (old channel, new channel), None if two new channels share an old one."""
    table = torch.cat(
        [
            torch.zeros(len(rows), shape[axis], dtype=torch.bool).scatter_(1, _labels(rows, shape, axis).long(), True)
            for rows in _rows(numbers, new_axis)
        ]
    )
    inputs, outputs = table.t().nonzero(as_tuple=True)
    return None if bool((table.sum(0) > 1).any()) else (inputs, outputs)
