"""Tensors of a sliced network: which channels they hold in which order, and how to get others of them."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor, fx

from bar_edge.errors import InputError
from bar_edge.network import Expand, Network
from bar_edge.network.channels import (
    MAKERS,
    Passages,
    attribute,
    cut_parameters,
    is_whole,
    parameter_axis,
)
from bar_edge.network.liveness import Held
from bar_edge.network.movement import MOVEMENTS
from bar_edge.network.network import propagate_shapes
from bar_edge.network.rewriter import Rewriter
from bar_edge.surgery.cut_layers import copied

aten = torch.ops.aten


class SlicedTensors(Rewriter):
    """The tensors made so far; `order` is which dense channels each holds, in their new order."""

    def __init__(self, network: Network, held: Held) -> None:
        super().__init__(network)
        self.found: Passages = network.channels
        self.held = held
        self.order: dict[fx.Node, Tensor] = {}

    def laid_out(self, node: fx.Node, ids: Tensor) -> fx.Node:
        """Return the sliced tensor with these dense channels in this order, zeros for those that it does not hold."""
        order, axis = self.order[node], self.found[node].axis
        if torch.equal(order, ids):
            return self.made[node]
        place = {channel: i for i, channel in enumerate(order.tolist())}
        there = [i for i, channel in enumerate(ids.tolist()) if channel in place]
        if not there:
            lengths = [self.length(node, i) for i in range(len(self.network.shapes[node.name]))]
            lengths[axis] = len(ids)
            return self.graph.call_function(aten.new_zeros.default, (self._first_input(), lengths))
        wanted = ids.tolist()
        picked = torch.tensor([place[wanted[i]] for i in there])
        taken = self.select(self.made[node], axis, picked, len(order))
        if len(there) == len(ids):
            return taken
        return self.apply(self.free_name(f"expand_{node.name}"), Expand(axis, len(ids), tuple(there)), taken)

    def select(self, x: fx.Node, axis: int, places: Tensor, width: int | None = None) -> fx.Node:
        """Return some channels of a sliced tensor: itself, a slice or a gather."""
        first, n = int(places[0]), len(places)
        if torch.equal(places, torch.arange(first, first + n)):
            if n == width:
                return x
            return self.graph.call_function(aten.slice.Tensor, (x, axis, first, first + n))
        name = self.free_name("channels")
        self.attach(name, places.clone())
        return self.graph.call_function(aten.index_select.default, (x, axis, self.graph.get_attr(name)))

    def cut_back(self, node: fx.Node) -> None:
        """Drop channels that an operator had to make although the plan does not hold them."""
        order = self.order[node]
        keep = self.held[node][order]
        if not bool(keep.all()):
            self.made[node] = self.select(self.made[node], self.found[node].axis, keep.nonzero().flatten(), len(order))
            self.order[node] = order[keep]

    def parameter(self, node: fx.Node, constant: fx.Node, ids: Tensor) -> fx.Node:
        """Return a constant that an operator reads, cut to some channels of the operator's result."""
        if constant.name not in self.network.shapes:  # a size
            return self.full(constant)
        axis = parameter_axis(self.network, constant, node, self.found[node].axis)
        if axis is None or torch.equal(ids, torch.arange(self.found[node].width)):
            return self.full(constant)
        if constant not in self.network.constants or cut_parameters(self.network, constant, axis) is None:
            return self.select(self.full(constant), axis, ids)
        return self._cut(constant, axis, ids)

    def _cut(self, constant: fx.Node, axis: int, ids: Tensor) -> fx.Node:
        """Return a constant made of parameters that are cut: a moved one is stored as it is after it."""
        root = constant
        while root.target in MOVEMENTS:
            root = root.all_input_nodes[0]
        if root.op == "get_attr":
            value = attribute(self.network, constant)
            part = value.index_select(axis, ids.to(value.device))
            return self._attach_tensor(root, copied(attribute(self.network, root), part))
        sources = {}
        for source in constant.all_input_nodes:
            own = parameter_axis(self.network, source, constant, axis)
            sources[source] = self.full(source) if own is None else self._cut(source, own, ids)
        return self.graph.node_copy(constant, sources.__getitem__)

    def _attach_tensor(self, node: fx.Node, value: Tensor) -> fx.Node:
        """Give the new network a tensor that its graph reads by itself; under a new name if a module owns it too."""
        name, owner = str(node.target), str(node.target).rpartition(".")[0]
        called = any(n.op == "call_module" and n.target == owner for n in self.network.nodes)
        name = self.free_name(name.replace(".", "_")) if called else name
        self.attach(name, value)
        return self.graph.get_attr(name)

    def full(self, node: fx.Node) -> fx.Node:
        """Return the sliced tensor for an input of an operator without a rule, at full width."""
        if node in self.network.constants:
            if node.op != "get_attr":
                return self.copy_full(node)
            if node not in self.made:
                self.made[node] = self._attach_tensor(node, copied(attribute(self.network, node)))
            return self.made[node]
        if node not in self.found:
            if node.target is aten.sym_size.int and node.args[0] in self.found:  # whose tensor may be gone
                length = self.length(*node.args)  # type: ignore[arg-type]
                assert isinstance(length, fx.Node), "torch.export asks only for sizes that the batch changes"
                return length
            return self.made[node]
        passage = self.found[node]
        if passage.kind == "spread":
            return self.copy_full(node)
        if is_whole(passage) and len(self.order[node]):
            return self.made[node]
        return self.laid_out(node, torch.arange(passage.width))

    def copy_full(self, node: fx.Node) -> fx.Node:
        """Copy an operator with its inputs at full width; a maker of tensors takes only the type of its first one."""
        like = node.args[0] if node.target in MAKERS else None
        return self.graph.node_copy(node, lambda n: self._first_input() if n is like else self.full(n))

    def length(self, node: fx.Node, axis: int) -> int | fx.Node:
        """Return the length of an axis of a dense tensor: a number, or a multiple of the batch size."""
        if node.op == "placeholder" and axis == 0:
            return self._batch_size()
        two, three = self.network.shapes[node.name][axis], self._of_three[node.name][axis]
        if two == three:
            return two
        if two * 3 != three * 2:
            raise InputError(
                "a network whose tensors grow with the batch",
                got=f"'{node.name}' with {two} entries for 2 images and {three} for 3",
                remedy="keep the batch as an axis of its own",
            )
        n = self._batch_size()
        return n if two == 2 else self.graph.call_function(operator.mul, (n, two // 2))

    @functools.cached_property
    def _of_three(self) -> dict[str, tuple[int, ...]]:
        """The dense shapes for a batch of 3."""
        return propagate_shapes(self.network.body, self.network.input_shapes, 3)[0]

    def _first_input(self) -> fx.Node:
        first: fx.Node = next(node for node in self.graph.nodes if node.op == "placeholder")
        return first

    def _batch_size(self) -> fx.Node:
        return self.graph.call_function(aten.sym_size.int, (self._first_input(), 0))
