"""Where the gates of a network sit, and which of them can bring a channel of a tensor to life."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx, nn

from bar_edge.network import Network, prunable
from bar_edge.network.channels import Link, Passages, passages
from bar_edge.records import ChannelPlan


@dataclasses.dataclass(frozen=True, slots=True)
class Writers:
    """Which gates write which channels of a tensor: channel[i] is alive if gate[i] is open; always: without a gate."""

    gate: Tensor
    channel: Tensor
    always: Tensor

    def alive(self, opened: Tensor) -> Tensor:
        """Return the (width,) 0/1 mask of channels with an open writer; opened: (gates,) of 0 and 1."""
        always = self.always.to(opened)
        return always.index_add(0, self.channel.to(opened.device), opened[self.gate.to(opened.device)]).clamp(max=1)


class GateLayout:
    """All gates of a network in one vector: one per output channel of every prunable convolution.

    offsets: convolution name -> (first gate, number of gates), in graph order. writers: per tensor.
    """

    def __init__(self, network: Network) -> None:
        self.network, self.found = network, passages(network)
        reasons = prunable(network, self.found)
        self.offsets: dict[str, tuple[int, int]] = {}
        self.size = 0
        for node, passage in self.found.items():
            if passage.kind == "read" and reasons.get(str(node.target)) == "":
                self.offsets[str(node.target)] = (self.size, passage.width)
                self.size += passage.width
        self.writers = _all_writers(self.found, self.offsets)

    def plan(self, opened: Tensor) -> ChannelPlan:
        """Return the plan that keeps the open gates; opened: (gates,) bool."""
        return ChannelPlan(network=self.network.fingerprint, kept=self.kept(opened))

    def kept(self, opened: Tensor) -> dict[str, tuple[int, ...]]:
        """Return the kept channels of every gated convolution by name."""
        flags = opened.cpu()
        return {
            name: tuple(flags[first : first + n].nonzero().flatten().tolist())
            for name, (first, n) in self.offsets.items()
        }

    def node(self, name: str) -> fx.Node:
        """Return the call of a gated convolution."""
        return next(node for node in self.found if node.op == "call_module" and node.target == name)

    def followers(self, name: str) -> list[str]:
        """Return the BatchNorms on which the gates of a convolution act, [] if on its own filters.

        The BatchNorm that alone reads it; or all its readers if they are BatchNorms (pre-activation: a
        factor before them would be normalised away, so it acts after them).
        """
        users = list(self.node(name).users)
        norms = [u for u in users if isinstance(self.network.module_of(u), nn.modules.batchnorm._BatchNorm)]
        ruled = len(norms) == len(users) and all(self.found[u].kind == "map" for u in norms)
        return [str(u.target) for u in norms] if ruled else []


def _all_writers(found: Passages, offsets: dict[str, tuple[int, int]]) -> dict[fx.Node, Writers]:
    writers: dict[fx.Node, Writers] = {}
    none = torch.zeros(0, dtype=torch.int64)
    for node, passage in found.items():
        gate, channel, always = none, none, torch.zeros(passage.width)
        if passage.kind == "read" and str(node.target) in offsets:
            first, n = offsets[str(node.target)]
            gate, channel = torch.arange(first, first + n), torch.arange(n)
        elif passage.kind in ("source", "read", "opaque"):
            always = torch.ones(passage.width)
        for link in passage.links:
            g, c = _follow(writers[link.source], link)
            gate, channel = torch.cat([gate, g]), torch.cat([channel, c])
            always[link.outputs] = always[link.outputs].maximum(writers[link.source].always[link.inputs])
        if len(passage.links) > 1 and len(gate):
            pairs = torch.unique(gate * passage.width + channel)
            gate, channel = pairs // passage.width, pairs % passage.width
        writers[node] = Writers(gate, channel, always)
    return writers


def _follow(writers: Writers, link: Link) -> tuple[Tensor, Tensor]:
    """Return the (gate, channel) pairs of a tensor as seen through a link."""
    order = torch.argsort(writers.channel, stable=True)
    channel, gate = writers.channel[order], writers.gate[order]
    first = torch.searchsorted(channel, link.inputs)
    number = torch.searchsorted(channel, link.inputs, right=True) - first
    entry = torch.repeat_interleave(torch.arange(len(link.inputs)), number)
    within = torch.arange(len(entry)) - torch.repeat_interleave(number.cumsum(0) - number, number)
    return gate[first[entry] + within], link.outputs[entry]
