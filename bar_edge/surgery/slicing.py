"""Surgery: from a network and a plan to the smaller network, in mixed-connectivity form."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from bar_edge.network import Expand, MixedAdd, Network
from bar_edge.network.channels import LEAVES, Passages, is_depthwise, passages
from bar_edge.network.codec import attach
from bar_edge.network.liveness import held_channels
from bar_edge.records import ChannelPlan
from bar_edge.surgery.check import check_plan
from bar_edge.surgery.order import first_write_ranks

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
        self.root, self.graph = nn.Module(), fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.order: dict[fx.Node, Tensor] = {}

    def run(self) -> Network:
        for node in self.network.nodes:
            passage = self.found.get(node)
            if node.op == "placeholder":
                self.made[node] = self.graph.placeholder(str(node.target))
                self.order[node] = torch.arange(self.found[node].width)
            elif passage is None or passage.kind == "opaque":
                self._whole(node)
            elif not self.held[node].any():
                self.order[node] = torch.arange(0)
            elif passage.kind == "read":
                self._read(node)
            elif passage.kind == "add":
                self._add(node)
            else:
                self._map(node)
        body = fx.GraphModule(self.root, self.graph)
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
        if node.op == "get_attr":
            value = _attribute(self.network.body, str(node.target))
            attach(self.root, str(node.target), _copy(value))
        elif node.op == "call_module":
            self._attach(node, copy.deepcopy(self.network.module_of(node)))
        self.made[node] = self.graph.node_copy(node, self._full)

    def _read(self, node: fx.Node) -> None:
        """Copy a convolution or linear layer with the rows and columns that are left."""
        out_ids = self.held[node].nonzero().flatten()
        if node in self.ranks:
            out_ids = out_ids[torch.argsort(self.ranks[node][out_ids])]
        module, source = self.network.module_of(node), node.all_input_nodes[0]
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
        self._attach(node, _slice_reader(module, out_ids, self.order[source]))
        self.made[node] = self.graph.call_module(str(node.target), (self.made[source],))
        self.order[node] = out_ids

    def _map(self, node: fx.Node) -> None:
        """Copy a per-channel operator or a concatenation, without the inputs that are gone."""
        links = [link for link in self.found[node].links if len(self.order[link.source])]
        self.order[node] = torch.cat([_through(link.inputs, link.outputs, self.order[link.source]) for link in links])
        module = self.network.module_of(node)
        if module is not None:
            self._attach(node, _slice_alone(module, self.order[node]))
        alive = {link.source for link in links}

        def convert(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [convert(v) for v in value if not isinstance(v, fx.Node) or v in alive]
            return self.made[value] if isinstance(value, fx.Node) else value

        args = tuple(convert(value) for value in node.args)
        self.made[node] = self.graph.create_node(node.op, node.target, args, dict(node.kwargs))

    def _add(self, node: fx.Node) -> None:
        """Add what is there: one operand alone passes, equal channels add plainly, others by MixedAdd."""
        links = [link for link in self.found[node].links if len(self.order[link.source])]
        places = [_through(link.inputs, link.outputs, self.order[link.source]) for link in links]
        operands = [self.made[link.source] for link in links]
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
        name = node.name if node.op == "call_function" else str(node.target)
        attach(self.root, name, MixedAdd(len(ids), a, b))
        self.order[node], self.made[node] = ids, self.graph.call_module(name, tuple(operands))

    # ------------------------------------------------------------------------------------- helpers

    def _attach(self, node: fx.Node, module: nn.Module | None) -> None:
        assert module is not None
        attach(self.root, str(node.target), module)

    def _full(self, node: fx.Node) -> fx.Node:
        """Return the sliced tensor for an input of an operator without a rule, at full width."""
        if node not in self.found:
            if node.target is aten.sym_size.int and node.args[1] == 0:
                return self._batch_size()
            return self.made[node]
        passage, order = self.found[node], self.order[node]
        if torch.equal(order, torch.arange(passage.width)):
            return self.made[node]
        if not len(order):
            shape: list[Any] = [self._batch_size(), *self.network.shapes[node.name][1:]]
            return self.graph.call_function(aten.new_zeros.default, (self._first_input(), shape))
        name = f"expand_{node.name}_{len(self.graph.nodes)}"
        attach(self.root, name, Expand(passage.axis, passage.width, tuple(order.tolist())))
        return self.graph.call_module(name, (self.made[node],))

    def _first_input(self) -> fx.Node:
        first: fx.Node = next(node for node in self.graph.nodes if node.op == "placeholder")
        return first

    def _batch_size(self) -> fx.Node:
        return self.graph.call_function(aten.sym_size.int, (self._first_input(), 0))


def _through(inputs: Tensor, outputs: Tensor, order: Tensor) -> Tensor:
    """Return the output channels that an ordered list of input channels becomes, in that order."""
    rank = torch.full((int(max(inputs.max(), order.max())) + 1,), -1)
    rank[order] = torch.arange(len(order))
    places = rank[inputs]
    alive = (places >= 0).nonzero().flatten()
    return outputs[alive[torch.argsort(places[alive], stable=True)]]


def _attribute(body: nn.Module, name: str) -> Tensor:
    *path, last = name.split(".")
    value = getattr(body.get_submodule(".".join(path)), last)
    assert isinstance(value, Tensor)
    return value


def _copy(tensor: Tensor) -> Tensor:
    values = tensor.detach().clone()
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _take(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Replace a parameter or buffer by a part of it; parameters stay parameters."""
    if tensor is None:
        return
    old = getattr(module, name)
    values = tensor.detach().clone().contiguous()
    setattr(
        module, name, nn.Parameter(values, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else values
    )


def _hollow(module: nn.Module) -> nn.Module:
    """Return a copy of a module that still shares its tensors (to be replaced one by one)."""
    memo: dict[int, Any] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, memo)


def _slice_reader(module: nn.Module, out_ids: Tensor, in_ids: Tensor) -> nn.Module:
    new = _hollow(module)
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    _take(new, "weight", weight[out_ids.to(weight.device)][:, in_ids.to(weight.device)])
    _take(new, "bias", bias[out_ids.to(weight.device)] if isinstance(bias, Tensor) else None)
    if isinstance(new, nn.Linear):
        new.out_features, new.in_features = len(out_ids), len(in_ids)
    else:
        new.out_channels, new.in_channels = len(out_ids), len(in_ids)  # type: ignore[assignment]
    return new


def _slice_alone(module: nn.Module, ids: Tensor) -> nn.Module:
    """Return the part of a per-channel module (BatchNorm, depthwise convolution, dropout) for some channels."""
    new = _hollow(module)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        _take(new, name, tensor[ids.to(tensor.device)] if tensor.ndim else tensor)
    if isinstance(new, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        new.num_features = len(ids)
    elif is_depthwise(module):
        new.groups = new.in_channels = new.out_channels = len(ids)  # type: ignore[assignment]
    else:
        assert not list(new.parameters()) and not isinstance(new, LEAVES)
    return new
