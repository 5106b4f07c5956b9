"""Rules of what moves elements, cuts tensors up and joins them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from bar_edge.network.channels.constants import attribute
from bar_edge.network.channels.elementwise import REDUCTIONS, reduced_axes, same_axis
from bar_edge.network.channels.passage import Link, Passage, Passages, is_whole, whole
from bar_edge.network.movement import COPIES, MOVEMENTS, many_to_one, moved, numbered, one_to_one
from bar_edge.network.network import Network


def element_numbers(network: Network, node: fx.Node, numbers: Tensor) -> Tensor:
    """Return what a movement makes of the numbers of its input's elements."""
    constants = {n.name: attribute(network, n).cpu() for n in node.all_input_nodes if n in network.constants}
    return moved(node, numbers, network.sizes, constants)


def numbers_from(network: Network, base: fx.Node, node: fx.Node) -> Tensor:
    """Return what the movements between two nodes make of the numbers of the first one's elements."""
    if node is base:
        return numbered(network.shapes[base.name])
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return element_numbers(network, node, numbers_from(network, base, source))


def cat_rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of a concatenation, along the channels or beside them."""
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    assert isinstance(parts, list | tuple)
    axis = int(dim) % len(network.shapes[node.name])  # type: ignore[arg-type]
    sources = [part for part in parts if isinstance(part, fx.Node) and part in found]
    if len(sources) < len(parts) or any(found[part].kind == "spread" for part in sources):
        return None
    if all(is_whole(found[part]) for part in sources):
        return whole(network, node)
    if any(found[part].axis != axis for part in sources):
        return _join(network, node, found, sources, axis)
    links, offset = [], 0
    for part in sources:
        every = torch.arange(found[part].width)
        links.append(Link(part, every, every + offset))
        offset += found[part].width
    return Passage("map", axis, offset, tuple(links))


def _join(network: Network, node: fx.Node, found: Passages, parts: list[fx.Node], axis: int) -> Passage | None:
    """Join tensors along another axis than that of their channels: a channel exists if it does in one of them."""
    own = {(found[part].axis, found[part].width) for part in parts if not is_whole(found[part])}
    if len(own) != 1 or axis == 0 or (channels := own.pop())[0] == axis:
        return None
    if any(is_whole(found[part]) for part in parts):
        return whole(network, node)
    every = torch.arange(channels[1])
    return Passage("add", *channels, tuple(Link(part, every, every) for part in parts))


def movement_rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of all operators that only move elements: follow the elements' numbers.

    Where the channels are cut up (a shuffle by view and transpose) they are followed through the operators
    that move them on, until they lie along one axis again.
    """
    source = node.args[0]
    if not isinstance(source, fx.Node) or source not in found or not _known(network, node, source):
        return None
    if is_whole(found[source]):
        return whole(network, node)
    spread = found[source].kind == "spread"
    base = found[source].links[0].source if spread else source
    shape, axis = network.shapes[base.name], found[base].axis
    numbers = numbers_from(network, base, node)
    axes = sorted(range(1, numbers.ndim), key=lambda i: (i != axis, i != 1, i != numbers.ndim - 1))
    singles = [(i, old) for i in axes if (old := one_to_one(numbers, shape, axis, i)) is not None]
    moves_on = bool(node.users) and all(user.target in MOVEMENTS | COPIES for user in node.users)
    if shape[axis] == 1 and singles and not spread:
        singles, moves_on = _where_one_lies(network, node, shape, axis, singles)
    for new_axis, old in sorted(singles, key=lambda single: len(torch.unique(single[1])) == 1):
        same = new_axis == axis and numbers.ndim == len(shape)
        same = same and torch.equal(numbered(shape).index_select(axis, old), numbers)
        if same or not spread:
            link = Link(base, old, torch.arange(len(old)))
            return Passage("pick" if same else "map", new_axis, len(old), (link,))
    if moves_on:
        every = torch.arange(found[base].width)
        return Passage("spread", 1, found[base].width, (Link(base, every, every),))
    pairs = [(i, sets) for i in axes if (sets := many_to_one(numbers, shape, axis, i)) is not None]
    if not pairs or spread:
        return None
    summed = _reduced_later(network, node)  # over the parts of a split attention, or within groups
    lasting = [(i, sets) for i, sets in pairs if i not in summed and numbers.shape[i] > 1]
    new_axis, sets = (lasting if summed and lasting else pairs)[0]
    return Passage("map", new_axis, numbers.shape[new_axis], (Link(base, *sets),))


def _reduced_later(network: Network, node: fx.Node) -> set[int]:
    """Return the axes over which what comes of a tensor is reduced, as long as it has as many axes."""
    rank, axes = len(network.shapes[node.name]), set[int]()
    pending, seen = list(node.users), set[fx.Node]()
    while pending:
        user = pending.pop()
        if user.target in REDUCTIONS:
            axes |= reduced_axes(user, rank)
        elif user not in seen and user.op == "call_function" and len(network.shapes.get(user.name, ())) == rank:
            seen.add(user)
            pending += user.users
    return axes


def _where_one_lies(
    network: Network, node: fx.Node, shape: tuple[int, ...], axis: int, singles: list[tuple[int, Tensor]]
) -> tuple[list[tuple[int, Tensor]], bool]:
    """Return the axis of a single channel, which its numbers do not tell: as it would be if there were two.

    Where that cannot be asked (sizes as numbers), any axis of length 1, and whether to decide later.
    """
    doubled = (*shape[:axis], 2, *shape[axis + 1 :])
    try:
        numbers = element_numbers(network, node, numbered(doubled))
        told_of = numbers.ndim == len(network.shapes[node.name])
    except RuntimeError:
        told_of = False
    if not told_of:
        later = bool(node.users) and all(user.target in MOVEMENTS | COPIES for user in node.users)
        ones = [(i, old) for i, old in singles if len(old) == 1]
        return (ones, False) if ones else ([], True) if later else (singles, False)
    found = [(i, one_to_one(numbers, doubled, axis, i)) for i, _ in singles]
    told = [i for i, old in found if old is not None and len(torch.unique(old)) == 2]
    return [(i, old) for i, old in singles if i in told] or singles, False


def copied_rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of copies, which move nothing."""
    source = node.args[0]
    spread = isinstance(source, fx.Node) and source in found and found[source].kind == "spread"
    return (movement_rule if spread else same_axis(True))(network, node, found)


def _known(network: Network, node: fx.Node, source: fx.Node) -> bool:
    return all(n is source or n in network.constants or n.name in network.sizes for n in node.all_input_nodes)
