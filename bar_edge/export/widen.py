"""Surgery backwards: give tensors of a network more channels, zeros, without changing its function."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, fx, nn

from bar_edge.network import MixedAdd, Network
from bar_edge.network.channels import Passage, Passages, called_again, is_constant, is_depthwise, passages
from bar_edge.network.codec import attach
from bar_edge.network.movement import MOVEMENTS
from bar_edge.surgery.order import is_identity, streams

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor's channels go in its wider form: channel i becomes channel positions[i] of `width`."""

    width: int
    positions: tuple[int, ...]


def stream_placements(network: Network, found: Passages) -> dict[fx.Node, Placement]:
    """Return for every tensor of a residual stream its channels' places in the union over the whole stream.

    Channels that meet in an addition are one channel; the union is ordered by first appearance. Streams
    that pass through something that cannot be made wider (a grouped convolution, a norm over channels, a
    module that is called twice) are left as they are.
    """
    stream = streams(found)
    joined = {stream[node] for node, passage in found.items() if passage.kind == "add"}
    again = called_again(network)
    joined -= {stream[node] for node in found if str(node.target) in again}
    # a tensor added to itself has two places for each channel
    twice = [n for n, p in found.items() if len({link.source for link in p.links}) < len(p.links)]
    joined -= {stream[node] for node in twice}
    start: dict[fx.Node, int] = {}
    total = 0
    for node, passage in found.items():
        start[node], total = total, total + passage.width
    parent = list(range(total))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for node, passage in found.items():
        if stream[node] in joined and (passage.kind == "add" or is_identity(passage)):
            for link in passage.links:
                for i, o in zip(link.inputs.tolist(), link.outputs.tolist(), strict=True):
                    a, b = root(start[link.source] + i), root(start[node] + o)
                    parent[max(a, b)] = min(a, b)
    rank: dict[fx.Node, dict[int, int]] = {}
    places: dict[fx.Node, list[int]] = {}
    for node, passage in found.items():
        if stream[node] in joined:
            ranks = rank.setdefault(stream[node], {})
            roots = [root(start[node] + i) for i in range(passage.width)]
            places[node] = [ranks.setdefault(r, len(ranks)) for r in roots]
    found_places = {node: Placement(len(rank[stream[node]]), tuple(p)) for node, p in places.items()}
    fixed = {
        stream[n] for n, place in found_places.items() if not _is_whole(place) and not _can_widen(network, found[n], n)
    }
    return {node: place for node, place in found_places.items() if stream[node] not in fixed}


def _can_widen(network: Network, passage: Passage, node: fx.Node) -> bool:
    """Tell whether a tensor may hold more channels, zeros: if a layer, a sum or an operator on each alone makes it."""
    module = network.module_of(node)
    if passage.kind == "read":
        return _plain_reader(passage, module)
    if passage.kind == "add":
        return _plain_sum(network, passage, node)
    if module is not None:
        return isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout) or is_depthwise(module)
    moved = node.target in MOVEMENTS or any(is_constant(n) for n in node.all_input_nodes)
    return passage.kind == "map" and is_identity(passage) and passage.keeps_zero and not moved


def _plain_reader(passage: Passage, module: nn.Module | None) -> bool:
    return passage.groups == 1 and isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _plain_sum(network: Network, passage: Passage, node: fx.Node) -> bool:
    if isinstance(network.module_of(node), MixedAdd):
        return True
    shapes = {network.shapes[source.name] for source in node.all_input_nodes if source.name in network.shapes}
    return node.target is aten.add.Tensor and len(passage.links) == 2 and passage.axis == 1 and len(shapes) == 1


def filled_placements(network: Network, found: Passages) -> dict[fx.Node, Placement]:
    """Return placements in which every block writes all channels of the stream so far, zeros where it had none.

    Only where the writer is a convolution, followed by per-channel operators, that nobody else reads.
    """
    places: dict[fx.Node, Placement] = {}
    again = called_again(network)
    for add, passage in found.items():
        if passage.kind != "add" or not _plain_sum(network, passage, add):
            continue
        link = passage.links[-1]
        chain = [link.source]
        while len(chain[-1].users) == 1 and is_identity(found[chain[-1]]):
            chain.append(found[chain[-1]].links[0].source)
        widened = all(_can_widen(network, found[node], node) and str(node.target) not in again for node in chain)
        if widened and len(chain[-1].users) == 1 and found[chain[-1]].kind == "read":
            places |= {node: Placement(passage.width, tuple(link.outputs.tolist())) for node in chain}
    return places


def regular_form(network: Network) -> Network:
    """Return the network as regular residual blocks: all tensors of a stream hold the union of its channels."""
    return widen(network, stream_placements(network, passages(network)))


def widen(network: Network, places: dict[fx.Node, Placement]) -> Network:
    """Return the network with every placed tensor in its wider form; readers of the rest get what they had."""
    return _Widener(network, places).run()


class _Widener:
    def __init__(self, network: Network, places: dict[fx.Node, Placement]) -> None:
        self.network, self.found, self.places = network, passages(network), places
        self.again = called_again(network)
        self.root, self.graph = nn.Module(), fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}

    def run(self) -> Network:
        for node in self.network.nodes:
            passage, module = self.found.get(node), self.network.module_of(node)
            kind = passage.kind if passage is not None else "opaque"
            plain = passage is not None and _plain_reader(passage, module) and str(node.target) not in self.again
            if kind == "read" and plain and module is not None:
                source = node.all_input_nodes[0]
                attach(
                    self.root, str(node.target), _wide_reader(module, self.places.get(node), self.places.get(source))
                )
                self.made[node] = self.graph.call_module(str(node.target), (self.made[source],))
            elif kind == "add" and passage is not None and _plain_sum(self.network, passage, node):
                self._add(node, [link.source for link in passage.links], [link.outputs for link in passage.links])
            elif (
                passage is not None
                and is_identity(passage)
                and self.places.get(node) == self.places.get(passage.links[0].source)
            ):
                if module is not None:
                    attach(self.root, str(node.target), _wide_alone(module, self.places.get(node)))
                self.made[node] = self.graph.node_copy(node, lambda n: self.made[n])
            else:
                self._copy(node, module)
        body = fx.GraphModule(self.root, self.graph)
        body.graph.eliminate_dead_code()
        body.recompile()
        body.delete_all_unused_submodules()
        return Network(body, self.network.input_shapes, self.network.out_spec).train(self.network.training)

    def _add(self, node: fx.Node, sources: list[fx.Node], outputs: list[Tensor]) -> None:
        out = self.places.get(node) or Placement(self.found[node].width, tuple(range(self.found[node].width)))
        positions = []
        for source, places in zip(sources, outputs, strict=True):
            here = self.places.get(source)
            old = {own: out.positions[place] for own, place in enumerate(places.tolist())}
            if here is None:
                positions.append(tuple(old[i] for i in range(len(old))))
            else:  # the zeros of a wider operand go to the places that are left, in order
                own = {p: old[i] for i, p in enumerate(here.positions)}
                rest = iter(sorted(set(range(out.width)) - set(own.values())))
                positions.append(tuple(own[i] if i in own else next(rest) for i in range(here.width)))
        operands = tuple(self.made[source] for source in sources)
        if positions[0] == positions[1] == tuple(range(out.width)):
            self.made[node] = self.graph.call_function(aten.add.Tensor, operands)
            return
        name = str(node.target) if node.op == "call_module" else node.name
        attach(self.root, name, MixedAdd(out.width, positions[0], positions[1]))
        self.made[node] = self.graph.call_module(name, operands)

    def _copy(self, node: fx.Node, module: nn.Module | None) -> None:
        """Copy any other node; its inputs are cut back to what they were."""
        if module is not None:
            attach(self.root, str(node.target), copy.deepcopy(module))
        elif node.op == "get_attr":
            *path, last = str(node.target).split(".")
            attach(self.root, str(node.target), getattr(self.network.body.get_submodule(".".join(path)), last))
        self.made[node] = self.graph.node_copy(node, self._narrow)
        assert node not in self.places or node.op == "placeholder" or _is_whole(self.places[node])

    def _narrow(self, node: fx.Node) -> fx.Node:
        place = self.places.get(node)
        if place is None or _is_whole(place):
            return self.made[node]
        return select(self.graph, self.root, self.made[node], self.found[node].axis, place.positions)


def select(graph: fx.Graph, root: nn.Module, x: fx.Node, axis: int, positions: tuple[int, ...]) -> fx.Node:
    """Append a Gather of channels (a Slice where they are a prefix)."""
    if positions == tuple(range(len(positions))):
        return graph.call_function(aten.slice.Tensor, (x, axis, 0, len(positions)))
    name = f"select_{len(graph.nodes)}"
    attach(root, name, torch.tensor(positions, dtype=torch.int64))
    return graph.call_function(aten.index_select.default, (x, axis, graph.get_attr(name)))


def _is_whole(place: Placement) -> bool:
    return place.positions == tuple(range(place.width))


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
    if place is None:
        return new
    tensors: list[tuple[str, Any]] = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if tensor.ndim:
            wide = _spread(tensor, 0, place, 1.0 if name == "running_var" else 0.0)
            setattr(new, name, nn.Parameter(wide) if isinstance(tensor, nn.Parameter) else wide)
    if isinstance(new, nn.modules.batchnorm._BatchNorm):
        new.num_features = place.width
    elif isinstance(new, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        new.groups = new.in_channels = new.out_channels = place.width
    return new
