"""Sums that are made where they are read: writers' channels are joined, and summed by a convolution of 1x1."""

from __future__ import annotations

import torch
from torch import fx, nn

from bar_edge.lowering.writer import CONVOLUTIONS, Step, Writer, positions_of
from bar_edge.network.channels import operands
from bar_edge.records.lowering import Form

aten = torch.ops.aten
#: how many times a sum's channels it may be the sum of: a longer one is made before it is added to
LONGEST = 3


class Deferred:
    """Notes what a sum is the sum of, until something reads it."""

    def __init__(self, writer: Writer, form: dict[fx.Node, Form]) -> None:
        self.w, self.form = writer, form
        self.terms: dict[fx.Node, list[tuple[fx.Node, tuple[int, ...]]]] = {}  # what, and where
        self.together: dict[tuple[fx.Node, ...], fx.Node] = {}

    def make(self, step: Step) -> bool:
        """Note a sum, or make a BatchNorm part of the convolution that sums."""
        if step.node in self.form and self.form[step.node].kind == "deferred" and self._defers(step.node):
            self._defer(step.node)
        elif step.source in self.terms and (norm := self._norm(step.node)) is not None:
            self.w.made[step.node] = self._summed(step.source, norm)
        else:
            return False
        return True

    def joined(self, node: fx.Node) -> fx.Node | None:
        """Make a sum that something reads."""
        return self._summed(node) if node in self.terms else None

    def _defers(self, node: fx.Node) -> bool:
        return self.w.found[node].kind == "add" and self.w.sums(node) and self.w.rank(node) in CONVOLUTIONS

    def _defer(self, node: fx.Node) -> None:
        """Note what a sum is the sum of, and where each channel of that goes; make those that grew too long."""
        positions = positions_of(self.w.network.module_of(node), self.w.found[node].width)
        self.terms[node] = []
        for source, places in zip(operands(node), positions, strict=True):
            terms = self.terms.get(source, []) if source not in self.w.made else []
            if not terms or sum(len(own) for _, own in terms) > LONGEST * len(places):
                terms = [(self.w.live(source), tuple(range(len(places))))]
            self.terms[node] += [(x, tuple(places[i] for i in own)) for x, own in terms]

    def _summed(self, node: fx.Node, norm: nn.modules.batchnorm._BatchNorm | None = None) -> fx.Node:
        """Join what a sum is the sum of, and sum it by a convolution of 1x1, a BatchNorm behind it in it."""
        tensors = tuple(x for x, _ in self.terms[node])
        if tensors not in self.together:
            before = self.together.get(tensors[:-1])
            parts = list(tensors) if before is None else [before, tensors[-1]]
            self.together[tensors] = self.w.call(aten.cat.default, parts, 1)
        places = torch.tensor([place for _, own in self.terms[node] for place in own])
        kind, width = CONVOLUTIONS[self.w.rank(node)], self.w.found[node].width
        summing = kind(len(places), width, 1, bias=False, dtype=self.w.dtype).eval()
        with torch.no_grad():
            summing.weight.zero_()[places, torch.arange(len(places))] = 1
        summing = summing if norm is None else nn.utils.fuse_conv_bn_eval(summing, norm)
        return self.w.apply(f"{node.name}_summed_{len(self.w.graph.nodes)}", summing, self.together[tensors])

    def _norm(self, node: fx.Node) -> nn.modules.batchnorm._BatchNorm | None:
        """Return a BatchNorm that can become part of the convolution before it."""
        norm = self.w.network.module_of(node)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or str(node.target) in self.w.again:
            return None
        return norm if norm.running_mean is not None else None
