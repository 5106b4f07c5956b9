"""Sums that are made where they are written: slices, pad, gather, scatter, pointwise."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx, nn

from bar_edge.lowering.writer import CONVOLUTIONS, Step, Writer, pieces, rows_of
from bar_edge.network import MixedAdd
from bar_edge.network.channels import operands
from bar_edge.records.lowering import Form
from bar_edge_kernels import scatter_add

aten = torch.ops.aten


class Added:
    """Makes every sum of channels at different places."""

    def __init__(self, writer: Writer, form: dict[fx.Node, Form]) -> None:
        self.w, self.form = writer, form

    def make(self, step: Step) -> bool:
        """Make a sum in the form of its stream; elsewhere by slices."""
        node, module = step.node, step.module
        if not isinstance(module, MixedAdd):
            return False
        a, b = (self.w.live(n) for n in operands(node))
        kind = self.form[node].kind if node in self.form else "slices"
        if kind == "slices" or set(module.positions_a) != set(range(len(module.positions_a))):
            self.w.made[node] = _Sliced(self.w, node, module).summed(a, b)
            return True
        a, _ = self.w.ordered(a, module.positions_a)  # the stream so far, a prefix
        if kind == "pointwise" and self.w.rank(node) in CONVOLUTIONS:
            self.w.made[node] = self._pointwise(a, b, node, module)
            return True
        x = self.w.padded(a, node, 0, module.width - len(module.positions_a))
        if kind == "pad":
            x = self._pad(x, b, node, module)
        elif kind == "scatter" or module.positions_b == tuple(range(module.width)):
            x = added(self.w, aten.index_add.default, x, b, module.positions_b, module.width)
        else:
            x = self.w.call(aten.add.Tensor, x, self._gathered(b, node, module))
        self.w.made[node] = x
        return True

    def joined(self, node: fx.Node) -> fx.Node | None:
        """Nothing is kept in another way."""
        return None

    def _pad(self, x: fx.Node, b: fx.Node, node: fx.Node, module: MixedAdd) -> fx.Node:
        """Add a writer's channels run by run, each padded to all."""
        b, positions = self.w.ordered(b, module.positions_b)
        for start, end in pieces(positions):
            part = self.w.part(b, start, end, len(positions))
            wide = self.w.padded(part, node, positions[start], module.width - positions[end - 1] - 1)
            x = self.w.call(aten.add.Tensor, x, wide)
        return x

    def _gathered(self, b: fx.Node, node: fx.Node, module: MixedAdd) -> fx.Node:
        """Put a writer's channels in place by one Gather, zeros from a filter that is all zeros if there is one."""
        writer = self.w.network.module_of(operands(node)[1])
        zeros: list[int] = []
        if isinstance(writer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            rows = writer.weight.detach().flatten(1)
            rows = rows if writer.bias is None else torch.cat([rows, writer.bias.detach().unsqueeze(1)], 1)
            zeros = (rows == 0).all(1).nonzero().flatten().tolist()
        if not zeros:
            return self.w.scattered(b, self.w.rank(node), 1, module.width, module.positions_b)
        origin = {place: i for i, place in enumerate(module.positions_b)}
        return self.w.select(b, 1, tuple(origin.get(i, zeros[0]) for i in range(module.width)))

    def _pointwise(self, a: fx.Node, b: fx.Node, node: fx.Node, module: MixedAdd) -> fx.Node:
        """Put a writer's channels in place by a 1x1 convolution, to which runtimes add the stream; append the new.

        Where that costs no more the writer itself makes all channels of the stream, zeros among them.
        """
        source, n, before = operands(node)[1], len(module.positions_b), len(module.positions_a)
        writer = self.w.network.module_of(source)
        if writer is not None and self.w.splits(source) and _cost(writer) * (module.width - n) <= n * module.width:
            b = self.w.live(source.all_input_nodes[0])
        else:
            writer = CONVOLUTIONS[self.w.rank(node)](n, n, 1, bias=False, dtype=self.w.dtype)
            nn.init.dirac_(writer.weight)
        parts = []
        for name, first, end in (("old", 0, before), ("new", before, module.width)):
            origin = {place - first: i for i, place in enumerate(module.positions_b) if first <= place < end}
            if origin:
                rows = rows_of(writer, [origin.get(i) for i in range(end - first)])
                parts.append(self.w.apply(f"{node.name}_{name}", rows, b))
        x = a
        if any(place < before for place in module.positions_b):
            x = self.w.call(aten.add.Tensor, a, parts.pop(0))
        return self.w.concatenated([x, *parts])


@dataclasses.dataclass(frozen=True, slots=True)
class _Sliced:
    """A sum that is concatenated from runs of channels that both, one or none of its tensors have."""

    w: Writer
    node: fx.Node
    module: MixedAdd

    def summed(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """Append the sum of two tensors."""
        a, positions_a = self.w.ordered(a, self.module.positions_a)
        b, positions_b = self.w.ordered(b, self.module.positions_b)
        in_a, in_b = set(positions_a), set(positions_b)
        parts: list[fx.Node] = []
        start = done_a = done_b = gap = 0  # gap: channels that neither has, zeros
        while start < self.module.width:
            kind, end = (start in in_a, start in in_b), start
            while end < self.module.width and (end in in_a, end in in_b) == kind:
                end += 1
            n, own = end - start, []
            if kind[0]:
                own.append(self.w.part(a, done_a, done_a + n, len(positions_a)))
                done_a += n
            if kind[1]:
                own.append(self.w.part(b, done_b, done_b + n, len(positions_b)))
                done_b += n
            if own:
                part = own[0] if len(own) == 1 else self.w.call(aten.add.Tensor, *own)
                parts.append(self.w.padded(part, self.node, gap, 0))
            gap, start = 0 if own else n, end
        parts[-1] = self.w.padded(parts[-1], self.node, 0, gap)
        return self.w.concatenated(parts)


def added(w: Writer, how: Any, x: fx.Node, b: fx.Node, positions: tuple[int, ...], width: int) -> fx.Node:
    """Add b to channels of x; plainly to all of them, for which torch's exporter (2.13) writes an assignment."""
    if positions == tuple(range(width)):
        return w.call(aten.add.Tensor, x, b)
    index = w.index(positions)
    return w.call(how, x, index, b) if how is scatter_add else w.call(how, x, 1, index, b)


def _cost(convolution: nn.Module) -> int:
    """Return the multiplications per output of a convolution."""
    assert isinstance(convolution, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return convolution.weight[0].numel()
