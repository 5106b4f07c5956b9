"""The end of every method: scores become a plan that meets the budget, or the run fails."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from bar_edge.errors import InputError
from bar_edge.methods.layout import GateLayout
from bar_edge.network.cost import count_kept, units
from bar_edge.records import Budget, ChannelPlan, Counts, Metric


def full_counts(layout: GateLayout) -> Counts:
    """Return the costs of the whole network."""
    return count_kept(layout.network, {}, layout.found)


def budget_limit(layout: GateLayout, budget: Budget) -> float:
    """Return the budget in its own unit; raises InputError if it is not counted or below the smallest feasible cost."""
    if budget.metric == "ms":
        raise InputError(
            "a budget that can be counted: volume, FLOPs or parameters",
            got=budget.text,
            remedy="train for 8x, judge ms by bench",
        )
    if not layout.size:
        raise InputError(
            "a network with a convolution whose channels can be pruned",
            got="none",
            consequence="there is nothing to prune",
            remedy="see `bar-edge inspect` for what each layer lacks",
        )
    limit = budget.limit(full_counts(layout).of(budget.metric))
    least = smallest_cost(layout, budget.metric)
    if limit < least:
        full = full_counts(layout).of(budget.metric)
        raise InputError(
            f"a budget of at least {least:,} {budget.metric} ({full / least:.4g}x), the cheapest path's",
            got=f"{budget.text} = {limit:,.0f}",
            consequence="no channel would connect the input with the output; nothing was started",
            remedy=f"give a budget of at least {least}, or a smaller factor",
        )
    return limit


def protected_layers(layout: GateLayout, metric: Metric) -> list[str]:
    """Return the gated convolutions on the cheapest path, one channel each, from an input to the outputs."""
    found, network = layout.found, layout.network
    by_node = {unit.node: unit for unit in units(network, found)}
    best: dict[fx.Node, tuple[float, frozenset[str]]] = {}
    for node in network.nodes:
        passage, step, own = found.get(node), 0.0, frozenset[str]()
        if passage is not None and node in by_node:
            unit, gated = by_node[node], str(node.target) in layout.offsets
            n_out = 1 if gated or passage.kind == "map" else passage.width
            n_in = found[unit.source].width if unit.source in found and found[unit.source].kind == "source" else 1
            pairs = n_out if unit.alone else n_in * n_out
            rates = {"volume": unit.area * n_out, "flops": unit.flop_rate * pairs}
            step = rates.get(metric, unit.weights * pairs + unit.vectors * n_out + unit.constant)
            own = frozenset({str(node.target)}) if gated else own
        links = passage.links if passage is not None else ()
        sources = [link.source for link in links] or [s for s in node.all_input_nodes if s in best]
        if links:
            cost, path = min((best[s] for s in sources), key=lambda entry: entry[0])
        else:
            cost, path = (
                max((best[s][0] for s in sources), default=0.0),
                frozenset().union(*(best[s][1] for s in sources)),
            )
        best[node] = (cost + step, path | own)
    ends = [s for node in network.nodes if node.op == "output" for s in node.all_input_nodes if s in best]
    names = frozenset().union(*(best[s][1] for s in ends))
    return [name for name in layout.offsets if name in names]


def smallest_cost(layout: GateLayout, metric: Metric) -> int:
    """Return the cost of one channel per protected convolution and nothing else."""
    protected = set(protected_layers(layout, metric))
    kept = {name: (0,) if name in protected else () for name in layout.offsets}
    return count_kept(layout.network, kept, layout.found).of(metric)


def project(
    layout: GateLayout, scores: Tensor, opened: Tensor, metric: Metric, limit: float
) -> tuple[ChannelPlan, int]:
    """Close the open gates of the lowest scores until the cost is at most `limit`; return plan and how many.

    scores: (gates,), opened: (gates,) bool. The best channel of every protected convolution stays. Ties:
    the larger map goes first. Costs are those of `count`, after dead layers are removed.
    """
    opened = opened.cpu().clone()
    scores = scores.detach().cpu().double()
    free = opened.clone()
    for name in protected_layers(layout, metric):
        first, n = layout.offsets[name]
        best = first + int(scores[first : first + n].argmax())
        opened[best], free[best] = True, False
    areas = torch.cat([torch.full((n,), _area(layout, name)) for name, (_, n) in layout.offsets.items()])
    by_area = torch.argsort(-areas, stable=True)
    order = by_area[torch.argsort(scores[by_area], stable=True)]
    order = order[free[order]]

    def cost(closed: int) -> int:
        left = opened.clone()
        left[order[:closed]] = False
        return count_kept(layout.network, layout.kept(left), layout.found).of(metric)

    low, high = -1, len(order)  # cost(high) fits, cost(low) does not
    assert cost(high) <= limit, "the cheapest path fits every feasible budget"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= limit else (middle, high)
    opened[order[:high]] = False
    return layout.plan(opened), high


def _area(layout: GateLayout, name: str) -> int:
    shape = layout.network.shapes[layout.node(name).name]
    return torch.Size(shape[2:]).numel()


def random_plan(layout: GateLayout, metric: Metric, limit: float, seed: int) -> ChannelPlan:
    """Return a plan with an equal keep ratio in every layer, channels drawn at random, within the limit."""
    generator = torch.Generator().manual_seed(seed)
    ranks = [(torch.randperm(n, generator=generator) + 0.5) / n for _, n in layout.offsets.values()]
    return project(layout, torch.cat(ranks), torch.ones(layout.size, dtype=torch.bool), metric, limit)[0]
