"""Streams kept in runs of channels: a convolution makes a run, and the runtime adds what was there before."""

from __future__ import annotations

import itertools

import torch
from torch import fx

from bar_edge.lowering.writer import Step, Writer, pieces, rows_of
from bar_edge.surgery.stream_order import Stream

aten = torch.ops.aten
#: applied again they change nothing
IDEMPOTENT = {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default}


class Blocks:
    """Keeps tensors of streams in runs of channels."""

    def __init__(self, writer: Writer, streams: list[Stream]) -> None:
        self.w = writer
        self.runs = {node: runs for stream in streams for node, runs in _runs(stream).items()}
        self.parts: dict[fx.Node, dict[int, fx.Node]] = {}  # by the run's first channel

    def make(self, step: Step) -> bool:
        """Make a sum, an activation or a convolution run by run."""
        node = step.node
        if node in self.runs and step.passage is not None and step.passage.kind == "add" and self.w.sums(node):
            self._add(node)
        elif step.source in self.parts and step.keeps:
            self.parts[node] = {k: self._once(node, part) for k, part in self.parts[step.source].items()}
        elif node in self.runs and step.passage is not None and len(self.runs[node]) > 1 and self.w.splits(node):
            self._split(node)
        else:
            return False
        return True

    def joined(self, node: fx.Node) -> fx.Node | None:
        """Concatenate the runs of a tensor."""
        return self.w.concatenated(list(self.parts[node].values())) if node in self.parts else None

    def _add(self, node: fx.Node) -> None:
        a, b = (self._in_parts(source) for source in node.all_input_nodes)
        sums = {}
        for first, _, _ in self.runs[node]:
            pair = tuple(parts[first] for parts in (a, b) if first in parts)
            sums[first] = pair[0] if len(pair) == 1 else self.w.call(aten.add.Tensor, *pair)
        self.parts[node] = sums

    def _in_parts(self, node: fx.Node) -> dict[int, fx.Node]:
        if node not in self.parts:
            x, width = self.w.live(node), self.w.found[node].width
            self.parts[node] = {first: self.w.part(x, start, end, width) for first, start, end in self.runs[node]}
        return self.parts[node]

    def _once(self, node: fx.Node, part: fx.Node) -> fx.Node:
        """Apply an operator on each channel to a part; not again where that would change nothing."""
        same = part.target == node.target and part.args[1:] == node.args[1:] and part.kwargs == node.kwargs
        if same and node.target in IDEMPOTENT:
            return part
        return self.w.graph.node_copy(node, lambda _: part)

    def _split(self, node: fx.Node) -> None:
        """Make one convolution per run."""
        module, x = self.w.network.module_of(node), self.w.live(node.all_input_nodes[0])
        assert module is not None
        self.parts[node] = {}
        for first, start, end in self.runs[node]:
            name = f"{node.target}.run_{first}".replace(".", "_")
            self.parts[node][first] = self.w.apply(name, rows_of(module, range(start, end)), x)


def _runs(stream: Stream) -> dict[fx.Node, list[tuple[int, int, int]]]:
    """Cut a stream's channels into runs that every tensor holds as a whole and in one piece, or not at all.

    Returns for every tensor, in its own order: the run's first channel, and from where to where it lies.
    """
    cuts: set[int] = set()
    for channels in stream.channels.values():
        for start, end in pieces(channels):
            cuts |= {channels[start], channels[end - 1] + 1}
    return {
        node: [
            (channels[start], start, end)
            for start, end in itertools.pairwise(
                [i for i, c in enumerate(channels) if c in cuts or not i or channels[i - 1] != c - 1] + [len(channels)]
            )
        ]
        for node, channels in stream.channels.items()
    }
