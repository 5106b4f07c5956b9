"""Where the channels of every tensor go in each form: which zeros are filled in so that a runtime is faster."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, fx, nn

from bar_edge.network import MixedAdd, Network
from bar_edge.network.channels import Passage, called_again, is_depthwise
from bar_edge.network.movement import MOVEMENTS, SHAPELESS
from bar_edge.records.lowering import Form, Rounding
from bar_edge.surgery.stream_order import Stream, is_identity, joined_streams

#: multiplications in the time of copying one value: INT8 and bf16 in OpenVINO (docs/mixed_connectivity.md)
PAD = 200


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor's channels go in its wider form: channel i becomes channel positions[i] of `width`."""

    width: int
    positions: tuple[int, ...]
    #: for a tensor of a stream: which channel of the stream each of the `width` is
    slots: tuple[int, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether nothing changes."""
        return self.positions == tuple(range(self.width))


def residual_streams(network: Network) -> list[Stream]:
    """Return the streams in which something is added, in graph order.

    Not those that a module called twice, or a tensor added to itself, takes part in.
    """
    found = network.channels
    again = called_again(network)

    def plain(node: fx.Node) -> bool:
        links = found[node].links  # a tensor added to itself has two places for each channel
        return str(node.target) not in again and len({link.source for link in links}) == len(links)

    joined = [stream for stream in joined_streams(found) if any(found[n].kind == "add" for n in stream.channels)]
    return [stream for stream in joined if all(map(plain, stream.channels))]


def stream_placements(network: Network, stream: Stream, form: Form) -> dict[fx.Node, Placement]:
    """Return the placements of a stream's tensors in a form.

    None for a stream that passes through something that cannot be made wider as it would have to be
    (a grouped convolution, a norm over channels) before its last addition: it stays as it is. What comes
    of such an operator after that stays alone.
    """
    if form.kind not in ("regular", "zero-filled") and form.filled == (1, 1):
        return {}
    # zeros in advance need more tensors that can hold them
    grown = _placed(network, stream, form, grow=True) if form.kind == "zero-filled" else {}
    return grown or _placed(network, stream, form, grow=False)


def rounded_placements(
    network: Network, taken: dict[fx.Node, Placement], rounding: dict[fx.Node, Rounding]
) -> dict[fx.Node, Placement]:
    """Return placements that fill the widths of all other tensors up to multiples of their rounding.

    Of a convolution's output, and what per-channel operators make of it, if only layers read it in the end.
    """
    found = network.channels
    again = called_again(network)
    wanted: set[fx.Node] = set()
    for node in reversed(network.nodes):
        passage = found.get(node)
        if passage is None or node in taken or not node.users or str(node.target) in again:
            continue
        readers = (user in found and (user in wanted or _reads(network, found[user], user)) for user in node.users)
        if (passage.kind == "read" or is_identity(passage)) and can_widen(network, passage, node) and all(readers):
            wanted.add(node)
    places: dict[fx.Node, Placement] = {}
    for node in network.nodes:
        passage = found.get(node)
        if node in wanted and passage is not None and (passage.kind == "read" or passage.links[0].source in places):
            places[node] = Placement(_up(passage.width, rounding[node]), tuple(range(passage.width)))
    return places


def can_widen(network: Network, passage: Passage, node: fx.Node) -> bool:
    """Tell whether a tensor may hold more channels, zeros: if a layer, a sum or an operator on each alone makes it."""
    module = network.module_of(node)
    if passage.kind == "read":
        return plain_reader(passage, module)
    if passage.kind == "add":
        return plain_sum(network, passage, node)
    if module is not None:
        return isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout) or is_depthwise(module)
    moved = node.target in MOVEMENTS - SHAPELESS or any(n in network.constants for n in node.all_input_nodes)
    return passage.kind == "map" and is_identity(passage) and passage.keeps_zero and not moved


def plain_reader(passage: Passage, module: nn.Module | None) -> bool:
    """Tell whether a layer reads all of its input for each of its outputs."""
    return passage.groups == 1 and isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def plain_sum(network: Network, passage: Passage, node: fx.Node) -> bool:
    """Tell whether a node adds two tensors of one shape, or of different channels, along the second axis."""
    if isinstance(network.module_of(node), MixedAdd):
        return True
    shapes = {network.shapes[source.name] for source in node.all_input_nodes if source.name in network.shapes}
    plain = node.target is torch.ops.aten.add.Tensor and not node.kwargs
    return plain and len(passage.links) == 2 and passage.axis == 1 and len(shapes) == 1


# ------------------------------------------------------------------------------------------ inside


def _reads(network: Network, passage: Passage, node: fx.Node) -> bool:
    """Tell whether a layer reads all of a tensor, which may then hold zeros."""
    return passage.kind == "read" and plain_reader(passage, network.module_of(node))


def _placed(network: Network, stream: Stream, form: Form, *, grow: bool) -> dict[fx.Node, Placement]:
    """Return the placements of a stream's tensors, none if one of them that is added cannot be made wider."""
    found = network.channels
    places = {}
    for node, slots in _slots(network, stream, form, grow=grow).items():
        index = {slot: i for i, slot in enumerate(slots)}
        places[node] = Placement(len(slots), tuple(index[c] for c in stream.channels[node]), tuple(slots))
    stays: set[fx.Node] = set()
    for node, place in places.items():
        sources = {link.source for link in found[node].links}
        if not (place.is_whole or can_widen(network, found[node], node)) or sources & stays:
            stays.add(node)
    if any(found[node].kind == "add" for node in stays) or not all(is_identity(found[node]) for node in stays):
        return {}
    return {node: place for node, place in places.items() if node not in stays}


def _slots(network: Network, stream: Stream, form: Form, *, grow: bool) -> dict[fx.Node, list[int]]:
    """Return for every tensor of a stream which of the stream's channels it holds in a form, zeros among them.

    grow: whether the stream holds zeros in advance where that costs less than growing.
    """
    found = network.channels
    r = form.filled
    if form.kind == "regular":
        return dict.fromkeys(stream.channels, list(range(_up(stream.width, r))))
    writer: dict[fx.Node, fx.Node] = {}
    for node in stream.channels:
        source = found[node].links[0].source if is_identity(found[node]) else None
        writer[node] = writer.get(source, node) if source is not None else node
    # in first-write order the stream is a prefix: it grows to the next multiple at once, zeros in advance
    sums = [n for n, c in stream.channels.items() if found[n].kind == "add" and set(c) == set(range(len(c)))]
    widths = {node: _up(len(stream.channels[node]), r) for node in sums}
    if grow:
        widths = _grown(network, writer, widths)
    slots: dict[fx.Node, list[int]] = {}

    def own(node: fx.Node, missing: set[int]) -> list[int]:
        channels = set(stream.channels[node])
        if form.kind == "blocks":
            n = max(r)
            return [block * n + i for block in sorted({c // n for c in channels}) for i in range(n)]
        return _filled(channels | missing, r)

    for node in (node for node in stream.channels if found[node].kind == "add"):
        first, second = (writer[link.source] for link in found[node].links)
        so_far = range(widths.get(node, 0))
        if first not in slots:
            whole = (grow or form.kind == "pointwise") and node in widths and can_widen(network, found[first], first)
            slots[first] = list(so_far) if whole else own(first, set())
        if form.kind == "zero-filled" and node in widths:
            slots.setdefault(second, list(so_far))
        elif second not in slots:
            missing = set() if form.kind in ("pointwise", "deferred") else set(so_far) - set(slots[first])
            slots[second] = own(second, missing)
        slots[node] = sorted({*slots[first], *slots[second], *so_far})
    return {node: slots.get(writer[node]) or own(writer[node], set()) for node in stream.channels}


def _grown(network: Network, writer: dict[fx.Node, fx.Node], widths: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """Return the widths of a stream's sums, some of them larger, so that it grows where that costs least.

    In multiplications, by dynamic programming over every chain of sums: those of the layers that write and read the
    stream there, and PAD for every value that is copied where it grows.
    """
    found = network.channels
    first_sum: dict[fx.Node, fx.Node] = {}  # of every tensor that is added: where its width is decided
    chains: list[list[fx.Node]] = []
    for node in widths:
        sources = {writer[link.source] for link in found[node].links}
        if chains and chains[-1][-1] in sources:
            chains[-1].append(node)
        else:
            chains.append([node])
        first_sum |= {source: node for source in sources if source not in first_sum} | {node: node}
    costs = dict.fromkeys(widths, 0)  # per channel
    for node, root in writer.items():
        if root in first_sum:
            readers = [user for user in node.users if user in found and _reads(network, found[user], user)]
            costs[first_sum[root]] += sum(_multiplications(network, reader, 1) for reader in readers)
            if node is root and found[root].kind == "read" and can_widen(network, found[root], root):
                costs[first_sum[root]] += _multiplications(network, root, 0)
    grown: dict[fx.Node, int] = {}
    for chain in chains:
        best: list[tuple[float, list[int]]] = [(0, [])]
        for end in range(1, len(chain) + 1):
            width, ways = max(widths[node] for node in chain[:end]), []
            for start in range(end):
                copied = PAD * _pixels(network, chain[start]) if start else 0
                cost = best[start][0] + width * (sum(costs[node] for node in chain[start:end]) + copied)
                ways.append((cost, [*best[start][1], *[width] * (end - start)]))
            best.append(min(ways))
        grown |= dict(zip(chain, best[-1][1], strict=True))
    return grown


def _multiplications(network: Network, node: fx.Node, axis: int) -> int:
    """Return a layer's multiplications per channel of its output (axis 0) or input (1)."""
    module = network.module_of(node)
    assert module is not None and isinstance(module.weight, Tensor)
    return module.weight.select(axis, 0).numel() * _pixels(network, node)


def _pixels(network: Network, node: fx.Node) -> int:
    return math.prod(network.shapes[node.name][2:])


def _filled(channels: set[int], rounding: Rounding) -> list[int]:
    """Add channels up to what they are rounded to, those first that close the smallest gaps."""
    filled, missing = set(channels), _up(len(channels), rounding) - len(channels)
    while missing:
        there = sorted(filled)
        gaps = [(b - a - 1, a) for a, b in zip([-1, *there], there, strict=False) if b - a > 1]
        gap, before = min(gaps, default=(missing, there[-1]))
        chosen = range(before + 1, before + 1 + gap)[-missing:] if gaps else range(before + 1, before + 1 + missing)
        filled |= set(chosen)
        missing -= len(chosen)
    return sorted(filled)


def _up(width: int, rounding: Rounding) -> int:
    multiple = rounding[width >= rounding[1]]
    return -(-width // multiple) * multiple
