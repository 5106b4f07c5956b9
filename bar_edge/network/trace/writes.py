"""Writing in place, said without: what shares memory with a tensor that is written to is read anew from then on."""

from __future__ import annotations

import operator
from typing import Any, Protocol

import torch
from torch import fx

from bar_edge.errors import InputError
from bar_edge.network.trace.constants import memory, writes
from bar_edge.network.trace.refusals import arguments, is_free, source_line
from bar_edge.network.trace.simpler import PIECES, piece

aten = torch.ops.aten

_RESHAPES: set[object] = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view_as.default,
    aten.reshape_as.default,
}
_SAME: set[object] = {aten.detach.default, aten.alias.default, aten.contiguous.default, aten.lift_fresh_copy.default}
_FILLS: set[object] = {aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default, aten.copy_.default}


class Copier(Protocol):
    """What copies an exported graph operator by operator."""

    graph: fx.Graph
    nodes: dict[fx.Node, fx.Node]

    def node(self, node: fx.Node) -> fx.Node:
        """Return what a node of the exported graph is in the new one."""

    def call(self, node: fx.Node, target: Any) -> fx.Node:
        """Call in the new graph what a node of the exported one calls, with another operator."""

    def expanded(self, value: Any, like: fx.Node) -> fx.Node:
        """Return a number, or a tensor that broadcasts, in the shape of a node of the exported graph."""


class Writes:
    """Follows every tensor of an exported graph through the operators that write into it or into a piece of it."""

    def __init__(self, copier: Copier, graph: fx.Graph) -> None:
        self.copier = copier
        self.names: dict[fx.Node, fx.Node] = {}  # every name of a tensor -> its first one
        self.viewed: dict[fx.Node, fx.Node] = {}  # a view -> the tensor that it shows
        self.stale = set[fx.Node]()
        self.pieces = False  # whether a piece of a tensor was written to
        for node in graph.nodes:
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node):
                continue
            if node.target is operator.getitem and source.target in PIECES:
                source = source.args[0]
            if writes(node):
                self.names[node] = self.first(source)
            elif memory(node) is not None and memory(node) == memory(source):
                self.viewed[node] = self.first(source)

    def first(self, node: Any) -> fx.Node:
        """Return the first name of a tensor."""
        assert isinstance(node, fx.Node)
        return self.names.get(node, node)

    def write(self, node: fx.Node) -> None:
        """Give the tensor that `node` writes to, and all that shares its memory, the value that it then has.

        Raises InputError if that cannot be said by values.
        """
        target = self.first(node.args[0])
        value = self._written(node)
        fresh = {target}
        self.copier.nodes[target] = value
        while target in self.viewed:
            self.pieces = True
            whole = self.viewed[target]
            value = self._put_back(node, target, self.copier.node(whole), value)
            self.copier.nodes[whole] = value
            target = whole
            fresh.add(target)
        self.stale |= {view for view in self.viewed if self._root(view) is target} - fresh
        self.stale -= fresh

    def renew(self, node: fx.Node) -> None:
        """Read a view anew if what it shows was written to since."""
        if node in self.stale:
            self.stale.discard(node)
            self.copier.nodes[node] = self.copier.call(node, node.target)

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self.viewed:
            node = self.viewed[node]
        return node

    def _written(self, node: fx.Node) -> fx.Node:
        """Return what an operator writes: the value of its twin that writes nothing."""
        if node.target in _FILLS and self.first(node.args[0]) in self.viewed:
            a = arguments(node)
            return self.copier.expanded(a.get("src", a.get("value", 0)), node)
        return self.copier.call(node, out_of_place(node.target))

    def _put_back(self, node: fx.Node, view: fx.Node, whole: fx.Node, value: fx.Node) -> fx.Node:
        """Return a tensor in which what a view shows has another value."""
        graph, source = self.copier.graph, self.viewed[view]
        target, args = view.target, arguments(view) if isinstance(view.target, torch._ops.OpOverload) else {}
        if target is operator.getitem:
            cut = piece(view)
            assert cut is not None
            target, args = (
                cut[0],
                dict(zip(("dim", "index") if len(cut) == 3 else ("dim", "start", "end"), cut[1:], strict=True)),
            )
        shape = source.meta["val"].shape
        if target in _SAME:
            return value
        if target in (aten.slice.Tensor, aten.select.int):
            return self._joined(node, shape, whole, value, args)
        if target in _RESHAPES and not any(is_free(n) for n in shape[1:]):
            return graph.call_function(
                aten.reshape.default, (value, [-1 if is_free(shape[0]) else shape[0], *shape[1:]])
            )
        if target is aten.permute.default:
            dims = [int(d) % len(shape) for d in args["dims"]]
            return graph.call_function(aten.permute.default, (value, [dims.index(i) for i in range(len(dims))]))
        if target is aten.transpose.int:
            return graph.call_function(target, (value, args["dim0"], args["dim1"]))
        if target in (aten.t.default, aten.mT.default):
            return graph.call_function(target, (value,))
        raise _refused(node, view)

    def _joined(self, node: fx.Node, shape: Any, whole: fx.Node, value: fx.Node, cut: dict[str, Any]) -> fx.Node:
        """Return a tensor in which some indices of an axis are replaced: what is before, the new, what is behind."""
        graph, dim = self.copier.graph, int(cut["dim"]) % len(shape)
        size, step = shape[dim], cut.get("step", 1)
        everything = cut.get("start") in (None, 0) and (cut.get("end") is None or cut["end"] == 2**63 - 1)
        if "index" not in cut and everything and step == 1:
            return value
        if not isinstance(size, int):
            raise _refused(node, node.args[0])
        if "index" in cut:
            value = graph.call_function(aten.unsqueeze.default, (value, dim))
            cut = {"start": cut["index"] % size, "end": cut["index"] % size + 1}
        start, end, _ = slice(cut["start"], cut["end"]).indices(size)
        if step != 1:
            raise _refused(node, node.args[0])
        parts = [
            graph.call_function(aten.slice.Tensor, (whole, dim, a, b)) if (a, b) != (start, end) else value
            for a, b in ((0, start), (start, end), (end, size))
            if a < b
        ]
        return graph.call_function(aten.cat.default, (parts, dim)) if len(parts) > 1 else value


def _refused(node: fx.Node, seen: Any) -> InputError:
    return InputError(
        "a forward that writes in place into whole tensors, or slices of them",
        got=f"{node.target} at {source_line(node)}, into '{seen}'",
        consequence="the network cannot be read as a graph of values",
        remedy="write the result to a new tensor: y = relu(x[:, :2]) instead of x[:, :2].relu_()",
    )


def out_of_place(target: Any) -> Any:
    """Return the twin of an in-place operator that writes nothing: relu_ -> relu; raises InputError if it has none."""
    packet, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    twin = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
    if not packet.endswith("_") or twin is None:
        raise InputError("a network without operators that write into their input", got=str(target))
    return twin
