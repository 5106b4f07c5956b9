"""Surgery backwards: give tensors of a network more channels, zeros, without changing its function."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from bar_edge.lowering.placement import Placement, plain_reader, plain_sum, residual_streams, stream_placements
from bar_edge.network import MixedAdd, Network
from bar_edge.network.channels import Passage, attribute, called_again
from bar_edge.network.graph_json import attach
from bar_edge.network.rewriter import Rewriter
from bar_edge.records.lowering import Form
from bar_edge.surgery.stream_order import is_identity

aten = torch.ops.aten


def regular_form(network: Network) -> Network:
    """Return the network as regular residual blocks: all tensors of a stream hold the union of its channels."""
    places: dict[fx.Node, Placement] = {}
    for stream in residual_streams(network):
        places |= stream_placements(network, stream, Form("regular"))
    return widen(network, places)


def widen(network: Network, places: dict[fx.Node, Placement]) -> Network:
    """Return the network with every placed tensor in its wider form; readers of the rest get what they had."""
    return _Widener(network, places).run()


class _Widener(Rewriter):
    def __init__(self, network: Network, places: dict[fx.Node, Placement]) -> None:
        super().__init__(network)
        self.found, self.places = network.channels, places
        self.again = called_again(network)

    def run(self) -> Network:
        for node in self.network.nodes:
            passage, module = self.found.get(node), self.network.module_of(node)
            if passage is None:
                self._copy(node, module)
            elif passage.kind == "read" and module is not None and self._is_plain_reader(node, passage, module):
                source = node.all_input_nodes[0]
                wide = _wide_reader(module, self.places.get(node), self.places.get(source))
                self.made[node] = self.apply(str(node.target), wide, self.made[source])
            elif passage.kind == "add" and plain_sum(self.network, passage, node):
                self._add(node, [link.source for link in passage.links], [link.outputs for link in passage.links])
            elif is_identity(passage) and self.places.get(node) == self.places.get(passage.links[0].source):
                if module is not None:
                    self.attach(str(node.target), _wide_alone(module, self.places.get(node)))
                self.copy(node)
            else:
                self._copy(node, module)
        return self.finish()

    def _is_plain_reader(self, node: fx.Node, passage: Passage, module: nn.Module) -> bool:
        return plain_reader(passage, module) and str(node.target) not in self.again

    def _add(self, node: fx.Node, sources: list[fx.Node], outputs: list[Tensor]) -> None:
        width, out = self.found[node].width, self.places.get(node)
        positions = [tuple(places.tolist()) for places in outputs]
        if out is not None:
            width, place = out.width, {slot: i for i, slot in enumerate(out.slots)}
            positions = [tuple(place[slot] for slot in self.places[source].slots) for source in sources]
        operands = tuple(self.made[source] for source in sources)
        if positions[0] == positions[1] == tuple(range(width)):
            self.made[node] = self.graph.call_function(aten.add.Tensor, operands)
            return
        name = str(node.target) if node.op == "call_module" else node.name
        self.made[node] = self.apply(name, MixedAdd(width, positions[0], positions[1]), *operands)

    def _copy(self, node: fx.Node, module: nn.Module | None) -> None:
        """Copy any other node; its inputs are cut back to what they were."""
        if module is not None:
            self.attach(str(node.target), copy.deepcopy(module))
        elif node.op == "get_attr":
            self.attach(str(node.target), attribute(self.network, node))
        self.copy(node, self._narrow)
        assert node not in self.places or node.op == "placeholder" or self.places[node].is_whole

    def _narrow(self, node: fx.Node) -> fx.Node:
        place = self.places.get(node)
        if place is None or place.is_whole:
            return self.made[node]
        return select(self.graph, self.root, self.made[node], self.found[node].axis, place.positions)


def select(graph: fx.Graph, root: nn.Module, x: fx.Node, axis: int, positions: tuple[int, ...]) -> fx.Node:
    """Append a Gather of channels (a Slice where they are a prefix)."""
    if positions == tuple(range(len(positions))):
        return graph.call_function(aten.slice.Tensor, (x, axis, 0, len(positions)))
    name = f"select_{len(graph.nodes)}"
    attach(root, name, torch.tensor(positions, dtype=torch.int64))
    return graph.call_function(aten.index_select.default, (x, axis, graph.get_attr(name)))


def _spread(values: Tensor, axis: int, place: Placement | None, fill: float = 0.0) -> Tensor:
    if place is None:
        return values.detach().clone()
    shape = list(values.shape)
    shape[axis] = place.width
    index = torch.tensor(place.positions, device=values.device)
    return values.new_full(shape, fill).index_copy(axis, index, values.detach())


def _wide_reader(module: nn.Module, out: Placement | None, source: Placement | None) -> nn.Module:
    new = copy.deepcopy(module)
    assert isinstance(new, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
    new.weight = nn.Parameter(_spread(_spread(new.weight, 0, out), 1, source))
    if new.bias is not None:
        new.bias = nn.Parameter(_spread(new.bias, 0, out))
    if isinstance(new, nn.Linear):
        new.out_features, new.in_features = new.weight.shape[:2]
    else:
        new.out_channels, new.in_channels = new.weight.shape[:2]
    return new


def _wide_alone(module: nn.Module, place: Placement | None) -> nn.Module:
    new = copy.deepcopy(module)
    if place is None or place.is_whole:
        return new
    tensors: list[tuple[str, Any]] = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if tensor.ndim:
            wide = _spread(tensor, 0, place, 1.0 if name == "running_var" else 0.0)
            setattr(new, name, nn.Parameter(wide) if isinstance(tensor, nn.Parameter) else wide)
    if isinstance(new, nn.modules.batchnorm._BatchNorm):
        new.num_features = place.width
    elif isinstance(new, nn.modules.conv._ConvNd):
        new.groups = new.in_channels = new.out_channels = place.width
    return new
