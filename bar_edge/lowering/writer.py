"""The graph that lowering writes: what stands for each node of the network, and how channels are moved in it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from bar_edge.lowering.placement import plain_reader, plain_sum
from bar_edge.lowering.widen import select
from bar_edge.network import Expand, MixedAdd, Network
from bar_edge.network.channels import Passage, called_again
from bar_edge.network.movement import MOVEMENTS
from bar_edge.network.rewriter import Rewriter
from bar_edge.surgery.stream_order import is_identity

aten = torch.ops.aten
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
#: rank of a tensor -> what convolves it
CONVOLUTIONS: dict[int, type[Convolution]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One node of the network that is to be made."""

    node: fx.Node
    module: nn.Module | None
    passage: Passage | None
    #: where its channels come from first
    source: fx.Node | None
    #: whether it does the same to each channel, and whether that is an operator that keeps zeros, of this tensor alone
    each: bool
    keeps: bool


class Family(Protocol):
    """Forms that are made alike."""

    def make(self, step: Step) -> bool:
        """Make a node; False where it is not for this family."""

    def joined(self, node: fx.Node) -> fx.Node | None:
        """Return as one tensor, with its live channels, what the family keeps in another way; None if it does not."""


class Writer(Rewriter):
    """Copies the graph of a network, which is used up, node by node; families of forms make what they know."""

    def __init__(self, network: Network) -> None:
        super().__init__(network, use_up=True)
        self.found, self.again = network.channels, called_again(network)
        self.families: tuple[Family, ...] = ()

    def run(self, *families: Family) -> Network:
        """Return the network that the families make; the first that makes a node does."""
        self.families = families
        for node in self.network.nodes:
            step = self._step(node)
            if not any(family.make(step) for family in families):
                if isinstance(step.module, Expand):
                    self.made[node] = self._expanded(step.module, self.live(node.all_input_nodes[0]))
                else:
                    self.copy(node, self.live)
        return self.finish()

    def _step(self, node: fx.Node) -> Step:
        passage = self.found.get(node)
        source = passage.links[0].source if passage is not None and passage.links else None
        each = passage is not None and is_identity(passage) and node.op == "call_function"
        alone = each and node.all_input_nodes == [source] and node.target not in MOVEMENTS
        keeps = alone and passage is not None and passage.keeps_zero and passage.axis == 1
        return Step(node, self.network.module_of(node), passage, source, each, keeps)

    def live(self, node: fx.Node) -> fx.Node:
        """Return a tensor with its live channels, joined on first use where a family keeps it in another way."""
        if node not in self.made:
            joined = (family.joined(node) for family in self.families)
            self.made[node] = next(x for x in joined if x is not None)
        return self.made[node]

    def rank(self, node: fx.Node) -> int:
        """Return the number of axes of a tensor."""
        return len(self.network.shapes[node.name])

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights."""
        return next(self.network.body.parameters()).dtype

    # --------------------------------------------------------------------------------- what is appended

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Append an operator."""
        return self.graph.call_function(target, args)

    def index(self, positions: tuple[int, ...]) -> fx.Node:
        """Append a constant of positions."""
        name = f"index_{len(self.graph.nodes)}"
        self.attach(name, torch.tensor(positions, dtype=torch.int64))
        return self.graph.get_attr(name)

    def select(self, x: fx.Node, axis: int, positions: tuple[int, ...]) -> fx.Node:
        """Append a choice of channels."""
        return select(self.graph, self.root, x, axis, positions)

    def concatenated(self, parts: list[fx.Node]) -> fx.Node:
        """Append a concatenation of channels."""
        return self.call(aten.cat.default, parts, 1) if len(parts) > 1 else parts[0]

    def part(self, x: fx.Node, start: int, end: int, width: int) -> fx.Node:
        """Append a slice of channels, unless it is all of them."""
        return x if (start, end) == (0, width) else self.call(aten.slice.Tensor, x, 1, start, end)

    def padded(self, x: fx.Node, node: fx.Node, before: int, after: int) -> fx.Node:
        """Append zero channels on both sides, in a tensor of the rank of `node`."""
        if not before and not after:
            return x
        space = [0, 0] * (self.rank(node) - 2)
        return self.call(aten.constant_pad_nd.default, x, [*space, before, after])

    def ordered(self, x: fx.Node, positions: tuple[int, ...]) -> tuple[fx.Node, tuple[int, ...]]:
        """Bring channels into the order of their positions; returns them with their positions."""
        order = sorted(range(len(positions)), key=positions.__getitem__)
        if order == list(range(len(order))):
            return x, positions
        return self.select(x, 1, tuple(order)), tuple(sorted(positions))

    def scattered(self, x: fx.Node, rank: int, axis: int, width: int, positions: tuple[int, ...]) -> fx.Node:
        """Append zeros, then put the channels in place, without asking for the shape of x."""
        after = [0, 0] * (rank - 1 - axis)
        if positions == tuple(range(len(positions))):
            return self.call(aten.constant_pad_nd.default, x, [*after, 0, width - len(positions)])
        padded = self.call(aten.constant_pad_nd.default, x, [*after, 0, 1])
        origin = {place: i for i, place in enumerate(positions)}
        return self.select(padded, axis, tuple(origin.get(i, len(positions)) for i in range(width)))

    def _expanded(self, module: Expand, x: fx.Node) -> fx.Node:
        rank = self.rank(next(n for n, m in self.made.items() if m is x))
        return self.scattered(x, rank, module.axis, module.width, module.positions)

    # ------------------------------------------------------------------------------------ what nodes are

    def sums(self, node: fx.Node) -> bool:
        """Tell whether a node is a sum of two tensors and no more."""
        return plain_sum(self.network, self.found[node], node) and len(set(node.all_input_nodes)) == 2

    def splits(self, node: fx.Node) -> bool:
        """Tell whether a node is a convolution of which a part of the channels can be made."""
        passage, module = self.found[node], self.network.module_of(node)
        convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and plain_reader(passage, module)
        return passage.kind == "read" and convolution and str(node.target) not in self.again


def positions_of(module: nn.Module | None, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where the channels of the two tensors of a sum go."""
    every = tuple(range(width))
    return (module.positions_a, module.positions_b) if isinstance(module, MixedAdd) else (every, every)


def pieces(positions: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return from where to where the positions go up in steps of one."""
    starts = [i for i, p in enumerate(positions) if not i or positions[i - 1] != p - 1]
    return list(itertools.pairwise([*starts, len(positions)]))


def rows_of(module: nn.Module, rows: Sequence[int | None]) -> nn.Module:
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
