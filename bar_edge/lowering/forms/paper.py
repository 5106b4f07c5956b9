"""The paper's form: a stream at the width of its union, a gather before every reader, a scatter-add after a writer."""

from __future__ import annotations

from torch import fx

from bar_edge.lowering.forms.added import added
from bar_edge.lowering.placement import Placement, residual_streams
from bar_edge.lowering.writer import Step, Writer
from bar_edge.network import Expand, MixedAdd
from bar_edge.network.channels import operands
from bar_edge_kernels import gather, scatter_add


class Paper:
    """Keeps streams at the width of their union."""

    def __init__(self, writer: Writer) -> None:
        self.w = writer
        self.places = {
            node: Placement(stream.width, channels)
            for stream in residual_streams(writer.network)
            for node, channels in stream.channels.items()
        }
        self.whole: dict[fx.Node, fx.Node] = {}

    def make(self, step: Step) -> bool:
        """Make sums, and what does the same to each channel of a stream."""
        if isinstance(step.module, MixedAdd):
            self._add(step.node, step.module)
        elif step.source in self.whole and step.each and not isinstance(step.module, Expand):
            if step.keeps:  # an activation on the stream, idempotent on what was not written
                self.whole[step.node] = self.w.graph.node_copy(step.node, lambda n: self.whole[n])
            else:
                self.w.copy(step.node, self.w.live)
        else:
            return False
        return True

    def joined(self, node: fx.Node) -> fx.Node | None:
        """Gather a tensor's channels from its stream."""
        index = self.w.index(self.places[node].positions)
        return self.w.call(gather, self.whole[node], index)

    def _add(self, node: fx.Node, module: MixedAdd) -> None:
        a, b = operands(node)
        rank = self.w.rank(node)
        if node not in self.places:  # a stream that stays at its own width: scattered here alone
            first = self.w.scattered(self.w.live(a), rank, 1, module.width, module.positions_a)
            self.w.made[node] = added(self.w, scatter_add, first, self.w.live(b), module.positions_b, module.width)
            return
        if a not in self.whole:
            place = self.places[a]
            self.whole[a] = self.w.scattered(self.w.made[a], rank, 1, place.width, place.positions)
        place = self.places[b]
        self.whole[node] = added(self.w, scatter_add, self.whole[a], self.w.live(b), place.positions, place.width)
