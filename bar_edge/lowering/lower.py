"""How mixed additions run: from MixedAdd leaves to operators that a runtime has."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from bar_edge.lowering.packing import pack, packable
from bar_edge.lowering.placement import (
    Placement,
    plain_reader,
    plain_sum,
    residual_streams,
    rounded_placements,
    stream_placements,
)
from bar_edge.lowering.widen import select, widen
from bar_edge.network import Expand, MixedAdd, Network
from bar_edge.network.channels import called_again, operands, passages
from bar_edge.network.graph_json import attach
from bar_edge.network.movement import MOVEMENTS
from bar_edge.records.lowering import PLAIN, Form, Lowering, Packing, Rounding
from bar_edge.surgery.stream_order import Stream, is_identity
from bar_edge_kernels import gather, scatter_add

aten = torch.ops.aten
#: rank of a tensor -> what convolves it
CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
#: how many times a sum's channels it may be the sum of: a longer one is made before it is added to
LONGEST = 3
#: applied again they change nothing
IDEMPOTENT = {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default}


def lower(network: Network, lowering: Lowering) -> Network:
    """Return an equal network without MixedAdd and Expand leaves, for inference in a runtime.

    Raises InputError for a lowering of another number of streams.
    """
    if lowering == Lowering.paper:
        return _Lowerer(copy.deepcopy(network), []).run()
    network = folded(network)
    found = passages(network)
    streams = residual_streams(network, found)
    forms = list(lowering.each(len(streams)))
    sizes = _sizes(network, streams)
    packings = _packings(sizes, forms)
    while True:
        sized = zip(forms, sizes or [()], strict=True)  # without streams one form, of no size
        forms = [dataclasses.replace(form, packing=packings.get(size, PLAIN)) for form, size in sized]
        places: dict[fx.Node, Placement] = {}
        for stream, form in zip(streams, forms, strict=False):
            places |= stream_placements(network, found, stream, form)
        places |= rounded_placements(network, found, places, _roundings(network, streams, forms))
        lowered = _Lowerer(widen(network, places), forms).run()
        packed = {lowered.shapes[node.name][2:] for node in packable(lowered, packings)}
        if packed == packings.keys():
            return pack(lowered, packings)
        # widths of what cannot be packed are rounded as ever
        packings = {size: packing for size, packing in packings.items() if size in packed}


def stream_sizes(network: Network) -> list[tuple[int, ...]]:
    """Return the size of image of every residual stream, each of which may have a form of its own."""
    network = folded(network)
    return _sizes(network, residual_streams(network, passages(network)))


def folded(network: Network) -> Network:
    """Return a copy for inference in which every BatchNorm behind a convolution of its own is part of it."""
    network = copy.deepcopy(network).eval()
    body, again = network.body, called_again(network)
    for node in network.nodes:
        norm, source = network.module_of(node), node.all_input_nodes[0] if node.all_input_nodes else None
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or source is None or norm.running_mean is None:
            continue
        convolution = network.module_of(source)
        alone = len(source.users) == 1 and not {str(node.target), str(source.target)} & again
        if alone and isinstance(convolution, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            attach(body, str(source.target), nn.utils.fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(source)
            body.graph.erase_node(node)
    body.delete_all_unused_submodules()
    body.recompile()
    return Network(body, network.input_shapes, network.out_spec).eval()


def _roundings(network: Network, streams: list[Stream], forms: list[Form]) -> dict[fx.Node, Rounding]:
    """Return for every tensor the rounding of the stream that is added to next."""
    last = {max(stream.channels, key=network.nodes.index): i for i, stream in enumerate(streams)}
    roundings, current = {}, 0
    for node in network.nodes:
        roundings[node] = forms[min(current, len(forms) - 1)].filled
        current = max(current, last.get(node, -1) + 1)
    return roundings


def _sizes(network: Network, streams: list[Stream]) -> list[tuple[int, ...]]:
    return [network.shapes[next(iter(stream.channels)).name][2:] for stream in streams]


def _packings(sizes: list[tuple[int, ...]], forms: list[Form]) -> dict[tuple[int, ...], Packing]:
    """Return how the tensors of a size of image are packed: as the first stream of that size that is."""
    packings: dict[tuple[int, ...], Packing] = {}
    for size, form in zip(sizes, forms, strict=False):
        if len(size) == 2 and form.packing != PLAIN:
            packings.setdefault(size, form.packing)
    return packings


class _Lowerer:
    """Copies a graph; without forms, literally: the paper's gather and scatter-add."""

    def __init__(self, network: Network, forms: list[Form]) -> None:
        self.network, self.literal = network, not forms
        self.found, self.again = passages(network), called_again(network)
        streams = residual_streams(network, self.found)
        self.form = {node: form for stream, form in zip(streams, forms, strict=False) for node in stream.channels}
        self.runs = {
            node: runs
            for stream, form in zip(streams, forms, strict=False)
            if form.kind == "blocks"
            for node, runs in _runs(stream).items()
        }
        self.places = (
            {n: Placement(s.width, channels) for s in streams for n, channels in s.channels.items()}
            if self.literal
            else {}
        )
        self.root, self.graph = network.body, fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.whole: dict[fx.Node, fx.Node] = {}  # streams at the width of their union, for `paper`
        self.terms: dict[fx.Node, list[tuple[fx.Node, tuple[int, ...]]]] = {}  # sums that are not made: what, and where
        self.joined: dict[tuple[fx.Node, ...], fx.Node] = {}
        self.parts: dict[fx.Node, dict[int, fx.Node]] = {}  # tensors in runs of channels, by the run's first channel

    def run(self) -> Network:
        for node in self.network.nodes:
            module, passage = self.network.module_of(node), self.found.get(node)
            source = passage.links[0].source if passage is not None and passage.links else None
            each = passage is not None and is_identity(passage) and node.op == "call_function"
            alone = each and node.all_input_nodes == [source] and node.target not in MOVEMENTS
            keeps = alone and passage is not None and passage.keeps_zero and passage.axis == 1
            if node in self.runs and passage is not None and passage.kind == "add" and self._sums(node):
                self._add_parts(node)
            elif source in self.parts and keeps:
                self.parts[node] = {k: self._once(node, part) for k, part in self.parts[source].items()}
            elif node in self.runs and passage is not None and len(self.runs[node]) > 1 and self._splits(node):
                self._split(node)
            elif node in self.form and self.form[node].kind == "deferred" and self._defers(node):
                self._defer(node)
            elif source in self.terms and (norm := self._norm(node)) is not None:
                self.made[node] = self._summed(source, norm)
            elif isinstance(module, MixedAdd):
                self._mixed(node, module)
            elif isinstance(module, Expand):
                self.made[node] = self._expand(module, self._live(node.all_input_nodes[0]))
            elif source in self.whole and each:
                if keeps:  # an activation on the stream, idempotent on what was not written
                    self.whole[node] = self.graph.node_copy(node, lambda n: self.whole[n])
                else:
                    self.made[node] = self.graph.node_copy(node, self._live)
            else:
                self.made[node] = self.graph.node_copy(node, self._live)
        body = fx.GraphModule(self.root, self.graph)
        body.graph.eliminate_dead_code()
        body.delete_all_unused_submodules()
        body.recompile()
        return Network(body, self.network.input_shapes, self.network.out_spec).eval()

    def _live(self, node: fx.Node) -> fx.Node:
        """Return a tensor with its live channels; gathered from a whole stream, or joined from parts, on first use."""
        if node not in self.made:
            if node in self.terms:
                self.made[node] = self._summed(node)
            elif node in self.parts:
                parts = list(self.parts[node].values())
                joined = len(parts) > 1
                self.made[node] = self.graph.call_function(aten.cat.default, (parts, 1)) if joined else parts[0]
            else:
                index = self._index(self.places[node].positions)
                self.made[node] = self.graph.call_function(gather, (self.whole[node], index))
        return self.made[node]

    def _index(self, positions: tuple[int, ...]) -> fx.Node:
        name = f"index_{len(self.graph.nodes)}"
        attach(self.root, name, torch.tensor(positions, dtype=torch.int64))
        return self.graph.get_attr(name)

    # ------------------------------------------------------------------------------------ additions

    def _mixed(self, node: fx.Node, module: MixedAdd) -> None:
        if self.literal:
            self._paper(node, module)
            return
        a, b = (self._live(n) for n in operands(node))
        kind = self.form[node].kind if node in self.form else "slices"
        if kind == "slices" or set(module.positions_a) != set(range(len(module.positions_a))):
            self.made[node] = self._slices(node, module, a, b)
            return
        a, _ = self._sorted(a, module.positions_a)  # the stream so far, a prefix
        if kind == "pointwise" and len(self.network.shapes[node.name]) in CONVOLUTIONS:
            self.made[node] = self._pointwise(a, b, node, module)
            return
        x = self._padded(a, node, 0, module.width - len(module.positions_a))
        if kind == "pad":
            b, positions = self._sorted(b, module.positions_b)
            for start, end in _pieces(positions):
                part = self._slice(b, start, end, len(positions))
                wide = self._padded(part, node, positions[start], module.width - positions[end - 1] - 1)
                x = self.graph.call_function(aten.add.Tensor, (x, wide))
        elif kind == "scatter" or module.positions_b == tuple(range(module.width)):
            x = self._added(aten.index_add.default, x, b, module.positions_b, module.width)
        else:
            x = self.graph.call_function(aten.add.Tensor, (x, self._gathered(b, node, module)))
        self.made[node] = x

    def _paper(self, node: fx.Node, module: MixedAdd) -> None:
        a, b = operands(node)
        rank = len(self.network.shapes[node.name])
        if node not in self.places:  # a stream that stays at its own width: scattered here alone
            first = self._scattered(self._live(a), rank, 1, module.width, module.positions_a)
            self.made[node] = self._added(scatter_add, first, self._live(b), module.positions_b, module.width)
            return
        if a not in self.whole:
            place = self.places[a]
            self.whole[a] = self._scattered(self.made[a], rank, 1, place.width, place.positions)
        place = self.places[b]
        self.whole[node] = self._added(scatter_add, self.whole[a], self._live(b), place.positions, place.width)

    def _added(self, how: Any, x: fx.Node, b: fx.Node, positions: tuple[int, ...], width: int) -> fx.Node:
        """Add b to channels of x; plainly to all of them, for which torch's exporter (2.13) writes an assignment."""
        if positions == tuple(range(width)):
            return self.graph.call_function(aten.add.Tensor, (x, b))
        index = self._index(positions)
        return self.graph.call_function(how, (x, index, b) if how is scatter_add else (x, 1, index, b))

    def _padded(self, x: fx.Node, node: fx.Node, before: int, after: int) -> fx.Node:
        """Append zero channels on both sides, in a tensor of the rank of `node`."""
        if not before and not after:
            return x
        space = [0, 0] * (len(self.network.shapes[node.name]) - 2)
        return self.graph.call_function(aten.constant_pad_nd.default, (x, [*space, before, after]))

    def _scattered(self, x: fx.Node, rank: int, axis: int, width: int, positions: tuple[int, ...]) -> fx.Node:
        """Append zeros, then put the channels in place, without asking for the shape of x."""
        after = [0, 0] * (rank - 1 - axis)
        if positions == tuple(range(len(positions))):
            return self.graph.call_function(aten.constant_pad_nd.default, (x, [*after, 0, width - len(positions)]))
        padded = self.graph.call_function(aten.constant_pad_nd.default, (x, [*after, 0, 1]))
        origin = {place: i for i, place in enumerate(positions)}
        return select(self.graph, self.root, padded, axis, tuple(origin.get(i, len(positions)) for i in range(width)))

    def _gathered(self, b: fx.Node, node: fx.Node, module: MixedAdd) -> fx.Node:
        """Put a writer's channels in place by one Gather, zeros from a filter that is all zeros if there is one."""
        writer = self.network.module_of(operands(node)[1])
        zeros: list[int] = []
        if isinstance(writer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            rows = writer.weight.detach().flatten(1)
            rows = rows if writer.bias is None else torch.cat([rows, writer.bias.detach().unsqueeze(1)], 1)
            zeros = (rows == 0).all(1).nonzero().flatten().tolist()
        if not zeros:
            return self._scattered(b, len(self.network.shapes[node.name]), 1, module.width, module.positions_b)
        origin = {place: i for i, place in enumerate(module.positions_b)}
        index = tuple(origin.get(i, zeros[0]) for i in range(module.width))
        return select(self.graph, self.root, b, 1, index)

    def _pointwise(self, a: fx.Node, b: fx.Node, node: fx.Node, module: MixedAdd) -> fx.Node:
        """Put a writer's channels in place by a 1x1 convolution, to which runtimes add the stream; append the new.

        Where that costs no more the writer itself makes all channels of the stream, zeros among them.
        """
        source, n, before = operands(node)[1], len(module.positions_b), len(module.positions_a)
        writer = self.network.module_of(source)
        if writer is not None and self._splits(source) and _cost(writer) * (module.width - n) <= n * module.width:
            b = self._live(source.all_input_nodes[0])
        else:
            kind = CONVOLUTIONS[len(self.network.shapes[node.name])]
            writer = kind(n, n, 1, bias=False, dtype=next(self.network.body.parameters()).dtype)
            nn.init.dirac_(writer.weight)
        parts = []
        for name, first, end in (("old", 0, before), ("new", before, module.width)):
            origin = {place - first: i for i, place in enumerate(module.positions_b) if first <= place < end}
            if origin:
                attach(self.root, f"{node.name}_{name}", _rows(writer, [origin.get(i) for i in range(end - first)]))
                parts.append(self.graph.call_module(f"{node.name}_{name}", (b,)))
        x = a
        if any(place < before for place in module.positions_b):
            x = self.graph.call_function(aten.add.Tensor, (a, parts.pop(0)))
        return self.graph.call_function(aten.cat.default, ([x, *parts], 1)) if parts else x

    # ----------------------------------------------------------------------- sums made by what reads

    def _defer(self, node: fx.Node) -> None:
        """Note what a sum is the sum of, and where each channel of that goes; make those that grew too long."""
        module, every = self.network.module_of(node), tuple(range(self.found[node].width))
        positions = (module.positions_a, module.positions_b) if isinstance(module, MixedAdd) else (every, every)
        self.terms[node] = []
        for source, places in zip(operands(node), positions, strict=True):
            terms = self.terms.get(source, []) if source not in self.made else []
            if not terms or sum(len(own) for _, own in terms) > LONGEST * len(places):
                terms = [(self._live(source), tuple(range(len(places))))]
            self.terms[node] += [(x, tuple(places[i] for i in own)) for x, own in terms]

    def _summed(self, node: fx.Node, norm: nn.modules.batchnorm._BatchNorm | None = None) -> fx.Node:
        """Join what a sum is the sum of, and sum it by a convolution of 1x1, a BatchNorm behind it in it."""
        tensors = tuple(x for x, _ in self.terms[node])
        if tensors not in self.joined:
            before = self.joined.get(tensors[:-1])
            parts = list(tensors) if before is None else [before, tensors[-1]]
            self.joined[tensors] = self.graph.call_function(aten.cat.default, (parts, 1))
        places = torch.tensor([place for _, own in self.terms[node] for place in own])
        kind, dtype = CONVOLUTIONS[len(self.network.shapes[node.name])], next(self.network.body.parameters()).dtype
        summing = kind(len(places), self.found[node].width, 1, bias=False, dtype=dtype).eval()
        with torch.no_grad():
            summing.weight.zero_()[places, torch.arange(len(places))] = 1
        summing = summing if norm is None else nn.utils.fuse_conv_bn_eval(summing, norm)
        name = f"{node.name}_summed_{len(self.graph.nodes)}"
        attach(self.root, name, summing)
        return self.graph.call_module(name, (self.joined[tensors],))

    def _norm(self, node: fx.Node) -> nn.modules.batchnorm._BatchNorm | None:
        """Return a BatchNorm that can become part of the convolution before it."""
        norm = self.network.module_of(node)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or str(node.target) in self.again:
            return None
        return norm if norm.running_mean is not None else None

    def _defers(self, node: fx.Node) -> bool:
        passage = self.found[node]
        return passage.kind == "add" and self._sums(node) and len(self.network.shapes[node.name]) in CONVOLUTIONS

    def _expand(self, module: Expand, x: fx.Node) -> fx.Node:
        rank = len(self.network.shapes[next(n.name for n, m in self.made.items() if m is x)])
        return self._scattered(x, rank, module.axis, module.width, module.positions)

    def _slices(self, node: fx.Node, module: MixedAdd, a: fx.Node, b: fx.Node) -> fx.Node:
        a, positions_a = self._sorted(a, module.positions_a)
        b, positions_b = self._sorted(b, module.positions_b)
        in_a, in_b = set(positions_a), set(positions_b)
        parts: list[fx.Node] = []
        start = done_a = done_b = gap = 0  # gap: channels that neither has, zeros
        while start < module.width:
            kind, end = (start in in_a, start in in_b), start
            while end < module.width and (end in in_a, end in in_b) == kind:
                end += 1
            n, pieces = end - start, []
            if kind[0]:
                pieces.append(self._slice(a, done_a, done_a + n, len(positions_a)))
                done_a += n
            if kind[1]:
                pieces.append(self._slice(b, done_b, done_b + n, len(positions_b)))
                done_b += n
            if pieces:
                part = pieces[0] if len(pieces) == 1 else self.graph.call_function(aten.add.Tensor, tuple(pieces))
                parts.append(self._padded(part, node, gap, 0))
            gap, start = 0 if pieces else n, end
        parts[-1] = self._padded(parts[-1], node, 0, gap)
        return parts[0] if len(parts) == 1 else self.graph.call_function(aten.cat.default, (parts, 1))

    def _sorted(self, x: fx.Node, positions: tuple[int, ...]) -> tuple[fx.Node, tuple[int, ...]]:
        order = sorted(range(len(positions)), key=positions.__getitem__)
        if order == list(range(len(order))):
            return x, positions
        return select(self.graph, self.root, x, 1, tuple(order)), tuple(sorted(positions))

    def _slice(self, x: fx.Node, start: int, end: int, width: int) -> fx.Node:
        return x if (start, end) == (0, width) else self.graph.call_function(aten.slice.Tensor, (x, 1, start, end))

    # ------------------------------------------------------------------------ streams kept in parts

    def _add_parts(self, node: fx.Node) -> None:
        """Add two tensors run by run: a convolution makes a run, and the runtime adds what was there before."""
        a, b = (self._in_parts(source) for source in node.all_input_nodes)
        sums = {}
        for first, _, _ in self.runs[node]:
            pair = tuple(parts[first] for parts in (a, b) if first in parts)
            sums[first] = pair[0] if len(pair) == 1 else self.graph.call_function(aten.add.Tensor, pair)
        self.parts[node] = sums

    def _sums(self, node: fx.Node) -> bool:
        return plain_sum(self.network, self.found[node], node) and len(set(node.all_input_nodes)) == 2

    def _in_parts(self, node: fx.Node) -> dict[int, fx.Node]:
        if node not in self.parts:
            x, width = self._live(node), self.found[node].width
            self.parts[node] = {first: self._slice(x, start, end, width) for first, start, end in self.runs[node]}
        return self.parts[node]

    def _once(self, node: fx.Node, part: fx.Node) -> fx.Node:
        """Apply an operator on each channel to a part; not again where that would change nothing."""
        same = part.target == node.target and part.args[1:] == node.args[1:] and part.kwargs == node.kwargs
        if same and node.target in IDEMPOTENT:
            return part
        return self.graph.node_copy(node, lambda _: part)

    def _splits(self, node: fx.Node) -> bool:
        passage, module = self.found[node], self.network.module_of(node)
        convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and plain_reader(passage, module)
        return passage.kind == "read" and convolution and str(node.target) not in self.again

    def _split(self, node: fx.Node) -> None:
        """Make one convolution per run."""
        module, x = self.network.module_of(node), self._live(node.all_input_nodes[0])
        assert module is not None
        self.parts[node] = {}
        for first, start, end in self.runs[node]:
            name = f"{node.target}.run_{first}"
            attach(self.root, name.replace(".", "_"), _rows(module, range(start, end)))
            self.parts[node][first] = self.graph.call_module(name.replace(".", "_"), (x,))


def _runs(stream: Stream) -> dict[fx.Node, list[tuple[int, int, int]]]:
    """Cut a stream's channels into runs that every tensor holds as a whole and in one piece, or not at all.

    Returns for every tensor, in its own order: the run's first channel, and from where to where it lies.
    """
    cuts: set[int] = set()
    for channels in stream.channels.values():
        for start, end in _pieces(channels):
            cuts |= {channels[start], channels[end - 1] + 1}
    return {
        node: [
            (channels[start], start, end)
            for start, end in itertools.pairwise(
                [i for i, c in enumerate(channels) if c in cuts or not i or channels[i - 1] != c - 1] + [len(channels)]
            )
        ]
        for node, channels in stream.channels.items()
    }


def _pieces(positions: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return from where to where the positions go up in steps of one."""
    starts = [i for i, p in enumerate(positions) if not i or positions[i - 1] != p - 1]
    return list(itertools.pairwise([*starts, len(positions)]))


def _cost(convolution: nn.Module) -> int:
    """Return the multiplications per output of a convolution."""
    assert isinstance(convolution, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return convolution.weight[0].numel()


def _rows(module: nn.Module, rows: Sequence[int | None]) -> nn.Module:
    """Return a convolution that makes only some of a convolution's channels, zeros for None."""
    new = copy.deepcopy(module)
    assert isinstance(new, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    index = torch.tensor([-1 if row is None else row for row in rows])

    def taken(values: Tensor) -> nn.Parameter:
        return nn.Parameter(torch.cat([values, torch.zeros_like(values[:1])]).detach()[index])

    new.weight, new.out_channels = taken(new.weight), len(rows)
    if new.bias is not None:
        new.bias = taken(new.bias)
    return new
