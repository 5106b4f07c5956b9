"""Copying a network's graph, node by node, into a new network."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from bar_edge.network.graph_json import attach
from bar_edge.network.network import Network


class Rewriter:
    """A graph on its way from an old network to a new one; made: what became of every node of the old one.

    use_up: the new network takes the old one's modules and tensors, and the old one is not to be used again.
    """

    def __init__(self, network: Network, *, use_up: bool = False) -> None:
        self.network = network
        self.root: nn.Module = network.body if use_up else nn.Module()
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}

    def attach(self, name: str, value: nn.Module | Tensor) -> None:
        """Give the new network a module or tensor of its own."""
        attach(self.root, name, value)

    def apply(self, name: str, module: nn.Module, *inputs: fx.Node) -> fx.Node:
        """Append a call of a module of the new network's own."""
        self.attach(name, module)
        return self.graph.call_module(name, inputs)

    def copy(self, node: fx.Node, given: Callable[[fx.Node], fx.Node] | None = None) -> None:
        """Copy a node; given: what it reads instead of its inputs, by default what became of them."""
        self.made[node] = self.graph.node_copy(node, given or self.made.__getitem__)

    def free_name(self, wanted: str) -> str:
        """Return a name for a part of the new network that no part of either network has."""
        names = itertools.chain([wanted], (f"{wanted}_{i}" for i in itertools.count(1)))
        return next(name for name in names if not hasattr(self.root, name) and not hasattr(self.network.body, name))

    def finish(self) -> Network:
        """Return the new network, without what nobody reads, on the device and in the mode of the old one."""
        device = next((t.device for t in self.network.body.state_dict().values()), torch.device("cpu"))
        body = fx.GraphModule(self.root.to(device), self.graph)
        body.graph.eliminate_dead_code()
        body.recompile()
        body.delete_all_unused_submodules()
        return Network(body, self.network.input_shapes, self.network.out_spec).train(self.network.training)
