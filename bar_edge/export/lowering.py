"""How mixed additions run: from MixedAdd leaves to operators that a runtime has.

paper: the stream at the width of its union, gather before every reader, scatter-add after every writer.
slices: the stream holds only live channels; Slice, Add and Concat. zero-filled: writers are filled with
zero filters until each covers the stream so far, then slices. regular: every tensor of the stream at the
width of the union, plain additions.
"""

from __future__ import annotations

import copy
from typing import Literal, get_args

import torch
from torch import fx

from bar_edge.errors import InputError
from bar_edge.export.widen import filled_placements, regular_form, select, stream_placements, widen
from bar_edge.network import Expand, MixedAdd, Network
from bar_edge.network.channels import operands, passages
from bar_edge.network.codec import attach
from bar_edge.network.movement import MOVEMENTS
from bar_edge.surgery.order import is_identity
from bar_edge_kernels import gather, scatter_add

aten = torch.ops.aten
Lowering = Literal["paper", "slices", "zero-filled", "regular"]
LOWERINGS: tuple[Lowering, ...] = get_args(Lowering)


def lower(network: Network, form: Lowering) -> Network:
    """Return an equal network without MixedAdd and Expand leaves, for inference in a runtime.

    Raises InputError for an unknown form.
    """
    network = copy.deepcopy(network)
    if form == "regular":
        network = regular_form(network)
    elif form == "zero-filled":
        network = widen(network, filled_placements(network, passages(network)))
    elif form not in LOWERINGS:
        raise InputError(f"a lowering: {', '.join(LOWERINGS)}", got=repr(form), remedy="choose one of these")
    return _Lowerer(network, literal=form == "paper").run()


class _Lowerer:
    def __init__(self, network: Network, literal: bool) -> None:
        self.network, self.literal = network, literal
        self.found = passages(network)
        self.places = stream_placements(network, self.found) if literal else {}
        self.root, self.graph = network.body, fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.whole: dict[fx.Node, fx.Node] = {}  # streams at the width of their union, for `paper`

    def run(self) -> Network:
        for node in self.network.nodes:
            module, passage = self.network.module_of(node), self.found.get(node)
            source = passage.links[0].source if passage is not None and passage.links else None
            if isinstance(module, MixedAdd):
                if self.literal:
                    self._paper(node)
                else:
                    self.made[node] = self._slices(module, *(self._live(n) for n in operands(node)))
            elif isinstance(module, Expand):
                self.made[node] = self._expand(module, self._live(node.all_input_nodes[0]))
            elif source in self.whole and passage is not None and is_identity(passage) and node.op == "call_function":
                alone = node.all_input_nodes == [source] and node.target not in MOVEMENTS
                if not passage.keeps_zero or not alone or passage.axis != 1:
                    self.made[node] = self.graph.node_copy(node, self._live)
                else:  # an activation on the stream, idempotent on what was not written
                    self.whole[node] = self.graph.node_copy(node, lambda n: self.whole[n])
            else:
                self.made[node] = self.graph.node_copy(node, self._live)
        body = fx.GraphModule(self.root, self.graph)
        body.graph.eliminate_dead_code()
        body.recompile()
        return Network(body, self.network.input_shapes, self.network.out_spec).eval()

    def _live(self, node: fx.Node) -> fx.Node:
        """Return a tensor with its live channels only; gathers them from a whole stream on first use."""
        if node not in self.made:
            self.made[node] = self.graph.call_function(
                gather, (self.whole[node], self._index(self.places[node].positions))
            )
        return self.made[node]

    def _index(self, positions: tuple[int, ...]) -> fx.Node:
        name = f"index_{len(self.graph.nodes)}"
        attach(self.root, name, torch.tensor(positions, dtype=torch.int64))
        return self.graph.get_attr(name)

    def _paper(self, node: fx.Node) -> None:
        a, b = operands(node)
        if node not in self.places:  # a stream that stays at its own width: scattered here alone
            module = self.network.module_of(node)
            assert isinstance(module, MixedAdd)
            first = self._scattered(self._live(a), 1, module.width, module.positions_a)
            index = self._index(module.positions_b)
            self.made[node] = self.graph.call_function(scatter_add, (first, index, self._live(b)))
            return
        if a not in self.whole:
            place = self.places[a]
            self.whole[a] = self._scattered(self.made[a], 1, place.width, place.positions)
        index = self._index(self.places[b].positions)
        self.whole[node] = self.graph.call_function(scatter_add, (self.whole[a], index, self._live(b)))

    def _scattered(self, x: fx.Node, axis: int, width: int, positions: tuple[int, ...]) -> fx.Node:
        """Append zeros, then put the channels in place, without asking for the shape of x."""
        rank = len(self.network.shapes[next(n.name for n, m in self.made.items() if m is x)])
        after = [0, 0] * (rank - 1 - axis)
        if positions == tuple(range(len(positions))):
            return self.graph.call_function(aten.constant_pad_nd.default, (x, [*after, 0, width - len(positions)]))
        padded = self.graph.call_function(aten.constant_pad_nd.default, (x, [*after, 0, 1]))
        origin = {place: i for i, place in enumerate(positions)}
        return select(self.graph, self.root, padded, axis, tuple(origin.get(i, len(positions)) for i in range(width)))

    def _expand(self, module: Expand, x: fx.Node) -> fx.Node:
        return self._scattered(x, module.axis, module.width, module.positions)

    def _slices(self, module: MixedAdd, a: fx.Node, b: fx.Node) -> fx.Node:
        a, positions_a = self._sorted(a, module.positions_a)
        b, positions_b = self._sorted(b, module.positions_b)
        in_a, in_b = set(positions_a), set(positions_b)
        parts, start = [], 0
        done_a = done_b = 0
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
            parts.append(pieces[0] if len(pieces) == 1 else self.graph.call_function(aten.add.Tensor, tuple(pieces)))
            start = end
        return parts[0] if len(parts) == 1 else self.graph.call_function(aten.cat.default, (parts, 1))

    def _sorted(self, x: fx.Node, positions: tuple[int, ...]) -> tuple[fx.Node, tuple[int, ...]]:
        order = sorted(range(len(positions)), key=positions.__getitem__)
        if order == list(range(len(order))):
            return x, positions
        return select(self.graph, self.root, x, 1, tuple(order)), tuple(sorted(positions))

    def _slice(self, x: fx.Node, start: int, end: int, width: int) -> fx.Node:
        return x if (start, end) == (0, width) else self.graph.call_function(aten.slice.Tensor, (x, 1, start, end))
