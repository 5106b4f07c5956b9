"""What a network costs as a function of its gates: hard, for the barrier, and expected, for the gradient.

Volume: sum of area * E[n_out]; FLOPs: 2 k^2 area E[n_in] E[n_out]; parameters alike. A stream's channel
exists unless all its writers are closed: E[n] = sum over channels of 1 - product of (1 - p).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from bar_edge.methods.layout import GateLayout
from bar_edge.network.cost import loose_params, units
from bar_edge.records import Metric


class GateCost(nn.Module):
    """The cost of one metric in its own unit; gates are independent, dead layers are not yet removed."""

    always: Tensor
    single_gate: Tensor
    single_row: Tensor
    slot_gate: Tensor
    slot: Tensor
    slot_row: Tensor
    n_in: Tensor
    n_out: Tensor
    out_rate: Tensor
    pair_rate: Tensor

    def __init__(self, layout: GateLayout, metric: Metric) -> None:
        super().__init__()
        tensors: dict[fx.Node, int] = {}
        rows: list[tuple[int, int, float, float]] = []
        self.constant = 0.0
        if metric == "params":
            self.constant += loose_params(layout.network)
        counted: set[str] = set()
        for unit in units(layout.network, layout.found):
            out_rate = {"volume": unit.area, "params": unit.vectors}.get(metric, 0)
            pair_rate = {"flops": unit.flop_rate, "params": unit.weights}.get(metric, 0)
            if metric == "params" and str(unit.node.target) not in counted:
                self.constant += unit.constant
                counted.add(str(unit.node.target))
            n_out = tensors.setdefault(unit.node, len(tensors))
            if unit.alone:
                out_rate, pair_rate, n_in = out_rate + pair_rate, 0, n_out
            else:
                n_in = tensors.setdefault(unit.source, len(tensors)) if pair_rate else n_out
            if out_rate or pair_rate:
                rows.append((n_in, n_out, out_rate, pair_rate))
        # channels with one writer need no product: their probability is the gate's
        single_gate, single_row, slot_gate, slot, slot_row, always = [], [], [], [], [], torch.zeros(len(tensors))
        slots = 0
        for node, row in tensors.items():
            w = layout.writers[node]
            always[row] = w.always.sum()
            free = w.always[w.channel] == 0
            gate, channel = w.gate[free], w.channel[free]
            if len(torch.unique(channel)) == len(channel):
                single_gate.append(gate)
                single_row.append(torch.full_like(gate, row))
            else:
                channels, place = torch.unique(channel, return_inverse=True)
                slot_gate.append(gate)
                slot.append(place + slots)
                slot_row.append(torch.full_like(channels, row))
                slots += len(channels)

        def join(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

        rows_in, rows_out, out_rates, pair_rates = zip(*rows, strict=True)
        for name, value in {
            "always": always.double(),
            "single_gate": join(single_gate),
            "single_row": join(single_row),
            "slot_gate": join(slot_gate),
            "slot": join(slot),
            "slot_row": join(slot_row),
            "n_in": torch.tensor(rows_in),
            "n_out": torch.tensor(rows_out),
            "out_rate": torch.tensor(out_rates, dtype=torch.float64),
            "pair_rate": torch.tensor(pair_rates, dtype=torch.float64),
        }.items():
            self.register_buffer(name, value, persistent=False)
        self.slots = slots
        self.full = self.hard(torch.ones(layout.size, dtype=torch.bool))

    def expected(self, probability: Tensor) -> Tensor:
        """Return the expected cost, differentiable in the gates' probabilities (gates,) of being open."""
        p = probability.double()
        alive = self.always.index_add(0, self.single_row, p[self.single_gate])
        if self.slots:
            closed = p.new_zeros(self.slots).index_add(0, self.slot, torch.log1p(-p[self.slot_gate]))
            alive = alive.index_add(0, self.slot_row, -torch.expm1(closed))
        n_out = alive[self.n_out]
        return (n_out * (self.out_rate + self.pair_rate * alive[self.n_in])).sum() + self.constant

    @torch.no_grad()
    def hard(self, opened: Tensor) -> float:
        """Return the cost with the given gates open, (gates,) bool."""
        return float(self.expected(opened.double()))
