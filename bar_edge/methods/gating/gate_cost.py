"""What a network costs as a function of its gates: hard, for the barrier, and expected, for the gradient.

Volume: sum of area * E[n_out]; FLOPs: 2 k^2 area E[n_in] E[n_out]; parameters alike. A stream's channel
exists unless all its writers are closed: E[n] = sum over channels of 1 - product of (1 - p). Latency: by a table,
at these widths.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor, fx, nn

from bar_edge.methods.gating.layout import GateLayout
from bar_edge.network.counted_cost import loose_params, units
from bar_edge.network.priced_operations import PricedOperations
from bar_edge.records import COSTS, Metric


class Cost(nn.Module, abc.ABC):
    """What a network costs as a function of its gates; these are independent, dead layers are not yet removed."""

    always: Tensor
    single_gate: Tensor
    single_row: Tensor
    slot_gate: Tensor
    slot: Tensor
    slot_row: Tensor
    full: float

    def __init__(self, layout: GateLayout, rows: _Rows) -> None:
        super().__init__()

        def join(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

        self.register_buffer("always", torch.tensor(rows.always, dtype=torch.float64), persistent=False)
        for name in ("single_gate", "single_row", "slot_gate", "slot", "slot_row"):
            self.register_buffer(name, join(getattr(rows, name)), persistent=False)
        self.slots, self.layout = rows.slots, layout

    @abc.abstractmethod
    def expected(self, probability: Tensor) -> Tensor:
        """Return the expected cost, differentiable in the gates' probabilities (gates,) of being open."""

    @torch.no_grad()
    def hard(self, opened: Tensor) -> float:
        """Return the cost with the given gates open, (gates,) bool."""
        return float(self.hard_each(opened[None])[0])

    @abc.abstractmethod
    def hard_each(self, opened: Tensor) -> Tensor:
        """Return the costs (n,) of n choices of open gates, (n, gates) bool."""

    def widths(self, opened: Tensor) -> Tensor:
        """Return the numbers of channels (n, rows) of n choices of open gates, (n, gates) bool."""
        p = self.layout.extended(opened.double())
        found = self.always.expand(len(p), -1).index_add(1, self.single_row, p[:, self.single_gate])
        if self.slots:
            there = p.new_zeros(len(p), self.slots).index_add(1, self.slot, p[:, self.slot_gate]).clamp(max=1)
            found = found.index_add(1, self.slot_row, there)
        return found

    def alive(self, probability: Tensor) -> Tensor:
        """Return the expected numbers of channels (rows,), for the gates' probabilities (gates,) of being open."""
        p = self.layout.extended_probability(probability.double())
        alive = self.always.index_add(0, self.single_row, p[self.single_gate])
        if self.slots:
            closed = p.new_zeros(self.slots).index_add(0, self.slot, torch.log1p(-p[self.slot_gate]))
            alive = alive.index_add(0, self.slot_row, -torch.expm1(closed))
        return alive


def gate_cost(layout: GateLayout, metric: Metric) -> Cost:
    """Return the cost that a budget of this metric limits."""
    return LatencyCost(layout) if COSTS[metric].of_device else GateCost(layout, metric)


class LatencyCost(Cost):
    """The latency in ms by the layout's table: hard in the hardware's steps, expected between them.

    expected: the price of the expected widths.
    """

    def __init__(self, layout: GateLayout) -> None:
        assert layout.latency is not None, "budget_limit refuses milliseconds without a table"
        rows = _Rows(layout)
        priced = PricedOperations(layout.latency.table, layout.latency.operations, lambda node: rows.of(node, 0, 1))
        super().__init__(layout, rows)
        self.priced = priced
        # whole additions are cheaper than mixed ones: what the first gates to close may make of the network
        self.full = max(
            self.hard(torch.ones(layout.size, dtype=torch.bool)), self.expected(torch.ones(layout.size)).item()
        )

    def expected(self, probability: Tensor) -> Tensor:
        """Return the latency at the expected widths, differentiable in the probabilities (gates,)."""
        latency_ms: Tensor = self.priced(self.alive(probability), stepped=False)
        return latency_ms

    @torch.no_grad()
    def hard_each(self, opened: Tensor) -> Tensor:
        """Return the latencies (n,) of n choices of open gates, (n, gates) bool, widths rounded up as in hardware."""
        latencies: Tensor = self.priced(self.widths(opened), stepped=True)
        return latencies


class GateCost(Cost):
    """The cost of one counted metric in its own unit."""

    n_in: Tensor
    n_out: Tensor
    out_rate: Tensor
    pair_rate: Tensor

    def __init__(self, layout: GateLayout, metric: Metric) -> None:
        rows, cost = _Rows(layout), COSTS[metric]
        entries: list[tuple[int, int, float, float]] = []
        constant = float(loose_params(layout.network)) if cost.of_parameters else 0.0
        counted: set[str] = set()
        for unit in units(layout.network):
            if cost.of_parameters and unit.node.op == "call_module":
                if str(unit.node.target) in counted:
                    continue
                counted.add(str(unit.node.target))
            rates = cost.rates(unit)
            out_rate, pair_rate, constant = rates.per_output, rates.per_pair, constant + rates.constant
            if unit.alone:
                out_rate, pair_rate = out_rate + pair_rate, 0
            for group in range(unit.groups if pair_rate else 1):
                n_out = rows.of(unit.node, group, unit.groups if pair_rate else 1)
                n_in = n_out
                if pair_rate and unit.in_width is not None:
                    n_in = rows.constant(unit.in_width // unit.groups)
                elif pair_rate:
                    n_in = rows.of(unit.source, group, unit.groups)
                if out_rate or pair_rate:
                    entries.append((n_in, n_out, out_rate, pair_rate))

        super().__init__(layout, rows)
        self.constant = constant
        rows_in, rows_out, out_rates, pair_rates = zip(*entries, strict=True) if entries else ((), (), (), ())
        for name, value in {
            "n_in": torch.tensor(rows_in, dtype=torch.int64),
            "n_out": torch.tensor(rows_out, dtype=torch.int64),
            "out_rate": torch.tensor(out_rates, dtype=torch.float64),
            "pair_rate": torch.tensor(pair_rates, dtype=torch.float64),
        }.items():
            self.register_buffer(name, value, persistent=False)
        self.full = self.hard(torch.ones(layout.size, dtype=torch.bool))

    def expected(self, probability: Tensor) -> Tensor:
        """Return the expected cost, differentiable in the gates' probabilities (gates,) of being open."""
        return self._of(self.alive(probability))

    @torch.no_grad()
    def hard_each(self, opened: Tensor) -> Tensor:
        """Return the costs (n,) of n choices of open gates, (n, gates) bool."""
        return self._of(self.widths(opened))

    def _of(self, widths: Tensor) -> Tensor:
        """Return the costs (...) of numbers of channels (..., rows)."""
        pairs = self.out_rate + self.pair_rate * widths[..., self.n_in]
        return (widths[..., self.n_out] * pairs).sum(-1) + self.constant


class _Rows:
    """Numbers of alive channels, of tensors or of one group of them, as sums over gates."""

    def __init__(self, layout: GateLayout) -> None:
        self.layout, self.known = layout, dict[object, int]()
        self.always: list[float] = []
        self.single_gate: list[Tensor] = []
        self.single_row: list[Tensor] = []
        self.slot_gate: list[Tensor] = []
        self.slot: list[Tensor] = []
        self.slot_row: list[Tensor] = []
        self.slots = 0

    def constant(self, width: int) -> int:
        """Return the row of a number that no gate changes."""
        if width not in self.known:
            self.known[width] = len(self.always)
            self.always.append(width)
        return self.known[width]

    def of(self, node: fx.Node, group: int, groups: int) -> int:
        """Return the row of a tensor's channels in one of `groups` equal runs."""
        node = self.layout.follows.get(node, node)
        if (node, group, groups) in self.known:
            return self.known[node, group, groups]
        self.known[node, group, groups] = row = len(self.always)
        w, width = self.layout.writers[node], self.layout.found[node].width // groups
        self.always.append(float(w.always.view(groups, -1)[group].sum()))
        free = (w.always[w.channel] == 0) & (w.channel // width == group)
        gate, channel = w.gate[free], w.channel[free]
        if len(torch.unique(channel)) == len(channel):  # one writer each: their probability is the gate's
            self.single_gate.append(gate)
            self.single_row.append(torch.full_like(gate, row))
        else:
            channels, place = torch.unique(channel, return_inverse=True)
            self.slot_gate.append(gate)
            self.slot.append(place + self.slots)
            self.slot_row.append(torch.full_like(channels, row))
            self.slots += len(channels)
        return row
