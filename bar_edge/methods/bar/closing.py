"""Which gates close next: those with the least importance for what closing them saves.

Importance of a gate: the mean over steps of (dL/dz)^2, by first order the square of what the loss loses if z goes from
1 to 0 (Molchanov et al. 2019, eq. 8, with one z per channel). Its price is what the network costs more with it, at the
present widths of everything else, on a device in the device's own steps. The choice is the greedy one of knapsack
problems, as in HALP (Shen et al. 2022), over moves from one useful width of a layer or stream to another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bar_edge.methods.gating.gate_cost import gate_cost
from bar_edge.methods.gating.layout import GateLayout
from bar_edge.methods.gating.projection import protected_gates
from bar_edge.records import COSTS, Metric

#: counted costs: widths fall by this share of a layer at a time
_SHARE = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Tier:
    """Channels that become fewer together: of one layer, or of a stream with all its writers.

    gate, channel: (entries,) which gates bring which channel to life; width: channels; unit: they go in so many;
    levels: widths worth having, ascending; dying: gates (n,) that die with the whole layer, None if it may not go.
    """

    gate: Tensor
    channel: Tensor
    width: int
    unit: int
    levels: tuple[int, ...]
    dying: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """Gates (gates,) bool that close together, and the importance that goes with them."""

    gates: Tensor
    lost: Tensor


class Closer:
    """Closes gates of a network, the least important for what they cost first; one metric."""

    def __init__(self, layout: GateLayout, metric: Metric) -> None:
        self.layout, self.metric = layout, metric
        self.price = gate_cost(layout, metric)
        self.protected = protected_gates(layout, metric)
        #: (gates,) the layer of each gate
        self.layer = torch.cat([torch.full((n,), i) for i, (_, n) in enumerate(layout.offsets.values())])
        self.tiers = [*self._layers(), *self._streams()]
        #: what everything costs, open
        self.full = self.cost(torch.ones(layout.size, dtype=torch.bool))

    def cost(self, opened: Tensor) -> float:
        """Return what the network costs with these gates open, (gates,) bool, dead layers removed."""
        return self.layout.cost(self.layout.kept(opened), self.metric)

    def close(self, opened: Tensor, importance: Tensor, limit: float) -> Iterator[tuple[Tensor, float]]:
        """Yield sets of gates in the order in which they close, each with the cost that it leaves.

        opened: (gates,) bool; importance: (gates,). Ends when the rest costs at most `limit` or nothing can be closed.
        """
        opened, importance = opened.cpu().clone(), importance.detach().cpu().double()
        spent = self.cost(opened)
        moves = [self._moves(tier, opened, importance) for tier in self.tiers] if spent > limit else []
        while spent > limit:
            best = self._best([move for own in moves for move in own], opened)
            if best is None:
                return
            before = opened
            opened = self.layout.living(opened & ~best)
            closed = before & ~opened
            spent = self.cost(opened)
            yield closed.nonzero().flatten(), spent
            for i, tier in enumerate(self.tiers):
                if bool(closed[tier.gate].any()):
                    moves[i] = self._moves(tier, opened, importance)

    def _best(self, moves: list[Move], opened: Tensor) -> Tensor | None:
        """Return the gates (gates,) bool of the move that loses least per cost saved, None if none saves anything."""
        if not moves:
            return None
        closed = torch.stack([move.gates for move in moves]) & opened
        lost = torch.stack([move.lost for move in moves])
        after = opened & ~closed
        allowed = torch.ones(len(after), dtype=torch.bool)
        for ids, n in self.protected:
            allowed &= after[:, ids].sum(1) >= n
        costs = self.price.hard_each(torch.cat([after, opened[None]]))
        saved = costs[-1] - costs[:-1]
        ratio = torch.where(allowed & (saved > 1e-9 * self.full), lost / saved, torch.inf)
        best = int(ratio.argmin())
        return closed[best] if bool(ratio[best].isfinite()) else None

    def _moves(self, tier: Tier, opened: Tensor, importance: Tensor) -> list[Move]:
        """Return what leads a tier to lower widths, or away.

        A layer that goes takes others along, before or behind it in a chain: what is lost is the chain, once.
        """
        there = opened[tier.gate]
        gate, channel = tier.gate[there], tier.channel[there]
        alive = torch.zeros(tier.width, dtype=torch.bool).index_fill(0, channel, True)
        width = int(alive.sum())
        below = [n for n in tier.levels if n < width]
        targets = {below[-1], below[len(below) // 2]} if below else set[int]()
        moves = []
        if width and targets:
            score = torch.zeros(tier.width, dtype=importance.dtype).index_add(0, channel, importance[gate])
            # channels in units with one of each group, the units by their sums
            units = torch.where(alive, score, torch.inf).view(tier.unit, -1).sort(dim=1)
            order = (units.indices + torch.arange(tier.unit)[:, None] * units.indices.shape[1]).T.flatten()
            for target in targets:
                out = torch.zeros(tier.width, dtype=torch.bool)
                out[order[: width - target]] = True
                closed = gate[out[channel]]
                lost = self._lost(closed, opened, importance)
                moves.append(Move(torch.zeros_like(opened).index_fill(0, closed, True), lost))
        if width and tier.dying is not None:
            lost = self._lost(gate, opened, importance)
            moves.append(Move(torch.zeros_like(opened).index_fill(0, tier.dying, True), lost))
        return moves

    def _lost(self, closed: Tensor, opened: Tensor, importance: Tensor) -> Tensor:
        """Return what the loss loses by closing gates (n,): in each layer, with what is closed there already.

        Channels of a layer do alike things, so that their losses add up before they are squared: the first
        channels of a layer are cheap, the last ones dear.
        """
        roots = importance.sqrt()
        before = torch.zeros(int(self.layer[-1]) + 1, dtype=roots.dtype).index_add(0, self.layer, roots * ~opened)
        after = before.index_add(0, self.layer[closed], roots[closed])
        return (after.square() - before.square()).sum()

    def _levels(self, width: int, unit: int) -> tuple[int, ...]:
        """Return the widths that are worth having: where the device's cost steps, or shares of the whole width."""
        if COSTS[self.metric].of_device and self.layout.latency is not None:
            found = {self.layout.latency.table.stepped(n) for n in range(1, width)}
        else:
            found = {-(-width * i // _SHARE) for i in range(1, _SHARE)}
        return tuple(sorted({-(-n // unit) * unit for n in found} - {width}))

    def _layers(self) -> Iterator[Tier]:
        """Yield a tier for every gated layer; with what dies if all of it closes."""
        everything = torch.ones(self.layout.size, dtype=torch.bool)
        for name, (first, n) in self.layout.offsets.items():
            own = torch.arange(first, first + n)
            without = everything.index_fill(0, own, False)
            dying = (everything & ~self.layout.living(without)).nonzero().flatten()
            needed = any(int((~torch.isin(ids, dying)).sum()) < least for ids, least in self.protected)
            groups = self.layout.groups.get(name, 1)
            levels = self._levels(n, math.lcm(groups, self.layout.round_to))
            yield Tier(own, torch.arange(n), n, groups, levels, None if needed else dying)

    def _streams(self) -> Iterator[Tier]:
        """Yield a tier for every tensor that layers read and several layers write."""
        layout, seen = self.layout, set[tuple[int, ...]]()
        for node, passage in layout.found.items():
            writers = layout.writers[node]
            key = tuple(writers.gate.tolist())
            read = any(layout.found[user].kind == "read" for user in node.users if user in layout.found)
            several = len(key) > len(torch.unique(writers.channel))
            free = not writers.always.any() and max(key, default=layout.size) < layout.size
            if read and several and free and key not in seen and layout.round_to == 1 and not layout.groups:
                seen.add(key)
                levels = self._levels(passage.width, 1)
                yield Tier(writers.gate, writers.channel, passage.width, 1, levels)
