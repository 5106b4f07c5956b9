"""Where the gates of a network sit, and which of them can bring a channel of a tensor to life."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from bar_edge.errors import InputError
from bar_edge.network import Network, prunable
from bar_edge.network.channels import Link, Passage, called_again, is_whole
from bar_edge.network.counted_cost import CostCounter
from bar_edge.network.cross_check import uncounted_flops
from bar_edge.network.graph_json import safe_name
from bar_edge.network.liveness import held_channels
from bar_edge.network.priced_operations import LatencyCounter
from bar_edge.network.prunable import scaled_by
from bar_edge.records import COSTS, ChannelPlan, Metric
from bar_edge.records.latency_table import LatencyTable
from bar_edge.surgery.stream_order import is_identity


@dataclasses.dataclass(frozen=True, slots=True)
class Writers:
    """Which gates write which channels of a tensor: channel[i] is alive if gate[i] is open; always: without a gate."""

    gate: Tensor
    channel: Tensor
    always: Tensor
    _copies: dict[torch.device, Writers] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def alive(self, opened: Tensor) -> Tensor:
        """Return the (..., width) 0/1 mask of channels with an open writer; opened: (..., gates) of 0 and 1."""
        own = self._on(opened.device)
        always = own.always.to(opened.dtype).expand(*opened.shape[:-1], -1)
        return always.index_add(-1, own.channel, opened[..., own.gate]).clamp(max=1)

    def probability(self, p: Tensor) -> Tensor:
        """Return the probability (width,) that a channel has an open writer; p: (gates,) of being open."""
        own = self._on(p.device)
        nobody = torch.zeros_like(own.always, dtype=p.dtype).index_add(0, own.channel, torch.log1p(-p[own.gate]))
        return 1 - (1 - own.always.to(p.dtype)) * nobody.exp()

    def _on(self, device: torch.device) -> Writers:
        """Return the same on a device; copied there once."""
        if self.gate.device == device:
            return self
        if device not in self._copies:
            self._copies[device] = Writers(self.gate.to(device), self.channel.to(device), self.always.to(device))
        return self._copies[device]


class GateLayout:
    """All gates of a network in one vector: one per output channel of every prunable layer.

    keep: patterns of layer names (`head.*`, fnmatch) that are not pruned, or that keep at least so many
    channels (`stages.0.*=8`). round_to: widths end as multiples of it. offsets: layer name -> (first gate,
    number of gates), in graph order. least: layer name -> least width, of whole layers their own. writers:
    per tensor, over gates and products. table: what prices the network in ms. A product of two
    tensors that are both gated has one entry per channel behind the gates (`extended`). uncounted: FLOPs that
    belong to no convolution. Raises InputError for a pattern that fits no layer, and for convolutions that cannot
    be counted.
    """

    def __init__(
        self,
        network: Network,
        *,
        keep: tuple[str, ...] = (),
        round_to: int = 1,
        table: LatencyTable | None = None,
    ) -> None:
        self.network, self.found, self.round_to = network, network.channels, round_to
        self.keep, self.table = keep, table
        self.uncounted = uncounted_flops(network)
        reasons = prunable(network)
        widths = {str(node.target): self.found[node].width for node in self.found if str(node.target) in reasons}
        whole, self.least = _kept_layers(reasons, widths, keep)
        self.offsets: dict[str, tuple[int, int]] = {}
        self.size = 0
        self.follows: dict[fx.Node, fx.Node] = {}
        for node, passage in self.found.items():
            name = str(node.target)
            if passage.kind != "read" or name in whole or name in self.offsets:
                continue
            if reasons[name] == "":
                self.offsets[name] = (self.size, passage.width)
                self.size += passage.width
            elif (product := scaled_by(network, node)) is not None:
                self.follows[node] = product
        self.products: list[tuple[Writers, Writers]] = []
        self.writers = self._all_writers()
        self.groups = _groups(network, self.offsets)
        self.costs = CostCounter(network)
        self.latency = LatencyCounter(network, table) if table is not None else None

    def __deepcopy__(self, memo: dict[int, object]) -> GateLayout:
        """Return the layout itself: it describes the graph, copies of a gated network share it."""
        return self

    def plan(self, opened: Tensor) -> ChannelPlan:
        """Return the plan that keeps the open gates; opened: (gates,) bool."""
        return ChannelPlan(network=self.network.fingerprint, kept=self.kept(opened))

    def kept(self, opened: Tensor) -> dict[str, tuple[int, ...]]:
        """Return the kept channels of every gated layer by name."""
        flags = opened.cpu()
        return {
            name: tuple(flags[first : first + n].nonzero().flatten().tolist())
            for name, (first, n) in self.offsets.items()
        }

    def cost(self, kept: Mapping[str, Sequence[int]], metric: Metric) -> float:
        """Return what kept channels cost, dead layers removed; ms by the table."""
        if COSTS[metric].of_device:
            assert self.latency is not None, "budget_limit refuses milliseconds without a table"
            return self.latency.ms(kept)
        return self.costs.total(kept, COSTS[metric])

    def extended(self, opened: Tensor) -> Tensor:
        """Return the gates (..., gates) of 0 and 1 with the channels of products appended."""
        for a, b in self.products:
            opened = torch.cat([opened, a.alive(opened) * b.alive(opened)], -1)
        return opened

    def living(self, opened: Tensor) -> Tensor:
        """Return the open gates (gates,) bool whose channels are fed and read."""
        held = held_channels(self.network, self.kept(opened))
        return opened & torch.cat([torch.stack([held[call] for call in self.calls(n)]).any(0) for n in self.offsets])

    def extended_probability(self, p: Tensor) -> Tensor:
        """Return the gates' probabilities (gates,) with those of products appended."""
        for a, b in self.products:
            p = torch.cat([p, a.probability(p) * b.probability(p)])
        return p

    def calls(self, name: str) -> list[fx.Node]:
        """Return the calls of a gated layer."""
        return [node for node in self.found if node.op == "call_module" and node.target == name]

    def node(self, name: str) -> fx.Node:
        """Return the first call of a gated layer."""
        return self.calls(name)[0]

    def followers(self, name: str) -> list[str]:
        """Return the BatchNorms on which the gates of a layer act, [] if on its own filters.

        The BatchNorm that alone reads it; or all its readers if they are BatchNorms (pre-activation: a
        factor before them would be normalised away, so it acts after them).
        """
        users = list(self.node(name).users)
        norms = [u for u in users if isinstance(self.network.module_of(u), nn.modules.batchnorm._BatchNorm)]
        again = called_again(self.network)
        ruled = len(norms) == len(users) and all(self.found[u].kind == "map" for u in norms)
        ruled = ruled and not again & {name, *(str(u.target) for u in norms)}
        return [str(u.target) for u in norms] if ruled else []

    def _all_writers(self) -> dict[fx.Node, Writers]:
        writers: dict[fx.Node, Writers] = {}
        none = torch.zeros(0, dtype=torch.int64)
        end = self.size
        for node, passage in self.found.items():
            gate, channel, always = none, none, torch.zeros(passage.width)
            if passage.kind == "read" and str(node.target) in self.offsets:
                first, n = self.offsets[str(node.target)]
                gate, channel = torch.arange(first, first + n), torch.arange(n)
            elif passage.kind == "read" or is_whole(passage):
                always = torch.ones(passage.width)
            elif passage.kind == "mul":
                writers[node], end = self._product(passage, writers, end)
                continue
            for link in passage.links:
                through = _follow(writers[link.source], link, passage.width)
                gate, channel = torch.cat([gate, through.gate]), torch.cat([channel, through.channel])
                always = always.maximum(through.always)
            writers[node] = Writers(*_once(gate, channel, passage.width), always)
        return writers

    def _product(self, passage: Passage, writers: dict[fx.Node, Writers], end: int) -> tuple[Writers, int]:
        """Return the writers of a product: its only gated operand's, else new entries behind the gates."""
        factors = [_follow(writers[link.source], link, passage.width) for link in passage.links]
        gated = [w for w in factors if not w.always.all()] or factors[:1]
        if len(gated) == 1 or _same(*gated):
            return gated[0], end
        self.products.append((gated[0], gated[1]))
        every = torch.arange(passage.width)
        return Writers(end + every, every, gated[0].always * gated[1].always), end + passage.width


def _kept_layers(
    reasons: dict[str, str], widths: dict[str, int], keep: tuple[str, ...]
) -> tuple[set[str], dict[str, int]]:
    """Return the layers that stay whole, and the least widths of all that could be pruned."""
    whole, least = set[str](), dict[str, int]()
    for item in keep:
        pattern, equals, number = item.partition("=")
        names = fnmatch.filter(widths, pattern) or fnmatch.filter(widths, safe_name(pattern))  # the user's own name
        if not names or (equals and not number.isdigit()):
            raise InputError(
                "--keep PATTERN or PATTERN=WIDTH, with a pattern that fits a convolution or linear layer",
                got=item,
                consequence="nothing was started",
                remedy=f"`bar-edge inspect` lists the names, as {', '.join(list(reasons)[:3])}",
            )
        if number:
            least |= {name: max(int(number), least.get(name, 0)) for name in names}
        else:
            whole |= set(names)
    least = {name: min(n, widths[name]) for name, n in least.items()} | {name: widths[name] for name in whole}
    return whole, {name: n for name, n in least.items() if reasons[name] == ""}


def _groups(network: Network, offsets: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Return in how many equal runs the channels of gated layers are read or made by grouped convolutions."""
    found = network.channels
    groups: dict[str, int] = {}
    for node, passage in found.items():
        if passage.kind != "read" or passage.groups == 1:
            continue
        source = node.all_input_nodes[0]
        while is_identity(found[source]):
            source = found[source].links[0].source
        for name in {str(node.target), str(source.target)} & offsets.keys():
            groups[name] = math.lcm(groups.get(name, 1), passage.groups)
    return {name: g for name, g in groups.items() if offsets[name][1] % g == 0}


def _same(a: Writers, b: Writers) -> bool:
    return torch.equal(a.gate, b.gate) and torch.equal(a.channel, b.channel) and torch.equal(a.always, b.always)


def _once(gate: Tensor, channel: Tensor, width: int) -> tuple[Tensor, Tensor]:
    pairs = torch.unique(gate * width + channel)
    return pairs // width, pairs % width


def _follow(writers: Writers, link: Link, width: int) -> Writers:
    """Return the writers of a tensor's channels as seen through a link."""
    order = torch.argsort(writers.channel, stable=True)
    channel, gate = writers.channel[order].contiguous(), writers.gate[order]
    inputs = link.inputs.contiguous()
    first = torch.searchsorted(channel, inputs)
    number = torch.searchsorted(channel, inputs, right=True) - first
    entry = torch.repeat_interleave(torch.arange(len(inputs)), number)
    within = torch.arange(len(entry)) - torch.repeat_interleave(number.cumsum(0) - number, number)
    always = torch.zeros(width).index_add(0, link.outputs, writers.always[inputs]).clamp(max=1)
    return Writers(gate[first[entry] + within], link.outputs[entry], always)
