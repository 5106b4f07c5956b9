"""Surgery: from a network and a plan to the smaller network, in mixed-connectivity form."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from bar_edge.network import MixedAdd, Network
from bar_edge.network.channels import Link, attribute, called_again, element_numbers, is_whole
from bar_edge.network.liveness import Held, held_channels
from bar_edge.network.movement import MOVEMENTS, RESHAPES, VIEWS, numbered
from bar_edge.records import ChannelPlan
from bar_edge.surgery.check import check_plan
from bar_edge.surgery.cut_layers import even_groups, slice_alone, slice_norm, slice_reader, some
from bar_edge.surgery.sliced_tensors import SlicedTensors
from bar_edge.surgery.stream_order import first_write_ranks

aten = torch.ops.aten


def slice_network(network: Network, plan: ChannelPlan) -> Network:
    """Return a new network that computes only the channels that the plan leaves alive; the old one is unchanged.

    Its output equals that of the masked network: the dense one in which every absent channel is 0
    wherever it is read. Outputs and operators without a channel rule get full width, zeros filled in.
    Raises InputError if the plan belongs to another network.
    """
    check_plan(network, plan)
    return _Slicer(network, held_channels(network, plan.kept)).run()


class _Slicer(SlicedTensors):
    """Copies a graph node by node."""

    def __init__(self, network: Network, held: Held) -> None:
        super().__init__(network, held)
        self.ranks = first_write_ranks(self.found, held)
        self.again = called_again(network)

    def run(self) -> Network:
        for node in self.network.nodes:
            passage = self.found.get(node)
            if node.op == "placeholder":
                self.made[node] = self.graph.placeholder(str(node.target))
                self.order[node] = torch.arange(self.found[node].width)
            elif passage is not None and passage.kind == "spread":
                continue  # what comes of it is made from where it comes from
            elif passage is None or is_whole(passage):
                self._whole(node)
            elif not self.held[node].any():
                self.order[node] = torch.arange(0)
            elif passage.kind == "read":
                self._read(node)
            elif passage.kind == "norm":
                self._norm(node)
            elif passage.kind in ("add", "any", "mul"):
                self._combine(node)
            elif len(passage.links) > 1:
                self._cat(node)
            else:
                self._map(node)
        for copied in self.graph.nodes:  # a view may now read a tensor that lies in memory otherwise
            copied.target = aten.reshape.default if copied.target in VIEWS else copied.target
        return self.finish()

    # ------------------------------------------------------------------------------ kinds of nodes

    def _whole(self, node: fx.Node) -> None:
        """Copy an operator without a rule, the output, or a weight: inputs at full width."""
        passage = self.found.get(node)
        if passage is not None:
            if not self.held[node].any():
                self.order[node] = torch.arange(0)
                return
            self.order[node] = torch.arange(passage.width)
        if node in self.network.constants:
            return  # where it is read
        if node.op == "call_module":
            self._attach(node, copy.deepcopy(self.network.module_of(node)))
        self.made[node] = self.copy_full(node)

    def _read(self, node: fx.Node) -> None:
        """Copy a convolution or linear layer with the rows and columns that are left."""
        module, source, passage = self.network.module_of(node), node.all_input_nodes[0], self.found[node]
        assert module is not None
        calls = self._calls(node)
        outs = torch.stack([self.held[call] for call in calls]).any(0).nonzero().flatten()
        if calls[0] in self.ranks:  # one order for all calls of the module
            outs = outs[torch.argsort(self.ranks[calls[0]][outs])]
        ins = self._inputs(module, source, calls)
        groups = 1
        if passage.groups > 1:
            groups, outs, ins = even_groups(passage.groups, _width(module, passage.groups), passage.width, outs, ins)
        self._attach(node, slice_reader(module, outs, ins, groups, passage.groups))
        whole = is_whole(self.found[source])
        read = self.made[source] if whole and passage.groups == 1 else self.laid_out(source, ins)
        self.made[node], self.order[node] = self.graph.call_module(str(node.target), (read,)), outs
        self.cut_back(node)

    def _inputs(self, module: nn.Module, source: fx.Node, calls: list[fx.Node]) -> Tensor:
        """Return the input channels that a reader keeps: what its source holds, of all its calls together."""
        sources = [call.all_input_nodes[0] for call in calls]
        if any(is_whole(self.found[s]) for s in sources):
            return torch.arange(module.in_features if isinstance(module, nn.Linear) else _in_channels(module))
        if len(calls) == 1:
            return self.order[source]
        return torch.stack([self.held[s] for s in sources]).any(0).nonzero().flatten()

    def _map(self, node: fx.Node) -> None:
        """Copy an operator that works on each channel of one tensor alone, or moves it."""
        passage, link = self.found[node], self.found[node].links[0]
        ins, outs = self._wanted(node, link)
        if passage.kind == "pick":
            self.made[node], self.order[node] = self._picked(node, link, outs), outs
            return
        if node.target in MOVEMENTS:
            self._move(node, link, ins, outs)
            return
        module = self.network.module_of(node)
        if module is None:
            known = {link.source: self.laid_out(link.source, ins)}
            known |= {n: self.parameter(node, n, outs) for n in node.all_input_nodes if n is not link.source}
            self.copy(node, known.__getitem__)
        else:
            calls = self._calls(node)
            if len(calls) > 1:  # one module for all calls: the union of their channels
                outs = torch.stack([self.held[call] for call in calls]).any(0).nonzero().flatten()
                ins = torch.unique(link.inputs[outs])
            if len(ins) * (passage.width // self.found[link.source].width) > len(outs):
                ins = link.inputs[outs]  # of a depthwise filter whose siblings are gone: repeated
            self._attach(node, slice_alone(module, outs, len(ins)))
            read = self.laid_out(link.source, ins)
            self.made[node] = self.graph.call_module(str(node.target), (read,))
        self.order[node] = outs
        self.cut_back(node)

    def _picked(self, node: fx.Node, link: Link, outs: Tensor) -> fx.Node:
        """Return the channels of a tensor that does nothing but choose some of another's: absent ones are zeros."""
        origin = dict(zip(link.outputs.tolist(), link.inputs.tolist(), strict=True))
        return self.laid_out(link.source, torch.tensor([origin[o] for o in outs.tolist()]))

    def _move(self, node: fx.Node, link: Link, ins: Tensor, outs: Tensor) -> None:
        """Copy a movement with the sizes that are left, proven on the elements' numbers; else at full width."""
        source, axis, base = link.source, self.found[node].axis, self.found[link.source].axis
        dense = numbered(self.network.shapes[source.name])
        target = element_numbers(self.network, node, dense)
        for inputs, outputs in ((ins, outs), (ins.sort().values, outs.sort().values)):
            args = self._resized(node, axis, len(outputs))
            try:
                got = _applied(node, some(dense, base, inputs), args, self.network)
            except RuntimeError:  # sizes that do not divide any more
                continue
            if torch.equal(got, some(target, axis, outputs)):
                read = self.laid_out(source, inputs)
                given = {n: read if n is source else self.full(n) for n in node.all_input_nodes}
                args = fx.map_arg(args, given.__getitem__)
                self.made[node] = self.graph.call_function(node.target, args, dict(node.kwargs))  # type: ignore[arg-type]
                self.order[node] = outputs
                self.cut_back(node)
                return
        self.copy(node, self.full)
        self.order[node] = torch.arange(self.found[node].width)
        self.cut_back(node)

    def _resized(self, node: fx.Node, axis: int, width: int) -> tuple[Any, ...]:
        """Return a movement's arguments with its result's axis of channels at another width."""
        args = list(node.args)
        if node.target in RESHAPES:
            shape = list(args[1])  # type: ignore[arg-type]
            shape[axis] = width
            args[1] = shape
        return tuple(args)

    def _norm(self, node: fx.Node) -> None:
        """Copy a norm over channels; its statistics go on counting the zeros of those that are gone."""
        source, module = node.all_input_nodes[0], self.network.module_of(node)
        assert module is not None
        calls = self._calls(node)
        ids = torch.stack([self.held[call] for call in calls]).any(0).nonzero().flatten()
        self._attach(node, slice_norm(module, ids))
        self.made[node] = self.graph.call_module(str(node.target), (self.laid_out(source, ids),))
        self.order[node] = ids
        self.cut_back(node)

    def _cat(self, node: fx.Node) -> None:
        """Join what is left of each part."""
        parts, orders = [], []
        for link in self.found[node].links:
            ins, outs = self._wanted(node, link)
            if len(outs):
                parts.append(self.laid_out(link.source, ins))
                orders.append(outs)
        self.order[node] = torch.cat(orders)
        self.made[node] = parts[0]
        if len(parts) > 1:
            self.made[node] = self.graph.call_function(node.target, (parts, *node.args[1:]))  # type: ignore[arg-type]

    def _combine(self, node: fx.Node) -> None:
        """Add or multiply what is there: sums of different channels become a MixedAdd."""
        passage = self.found[node]
        plain = node.op == "call_module" or (node.target is aten.add.Tensor and not node.kwargs)
        links = [link for link in passage.links if self._holds(link, node)]
        if plain and passage.axis == 1 and all(self._same_shape(node, link) for link in passage.links):
            self._add(node, links)
            return
        if len(links) == 1 and plain and self._same_shape(node, links[0]):
            ins, self.order[node] = self._wanted(node, links[0])
            self.made[node] = self.laid_out(links[0].source, ins)
            return
        ids = self.held[node].nonzero().flatten()
        if node in self.ranks:
            ids = ids[torch.argsort(self.ranks[node][ids])]
        known: dict[fx.Node, fx.Node] = {}
        for link in passage.links:
            wanted = link.inputs[ids]
            if self.found[link.source].width < passage.width:  # one channel for all of them
                wanted = torch.zeros(1, dtype=torch.int64)
            elif node.target is aten.glu.default and self.found[link.source].width > passage.width:
                wanted = torch.cat([own.inputs[ids] for own in passage.links])
            known[link.source] = self.laid_out(link.source, wanted)
        known |= {n: self.parameter(node, n, ids) for n in node.all_input_nodes if n not in known}
        self.copy(node, known.__getitem__)
        self.order[node] = ids

    def _add(self, node: fx.Node, links: list[Link]) -> None:
        """Add two tensors: one operand alone passes, equal channels add plainly, others by MixedAdd."""
        wanted = [self._wanted(node, link) for link in links]
        operands = [self.laid_out(link.source, ins) for link, (ins, _) in zip(links, wanted, strict=True)]
        places = [outs for _, outs in wanted]
        if len(links) == 1 or torch.equal(places[0], places[1]):
            self.order[node] = places[0]
            self.made[node] = (
                operands[0] if len(links) == 1 else self.graph.call_function(aten.add.Tensor, tuple(operands))
            )
            return
        ids = self.held[node].nonzero().flatten()
        ids = ids[torch.argsort(self.ranks[node][ids])] if node in self.ranks else ids
        position = {int(channel): i for i, channel in enumerate(ids)}
        a, b = (tuple(position[int(channel)] for channel in place) for place in places)
        if b == tuple(range(len(b))) and a != tuple(range(len(a))):  # the stream first, what is added second
            a, b, operands = b, a, operands[::-1]
        name = self.free_name(node.name) if node.op == "call_function" else str(node.target)
        self.order[node], self.made[node] = ids, self.apply(name, MixedAdd(len(ids), a, b), *operands)

    # ------------------------------------------------------------------------------------- helpers

    def _attach(self, node: fx.Node, module: nn.Module | None) -> None:
        assert module is not None
        if node is self._calls(node)[0]:
            self.attach(str(node.target), module)

    def _calls(self, node: fx.Node) -> list[fx.Node]:
        """Return the living calls of the module that a node calls."""
        if str(node.target) not in self.again or node.op != "call_module":
            return [node]
        calls = [n for n in self.network.nodes if n.op == "call_module" and n.target == node.target]
        return [call for call in calls if call not in self.held or self.held[call].any()]

    def _holds(self, link: Link, node: fx.Node) -> bool:
        return bool((self.held[link.source][link.inputs] & self.held[node][link.outputs]).any())

    def _same_shape(self, node: fx.Node, link: Link) -> bool:
        held_back = is_whole(self.found[link.source]) and self.found[link.source].axis != self.found[node].axis
        shapes = self.network.shapes
        same = shapes[link.source.name] == shapes[node.name] or isinstance(self.network.module_of(node), MixedAdd)
        return same and not held_back

    def _wanted(self, node: fx.Node, link: Link) -> tuple[Tensor, Tensor]:
        """Return which input channels a map needs, in the order in which they lie, and what becomes of them."""
        order, held = self.order[link.source], self.held[node]
        alive = held[link.outputs]
        inputs, outputs = link.inputs[alive], link.outputs[alive]
        if len(torch.unique(outputs)) < len(outputs):  # several make one: all of them, zeros for those that are gone
            return inputs.sort().values, torch.unique(outputs)
        rank = torch.full((self.found[link.source].width,), -1)
        rank[order] = torch.arange(len(order))
        there = rank[inputs] >= 0
        places = torch.argsort(rank[inputs[there]], stable=True)
        ins, outs = inputs[there][places], outputs[there][places]
        return torch.unique_consecutive(ins), outs


def _applied(node: fx.Node, numbers: Tensor, args: tuple[Any, ...], network: Network) -> Tensor:
    """Return what a movement with other arguments makes of numbers, for a batch of 2."""
    constants = {n: attribute(network, n).cpu() for n in node.all_input_nodes if n in network.constants}

    def value(n: fx.Node) -> Any:
        return numbers if n is node.args[0] else constants[n] if n in constants else network.sizes[n.name]

    result = node.target(*fx.map_arg(args, value), **fx.map_arg(dict(node.kwargs), value))  # type: ignore[operator]
    assert isinstance(result, Tensor)
    return result


def _in_channels(module: nn.Module) -> int:
    channels = module.in_channels
    assert isinstance(channels, int)
    return channels


def _width(module: nn.Module, groups: int) -> int:
    return _in_channels(module) // groups
