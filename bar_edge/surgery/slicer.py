"""Surgery: from a network and a plan to the smaller network, in mixed-connectivity form."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from bar_edge.errors import InputError
from bar_edge.network import Expand, MixedAdd, Network
from bar_edge.network.channels import (
    CONVOLUTIONS,
    LEAVES,
    TRANSPOSED,
    Link,
    Passages,
    attribute,
    called_again,
    element_numbers,
    is_constant,
    is_whole,
    parameter_axis,
    passages,
)
from bar_edge.network.graph_json import attach
from bar_edge.network.leaves import PartialNorm
from bar_edge.network.liveness import held_channels
from bar_edge.network.movement import MOVEMENTS, RESHAPES, VIEWS, numbered
from bar_edge.network.network import propagate_shapes
from bar_edge.records import ChannelPlan
from bar_edge.surgery.check import check_plan
from bar_edge.surgery.stream_order import first_write_ranks

aten = torch.ops.aten


def slice_network(network: Network, plan: ChannelPlan) -> Network:
    """Return a new network that computes only the channels that the plan leaves alive; the old one is unchanged.

    Its output equals that of the masked network: the dense one in which every absent channel is 0
    wherever it is read. Outputs and operators without a channel rule get full width, zeros filled in.
    Raises InputError if the plan belongs to another network.
    """
    found = passages(network)
    check_plan(network, plan, found)
    return _Slicer(network, found, held_channels(network, plan.kept, found)).run()


class _Slicer:
    """Copies a graph node by node; `order` is which dense channels a tensor holds, in their new order."""

    def __init__(self, network: Network, found: Passages, held: dict[fx.Node, Tensor]) -> None:
        self.network, self.found, self.held = network, found, held
        self.ranks = first_write_ranks(found, held)
        self.again = called_again(network)
        self.root, self.graph = nn.Module(), fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.order: dict[fx.Node, Tensor] = {}

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
            elif passage.kind in ("add", "mul"):
                self._combine(node)
            elif len(passage.links) > 1:
                self._cat(node)
            else:
                self._map(node)
        device = next((t.device for t in self.network.body.state_dict().values()), torch.device("cpu"))
        for copied in self.graph.nodes:  # a view may now read a tensor that lies in memory otherwise
            copied.target = aten.reshape.default if copied.target in VIEWS else copied.target
        body = fx.GraphModule(self.root.to(device), self.graph)
        body.graph.eliminate_dead_code()
        body.recompile()
        body.delete_all_unused_submodules()
        return Network(body, self.network.input_shapes, self.network.out_spec).train(self.network.training)

    # ------------------------------------------------------------------------------ kinds of nodes

    def _whole(self, node: fx.Node) -> None:
        """Copy an operator without a rule, the output, or a weight: inputs at full width."""
        passage = self.found.get(node)
        if passage is not None:
            if not self.held[node].any():
                self.order[node] = torch.arange(0)
                return
            self.order[node] = torch.arange(passage.width)
        if is_constant(node):
            return  # where it is read
        if node.op == "call_module":
            self._attach(node, copy.deepcopy(self.network.module_of(node)))
        self.made[node] = self.graph.node_copy(node, self._full)

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
            groups, outs, ins = _even_groups(passage.groups, _width(module, passage.groups), passage.width, outs, ins)
        self._attach(node, _slice_reader(module, outs, ins, groups, passage.groups))
        whole = is_whole(self.found[source])
        read = self.made[source] if whole and passage.groups == 1 else self._laid_out(source, ins)
        self.made[node], self.order[node] = self.graph.call_module(str(node.target), (read,)), outs
        self._cut_back(node)

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
            parameters = {n: self._parameter(node, n, outs) for n in node.all_input_nodes if is_constant(n)}
            source = self._laid_out(link.source, ins)
            known = parameters | {link.source: source}
            self.made[node] = self.graph.node_copy(node, lambda n: known.get(n) or self._full(n))
        else:
            calls = self._calls(node)
            if len(calls) > 1:  # one module for all calls: the union of their channels
                outs = torch.stack([self.held[call] for call in calls]).any(0).nonzero().flatten()
                ins = torch.unique(link.inputs[outs])
            if len(ins) * (passage.width // self.found[link.source].width) > len(outs):
                ins = link.inputs[outs]  # of a depthwise filter whose siblings are gone: repeated
            self._attach(node, _slice_alone(module, outs, len(ins)))
            read = self._laid_out(link.source, ins)
            self.made[node] = self.graph.call_module(str(node.target), (read,))
        self.order[node] = outs
        self._cut_back(node)

    def _picked(self, node: fx.Node, link: Link, outs: Tensor) -> fx.Node:
        """Return the channels of a tensor that does nothing but choose some of another's: absent ones are zeros."""
        origin = dict(zip(link.outputs.tolist(), link.inputs.tolist(), strict=True))
        return self._laid_out(link.source, torch.tensor([origin[o] for o in outs.tolist()]))

    def _move(self, node: fx.Node, link: Link, ins: Tensor, outs: Tensor) -> None:
        """Copy a movement with the sizes that are left, proven on the elements' numbers; else at full width."""
        source, axis, base = link.source, self.found[node].axis, self.found[link.source].axis
        dense = numbered(self.network.shapes[source.name])
        target = element_numbers(self.network, node, dense)
        for inputs, outputs in ((ins, outs), (ins.sort().values, outs.sort().values)):
            args = self._resized(node, axis, len(outputs))
            try:
                got = _applied(node, _some(dense, base, inputs), args, self.network)
            except RuntimeError:  # sizes that do not divide any more
                continue
            if torch.equal(got, _some(target, axis, outputs)):
                read = self._laid_out(source, inputs)
                given = {n: read if n is source else self._full(n) for n in node.all_input_nodes}
                args = fx.map_arg(args, given.__getitem__)
                self.made[node] = self.graph.call_function(node.target, args, dict(node.kwargs))  # type: ignore[arg-type]
                self.order[node] = outputs
                self._cut_back(node)
                return
        self.made[node] = self.graph.node_copy(node, self._full)
        self.order[node] = torch.arange(self.found[node].width)
        self._cut_back(node)

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
        self._attach(node, _slice_norm(module, ids))
        self.made[node] = self.graph.call_module(str(node.target), (self._laid_out(source, ids),))
        self.order[node] = ids
        self._cut_back(node)

    def _cat(self, node: fx.Node) -> None:
        """Join what is left of each part."""
        parts, orders = [], []
        for link in self.found[node].links:
            ins, outs = self._wanted(node, link)
            if len(outs):
                parts.append(self._laid_out(link.source, ins))
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
            self.made[node] = self._laid_out(links[0].source, ins)
            return
        ids = self.held[node].nonzero().flatten()
        if node in self.ranks:
            ids = ids[torch.argsort(self.ranks[node][ids])]
        known = {}
        for link in passage.links:
            broadcast = self.found[link.source].width < passage.width
            wanted = torch.zeros(1, dtype=torch.int64) if broadcast else link.inputs[ids]
            known[link.source] = self._laid_out(link.source, wanted)
        known |= {n: self._fitting(node, n, ids) for n in node.all_input_nodes if n not in known}
        self.made[node] = self.graph.node_copy(node, lambda n: known[n])
        self.order[node] = ids

    def _fitting(self, node: fx.Node, source: fx.Node, ids: Tensor) -> fx.Node:
        """Return a whole operand of a product, cut to the product's channels where it has that axis."""
        if source not in self.found:
            return self._full(source)
        passage, shape = self.found[node], self.network.shapes[source.name]
        axis = passage.axis - (len(self.network.shapes[node.name]) - len(shape))
        if axis < 0 or shape[axis] == 1 or torch.equal(ids, torch.arange(passage.width)):
            return self._full(source)
        return self._select(self._full(source), axis, ids)

    def _add(self, node: fx.Node, links: list[Link]) -> None:
        """Add two tensors: one operand alone passes, equal channels add plainly, others by MixedAdd."""
        wanted = [self._wanted(node, link) for link in links]
        operands = [self._laid_out(link.source, ins) for link, (ins, _) in zip(links, wanted, strict=True)]
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
        name = self._free_name(node.name) if node.op == "call_function" else str(node.target)
        attach(self.root, name, MixedAdd(len(ids), a, b))
        self.order[node], self.made[node] = ids, self.graph.call_module(name, tuple(operands))

    # ------------------------------------------------------------------------------------- helpers

    def _attach(self, node: fx.Node, module: nn.Module | None) -> None:
        assert module is not None
        if node is self._calls(node)[0]:
            attach(self.root, str(node.target), module)

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

    def _laid_out(self, node: fx.Node, ids: Tensor) -> fx.Node:
        """Return the sliced tensor with these dense channels in this order, zeros for those that it does not hold."""
        order, axis = self.order[node], self.found[node].axis
        if torch.equal(order, ids):
            return self.made[node]
        place = {channel: i for i, channel in enumerate(order.tolist())}
        there = [i for i, channel in enumerate(ids.tolist()) if channel in place]
        if not there:
            lengths = [self._length(node, i) for i in range(len(self.network.shapes[node.name]))]
            lengths[axis] = len(ids)
            return self.graph.call_function(aten.new_zeros.default, (self._first_input(), lengths))
        wanted = ids.tolist()
        picked = torch.tensor([place[wanted[i]] for i in there])
        taken = self._select(self.made[node], axis, picked, len(order))
        if len(there) == len(ids):
            return taken
        name = self._free_name(f"expand_{node.name}")
        attach(self.root, name, Expand(axis, len(ids), tuple(there)))
        return self.graph.call_module(name, (taken,))

    def _select(self, x: fx.Node, axis: int, places: Tensor, width: int | None = None) -> fx.Node:
        """Return some channels of a sliced tensor: itself, a slice or a gather."""
        first, n = int(places[0]), len(places)
        if torch.equal(places, torch.arange(first, first + n)):
            if n == width:
                return x
            return self.graph.call_function(aten.slice.Tensor, (x, axis, first, first + n))
        name = self._free_name("channels")
        attach(self.root, name, places.clone())
        return self.graph.call_function(aten.index_select.default, (x, axis, self.graph.get_attr(name)))

    def _cut_back(self, node: fx.Node) -> None:
        """Drop channels that an operator had to make although the plan does not hold them."""
        order = self.order[node]
        keep = self.held[node][order]
        if not bool(keep.all()):
            self.made[node] = self._select(self.made[node], self.found[node].axis, keep.nonzero().flatten(), len(order))
            self.order[node] = order[keep]

    def _parameter(self, node: fx.Node, parameter: fx.Node, ids: Tensor) -> fx.Node:
        """Return a parameter of the graph cut to a node's channels."""
        value, passage = attribute(self.network, parameter), self.found[node]
        axis = parameter_axis(self.network, value, node, passage.axis)
        if axis is None or torch.equal(ids, torch.arange(passage.width)):
            return self._full(parameter)
        root = parameter
        while root.op != "get_attr" and len(root.users) == 1:
            root = root.all_input_nodes[0]
        if root.op != "get_attr" or len(root.users) > 1:
            return self._select(self._full(parameter), axis, ids)
        original = attribute(self.network, root)
        return self._attach_tensor(root, _copy(original, value.index_select(axis, ids.to(value.device))))

    def _attach_tensor(self, node: fx.Node, value: Tensor) -> fx.Node:
        """Give the new network a tensor that its graph reads by itself; under a new name if a module owns it too."""
        name, owner = str(node.target), str(node.target).rpartition(".")[0]
        called = any(n.op == "call_module" and n.target == owner for n in self.network.nodes)
        name = self._free_name(name.replace(".", "_")) if called else name
        attach(self.root, name, value)
        return self.graph.get_attr(name)

    def _full(self, node: fx.Node) -> fx.Node:
        """Return the sliced tensor for an input of an operator without a rule, at full width."""
        if is_constant(node) and node.op != "get_attr":
            return self.graph.node_copy(node, self._full)
        if is_constant(node):
            if node not in self.made:
                self.made[node] = self._attach_tensor(node, _copy(attribute(self.network, node)))
            return self.made[node]
        if node not in self.found:
            if node.target is aten.sym_size.int and node.args[0] in self.found:  # whose tensor may be gone
                length = self._length(*node.args)  # type: ignore[arg-type]
                assert isinstance(length, fx.Node), "torch.export asks only for sizes that the batch changes"
                return length
            return self.made[node]
        passage = self.found[node]
        if passage.kind == "spread":
            return self.graph.node_copy(node, self._full)
        if is_whole(passage) and len(self.order[node]):
            return self.made[node]
        return self._laid_out(node, torch.arange(passage.width))

    def _free_name(self, wanted: str) -> str:
        """Return a name for a part of the new network that no part of either network has."""
        names = itertools.chain([wanted], (f"{wanted}_{i}" for i in itertools.count(1)))
        return next(name for name in names if not hasattr(self.root, name) and not hasattr(self.network.body, name))

    def _length(self, node: fx.Node, axis: int) -> int | fx.Node:
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


def _applied(node: fx.Node, numbers: Tensor, args: tuple[Any, ...], network: Network) -> Tensor:
    """Return what a movement with other arguments makes of numbers, for a batch of 2."""
    constants = {n: attribute(network, n).cpu() for n in node.all_input_nodes if is_constant(n)}

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


def _even_groups(groups: int, n_in: int, width: int, outs: Tensor, ins: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return the living groups of a grouped convolution, with as many inputs and outputs in each of them.

    n_in: inputs per dense group; width: all dense outputs. What a group lacks is filled with channels of
    its own that are not there: their inputs are zeros, their outputs are cut off again.
    """
    n_out = width // groups
    own_outs, own_ins = ([ids[ids // n == g] for g in range(groups)] for ids, n in ((outs, n_out), (ins, n_in)))
    alive = [g for g in range(groups) if len(own_outs[g])]

    def filled(own: list[Tensor], n: int) -> Tensor:
        most = max(len(own[g]) for g in alive)
        rows = []
        for g in alive:
            rest = torch.arange(g * n, (g + 1) * n)
            rest = rest[~torch.isin(rest, own[g])]
            rows.append(torch.cat([own[g], rest[: most - len(own[g])]]))
        return torch.cat(rows)

    return len(alive), filled(own_outs, n_out), filled(own_ins, n_in)


def _copy(tensor: Tensor, part: Tensor | None = None) -> Tensor:
    values = (tensor if part is None else part).detach().clone()
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _take(module: nn.Module, name: str, part: Tensor | None) -> None:
    """Replace a parameter or buffer by a part of it in memory of its own; parameters stay parameters."""
    if part is not None:
        whole, part = getattr(module, name), part.detach()
        is_parameter = isinstance(whole, nn.Parameter)
        setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad) if is_parameter else part)


def _some(tensor: Tensor, axis: int, ids: Tensor) -> Tensor:
    """Return some indices of an axis, the tensor itself if they are all of them."""
    every = len(ids) == tensor.shape[axis] and torch.equal(ids, torch.arange(len(ids), device=ids.device))
    return tensor if every else tensor.index_select(axis, ids)


def _hollow(module: nn.Module) -> nn.Module:
    """Return a copy of a module that still shares its tensors (to be replaced one by one)."""
    memo: dict[int, Any] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, memo)


def _slice_reader(module: nn.Module, outs: Tensor, ins: Tensor, groups: int, dense_groups: int) -> nn.Module:
    """Return a layer with some of its outputs and inputs; both in equal numbers per group, group by group."""
    new, transposed = _hollow(module), isinstance(module, TRANSPOSED)
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    outs, ins = outs.to(weight.device), ins.to(weight.device)
    first, second = (ins, outs) if transposed else (outs, ins)  # the axes of the weight
    if dense_groups == 1:
        part = _some(_some(weight.detach(), 0, first), 1, second)
        part = part.clone() if part.data_ptr() == weight.data_ptr() else part
    else:
        rows = zip(first.view(groups, -1), second.view(groups, -1) % weight.shape[1], strict=True)
        part = torch.cat([weight.detach()[a][:, b] for a, b in rows])
    _take(new, "weight", part)
    _take(new, "bias", bias[outs] if isinstance(bias, Tensor) else None)
    if isinstance(new, nn.Linear):
        new.out_features, new.in_features = len(outs), len(ins)
    else:
        new.out_channels, new.in_channels, new.groups = len(outs), len(ins), groups  # type: ignore[assignment]
    return new


def _slice_alone(module: nn.Module, ids: Tensor, inputs: int) -> nn.Module:
    """Return the part of a module that works on each channel alone, for some channels."""
    new = _hollow(module)
    if isinstance(module, nn.Linear) or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
        return copy.deepcopy(module)  # the same for every channel
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        _take(new, name, tensor[ids.to(tensor.device)] if tensor.ndim else tensor.clone())
    if isinstance(new, nn.modules.batchnorm._NormBase):
        new.num_features = len(ids)
    elif isinstance(new, nn.PReLU):
        new.num_parameters = len(ids)
    elif isinstance(new, CONVOLUTIONS):
        new.groups, new.in_channels, new.out_channels = inputs, inputs, len(ids)
    else:
        assert not list(new.parameters()) and not isinstance(new, LEAVES)
    return new


def _slice_norm(module: nn.Module, ids: Tensor) -> nn.Module:
    """Return a norm over channels of which only some are there."""
    if isinstance(module, PartialNorm):
        width, axis, membership = module.group_width, module.axis, torch.tensor(module.membership)
        whole, affine = len(module.membership), module.affine
    elif isinstance(module, nn.GroupNorm):
        width, axis, affine = module.num_channels // module.num_groups, 1, module.affine
        membership, whole = torch.arange(module.num_channels) // width, module.num_channels
    else:
        assert isinstance(module, nn.LayerNorm)
        whole = width = int(module.normalized_shape[0])
        axis, affine, membership = -1, module.elementwise_affine, torch.zeros(width, dtype=torch.int64)
    if len(ids) == whole:
        return copy.deepcopy(module)
    assert isinstance(module.eps, float)
    weight, bias = module.weight, module.bias
    new = PartialNorm(axis, width, tuple(membership[ids].tolist()), module.eps, affine, bias is not None)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if isinstance(tensor, nn.Parameter):
            setattr(new, name, _copy(tensor, tensor[ids.to(tensor.device)]))
    return new.to(next((p.device for p in module.parameters()), torch.device("cpu")))
