"""The end of every method: scores become a plan that meets the budget, or the run fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor, fx

from bar_edge.errors import InputError
from bar_edge.methods.gating.layout import GateLayout
from bar_edge.methods.method import Scored
from bar_edge.network.channels import Passage, is_whole
from bar_edge.network.counted_cost import units
from bar_edge.network.prunable import prunable
from bar_edge.network.trace import source_line
from bar_edge.records import COSTS, Budget, ChannelPlan, Metric

#: how many costs are tried to use what a budget leaves, by halving
REFILLS = 150
#: share of a counted budget below which further bundles are tried one by one, and in how many a layer may fail
ENOUGH, FAILURES = 0.99, 4


def budget_limit(layout: GateLayout, budget: Budget) -> float:
    """Return the budget in its own unit; raises InputError if nothing measures it or it is below what is feasible."""
    if budget.cost.of_device and layout.latency is None:
        raise InputError(
            "a latency table for a budget in milliseconds",
            got=f"{budget.text} without one",
            consequence="nothing was started",
            remedy="`bar-edge profile` writes one for --table; `deploy` profiles this machine by itself",
        )
    if not layout.size:
        lacks = [f"{name}: {reason or 'left alone by --keep'}" for name, reason in prunable(layout.network).items()]
        operators = [f"{n.target} at {source_line(n)}" for n in layout.network.nodes if n.op == "call_function"]
        raise InputError(
            "a network with a convolution whose channels can be pruned",
            got="; ".join(lacks[:5]) or f"no convolution or linear layer, only {'; '.join(operators[:5])}",
            consequence="there is nothing to prune",
            remedy="see `bar-edge inspect` for every layer and operator",
        )
    full = layout.cost({}, budget.metric)
    if not full:
        raise InputError(
            "a network with a convolution",
            got=f"none: its {budget.metric} is 0",
            consequence="there is nothing to prune",
            remedy="linear layers alone have parameters only: give a budget such as 4x:params",
        )
    limit, least = budget.limit(full), smallest_cost(layout, budget.metric)
    if limit < least:
        # rounded up, so that what is named is feasible
        smallest = f"{math.ceil(1e3 * least) / 1e3:.3f}" if budget.cost.of_device else f"{math.ceil(least):,}"
        unit = f" {budget.cost.unit}" if budget.cost.of_device else ", or a smaller factor"
        raise InputError(
            f"a budget of at least {smallest} {budget.metric} ({full / least:.4g}x), the cheapest path's",
            got=f"{budget.text} = {limit:g}" if budget.cost.of_device else f"{budget.text} = {limit:,.0f}",
            consequence="no channel would connect the input with the output; nothing was started",
            remedy=f"give a budget of at least {smallest.replace(',', '')}{unit}",
        )
    return limit


def protected_gates(layout: GateLayout, metric: Metric) -> list[tuple[Tensor, int]]:
    """Return sets of gates, each with how many of its best stay open: the cheapest path, and what `keep` asks for.

    The path has one channel per gated layer on it, out of those that reach the next layer (a grouped
    convolution is fed by its own group, half of a split layer by that half). A layer with a least width has
    a path of its own, so that its channels are fed and read. Raises InputError if too few of them can be.
    """
    best = _cheapest(layout, metric)
    sets, least = _walk(layout, best)[0], list[tuple[Tensor, int]]()
    for name, n in layout.least.items():
        own, reached = _path_through(layout, best, name, n)
        for other, asked in own.items():
            sets.setdefault(other, []).extend(asked)
        if name in layout.offsets:
            least.append((reached + layout.offsets[name][0], n))
    # what a smaller set protects is enough for a larger one
    needed = {(name, one) for name, all_ in sets.items() for one in all_ if not any(other < one for other in all_)}
    order = sorted(needed, key=lambda entry: (layout.offsets[entry[0]][0], sorted(entry[1])))
    path = [(torch.tensor(sorted(ids)) + layout.offsets[name][0], 1) for name, ids in order]
    return path + least


Sets = dict[str, list[frozenset[int]]]


def _path_through(layout: GateLayout, best: dict[fx.Node, float], name: str, n: int) -> tuple[Sets, Tensor]:
    """Return the sets of a path through a layer, and at least n of its channels that are fed and read there.

    As many of the layers that read it are on it as that takes, those nearest to an output first; a layer
    that is kept as a whole may have fewer.
    """
    reached: set[int] = set()
    found: Sets = {}
    for path in (path for call in layout.calls(name) for path in _ways_out(layout, call)):
        sets, asked = _walk(layout, best | dict.fromkeys(path, -1.0), set(path), n)
        more = {channel for own in asked.get(name, []) for channel in own.tolist()} - reached
        if more:
            reached |= more
            for other, channels in sets.items():
                found.setdefault(other, []).extend(channels)
        if len(reached) >= n:
            break
    if len(reached) < n and name in layout.offsets:
        raise InputError(
            f"--keep {name}={len(reached)} or less",
            got=f"{name}={n}",
            consequence=f"only {len(reached)} of its channels are sure to be read",
            remedy=f"--keep {name} without a number, and the layers that read it",
        )
    return found, torch.tensor(sorted(reached), dtype=torch.int64)


def _ways_out(layout: GateLayout, start: fx.Node) -> list[list[fx.Node]]:
    """Return paths from a tensor to an output, one through each layer or operator that reads it, the shortest first."""
    after: dict[fx.Node, tuple[int, fx.Node]] = {}  # how many layers follow, and which node comes next
    for node in reversed(layout.network.nodes):
        ways = [(after[user][0] + _ends(layout, user), user) for user in node.users if user in after]
        if node.op == "output":
            after[node] = 0, node
        elif ways:
            after[node] = min(ways, key=lambda way: way[0])
    before: dict[fx.Node, fx.Node] = {}
    pending, ends = [start], list[fx.Node]()
    for node in pending:
        for user in node.users:
            if user in after and user not in before:
                before[user] = node
                (ends if _ends(layout, user) else pending).append(user)
    paths = []
    for end in sorted(ends, key=lambda end: after[end][0]):
        path = [end]
        while path[-1] is not start:
            path.append(before[path[-1]])
        while path[0].op != "output":
            path.insert(0, after[path[0]][1])
        paths.append(path)
    return paths


def _ends(layout: GateLayout, node: fx.Node) -> bool:
    """Tell whether channels end at a node: a layer, an operator without a rule, an output."""
    return node not in layout.found or layout.found[node].kind == "read" or is_whole(layout.found[node])


def _walk(
    layout: GateLayout, best: dict[fx.Node, float], wide: Collection[fx.Node] = (), n: int = 1
) -> tuple[Sets, dict[str, list[Tensor]]]:
    """Walk from the outputs to the inputs the way that costs least.

    Returns sets of channels by gated layer, one of each of which is needed, and for every layer which of
    its channels were asked for. At the nodes in `wide`, n channels are wanted, of all groups.
    """
    wanted: dict[fx.Node, list[Tensor]] = {}
    sets: Sets = {}
    asked_of: dict[str, list[Tensor]] = {}
    for node in reversed(layout.network.nodes):
        passage, asked = layout.found.get(node), wanted.pop(node, [])
        if node.op == "output" or (asked and (passage is None or is_whole(passage))):
            for source in node.all_input_nodes:
                width = layout.found[source].width if source in layout.found else 0
                wanted.setdefault(source, []).append(torch.arange(width))
        elif passage is not None:
            for channels in asked:
                for own in _by_group(passage, channels)[: None if node in wide else 1]:
                    if passage.kind == "read":
                        asked_of.setdefault(str(node.target), []).append(own)
                        if str(node.target) in layout.offsets:
                            sets.setdefault(str(node.target), []).append(frozenset(own.tolist()))
                    for source, inputs in _path_inputs(layout, node, own, best, n if node in wide else 1):
                        wanted.setdefault(source, []).append(inputs)
    return sets, asked_of


def _by_group(passage: Passage, channels: Tensor) -> list[Tensor]:
    """Return the channels of each group of a grouped reader; one group is enough for the others to go."""
    group = channels // (passage.width // passage.groups if passage.kind == "read" else passage.width)
    return [channels[group == g] for g in sorted(set(group.tolist()))]


def _path_inputs(
    layout: GateLayout, node: fx.Node, channels: Tensor, best: dict[fx.Node, float], n: int
) -> list[tuple[fx.Node, Tensor]]:
    """Return which channels of which inputs keep one of a tensor's `channels` alive, the cheapest way.

    Of a product in which factors beside the wanted one are gated it is the first n channels, in all factors.
    """
    passage, found = layout.found[node], layout.found
    whole = [(s, torch.arange(found[s].width)) for s in node.all_input_nodes if s in found and is_whole(found[s])]
    if passage.kind == "read":
        source = node.all_input_nodes[0]
        inputs = found[source].width // passage.groups
        group = int(channels[0]) // (passage.width // passage.groups)
        return whole or [(source, torch.arange(group * inputs, (group + 1) * inputs))]
    links = [link for link in passage.links if torch.isin(link.outputs, channels).any()]
    if passage.kind == "mul":
        gated = [link for link in links if not layout.writers[link.source].always[link.inputs].all()]
        beside = [link for link in gated if best[link.source] >= 0]
        together = len(beside) > (0 if any(best[link.source] < 0 for link in links) else 1)
        chosen = [channel.view(1) for channel in channels[:n]] if together else [channels]
        return whole + [
            (link.source, torch.unique(link.inputs[torch.isin(link.outputs, one)])) for link in links for one in chosen
        ]
    link = min(links, key=lambda link: best[link.source])
    return [(link.source, torch.unique(link.inputs[torch.isin(link.outputs, channels)]))]


def _cheapest(layout: GateLayout, metric: Metric) -> dict[fx.Node, float]:
    """Return for every tensor the cost of the cheapest way to it, with one channel per gated layer.

    In ms that is the way with the fewest FLOPs: one channel takes what a few take, wherever it is.
    """
    found, network = layout.found, layout.network
    by_node = {unit.node: unit for unit in units(network)}
    best: dict[fx.Node, float] = {}
    for node in network.nodes:
        passage, step = found.get(node), 0.0
        if passage is not None and node in by_node:
            unit, gated = by_node[node], str(node.target) in layout.offsets
            n_out = 1 if gated or passage.kind != "read" else passage.width
            pairs = n_out if unit.alone else (unit.in_width or 1) * n_out
            rates = COSTS[metric].rates(unit)
            step = rates.per_pair * pairs + rates.per_output * n_out + rates.constant
        sources = [link.source for link in passage.links] if passage is not None else []
        costs = [best[s] for s in sources or node.all_input_nodes if s in best]
        choose = min if sources and passage is not None and passage.kind != "mul" else max
        best[node] = choose(costs, default=0.0) + step
    return best


def protected_layers(layout: GateLayout, metric: Metric) -> list[str]:
    """Return the gated layers on the cheapest path, from an input to the outputs."""
    first = {int(ids[0]) for ids, _ in protected_gates(layout, metric)}
    return [name for name, (start, n) in layout.offsets.items() if any(start <= i < start + n for i in first)]


def smallest_cost(layout: GateLayout, metric: Metric) -> float:
    """Return the cost of the protected channels and nothing else, or of the whole network where that is less (ms)."""
    scores = torch.zeros(layout.size)
    bundle = _bundles(layout, scores, torch.zeros(layout.size, dtype=torch.bool))
    return min(_cost_of(layout, bundle, bundle[_best(layout, scores, metric)], metric), layout.cost({}, metric))


def _cost_of(layout: GateLayout, bundle: Tensor, opened: Tensor, metric: Metric) -> float:
    """Return the cost of some open bundles."""
    return layout.cost(layout.kept(torch.isin(bundle, opened)), metric)


def _best(layout: GateLayout, scores: Tensor, metric: Metric) -> Tensor:
    """Return the protected gates: the best of every protected set."""
    picked = [ids[torch.argsort(-scores[ids], stable=True)[:n]] for ids, n in protected_gates(layout, metric)]
    return torch.cat(picked) if picked else torch.zeros(0, dtype=torch.int64)


def _bundles(layout: GateLayout, scores: Tensor, opened: Tensor) -> Tensor:
    """Return of every gate (gates,) the bundle with which it opens and closes.

    A bundle has as many of each group of a grouped convolution, and `round_to` in all, the best of the
    layer first; one gate where nothing asks for more.
    """
    number = torch.zeros(layout.size, dtype=torch.int64)
    total = 0
    for name, (first, n) in layout.offsets.items():
        groups = layout.groups.get(name, 1)
        own = (scores[first : first + n] + 1e6 * opened[first : first + n].to(scores)).view(groups, -1)
        rank = torch.argsort(torch.argsort(-own, dim=1, stable=True), dim=1, stable=True)
        per_group = max(1, math.lcm(layout.round_to, groups) // groups)
        place = (rank // per_group).flatten()
        number[first : first + n] = total + place
        total += int(place.max()) + 1
    return number


def project(
    layout: GateLayout, scores: Tensor, opened: Tensor, metric: Metric, limit: float
) -> tuple[ChannelPlan, int]:
    """Close the open gates of the lowest scores until the cost is at most `limit`; return plan and how many.

    scores: (gates,), opened: (gates,) bool. The best channel of every protected set stays. Ties: the larger
    map goes first. Gates that operators or `round_to` tie together open and close together: a bundle half
    of which is open opens. Costs are those of `count`, after dead layers are removed. Then what still fits opens
    again, the best first: in ms whatever closed it, for up to the hardware's next step a channel costs nothing;
    of a counted budget so much that it is used up or no further bundle fits.
    """
    opened, scores = opened.cpu(), scores.detach().cpu().double()
    by_table = COSTS[metric].of_device
    if by_table and layout.cost({}, metric) <= limit:  # all would open again; and narrow layers can be slower
        return layout.plan(torch.ones_like(opened)), 0
    bundle = _bundles(layout, scores, opened)
    best = _best(layout, scores, metric)
    if _cost_of(layout, bundle, bundle[best], metric) > limit:  # the best overlap less than the first of each set do
        bundle = _bundles(layout, torch.zeros_like(scores), torch.zeros_like(opened))
        best = _best(layout, torch.zeros_like(scores), metric)
    size = torch.bincount(bundle)
    fixed = torch.zeros(len(size), dtype=torch.bool)
    fixed[bundle[best]] = True
    alive = fixed | (2 * torch.bincount(bundle, opened.double()) >= size)
    areas = torch.cat([torch.full((n,), _area(layout, name)) for name, (_, n) in layout.offsets.items()])
    area = torch.zeros(len(size), dtype=areas.dtype).index_put((bundle,), areas)
    mean = torch.bincount(bundle, scores) / size
    by_area = torch.argsort(-area, stable=True)
    order = by_area[torch.argsort(mean[by_area], stable=True)]
    order = order[(alive & ~fixed)[order]]

    def left(closed: int) -> Tensor:
        open_bundles = alive.clone()
        open_bundles[order[:closed]] = False
        return open_bundles

    def fits(open_bundles: Tensor) -> bool:
        return layout.cost(layout.kept(open_bundles[bundle]), metric) <= limit

    low, high = -1, len(order)  # left(high) fits, left(low) does not
    assert fits(left(high)), "the cheapest path fits every feasible budget"
    if fits(left(0)):  # not found by halving where additions cost more once they are mixed
        high = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(left(middle)) else (middle, high)
    chosen = left(high)
    ranked = by_area[torch.argsort(-mean[by_area], stable=True)]
    chosen = _refilled(chosen, ranked[~chosen[ranked]], fits)
    if not by_table and layout.cost(layout.kept(chosen[bundle]), metric) < ENOUGH * limit:
        layers = torch.cat([torch.full((n,), i) for i, (_, n) in enumerate(layout.offsets.values())])
        layer = torch.zeros(len(size), dtype=torch.int64).index_put((bundle,), layers)
        chosen = _filled(chosen, ranked[~chosen[ranked]], layer, fits)
    opened_again = chosen[bundle] & ~alive[bundle]
    dead = opened_again & ~layout.living(chosen[bundle])  # nobody feeds or reads them: they cost nothing, closed too
    return layout.plan(chosen[bundle] & ~dead), int(size[alive & ~chosen].sum())


def plan_within(
    layout: GateLayout, scored: Scored, metric: Metric, limit: float, *, reopen: bool = False
) -> tuple[ChannelPlan, int]:
    """Return the plan that a method's scores give under a limit, and how many gates had to be closed for it.

    Not counted: what the method closed itself, and what it only ranked. reopen: what the method closed may open again.
    """
    everything = torch.ones(layout.size, dtype=torch.bool)
    left_open = everything if scored.opened is None else scored.opened.cpu()
    start = everything if reopen else left_open
    plan, closed = project(layout, scored.scores, start, metric, limit)
    forced = 0 if scored.opened is None else max(0, closed - int((start & ~left_open).sum()))
    return plan, forced + scored.forced


def _refilled(alive: Tensor, closed: Tensor, fits: Callable[[Tensor], bool]) -> Tensor:
    """Open closed bundles again, the best first, as long as that fits; by halving, for REFILLS costs at most."""
    pending = [closed] if len(closed) else []
    for _ in range(REFILLS):
        if not pending:
            break
        bundles = pending.pop()
        trial = alive.clone()
        trial[bundles] = True
        if fits(trial):
            alive = trial
        elif len(bundles) > 1:
            half = len(bundles) // 2
            pending += [bundles[half:], bundles[:half]]
    return alive


def _filled(alive: Tensor, closed: Tensor, layer: Tensor, fits: Callable[[Tensor], bool]) -> Tensor:
    """Open closed bundles one by one, the best first, until none fits; bundles of one layer cost nearly the same."""
    failed = torch.zeros(int(layer.max()) + 1, dtype=torch.int64)
    for one in closed.tolist():
        if failed[layer[one]] < FAILURES:
            trial = alive.clone()
            trial[one] = True
            if fits(trial):
                alive = trial
            else:
                failed[layer[one]] += 1
    return alive


def _area(layout: GateLayout, name: str) -> int:
    node = layout.node(name)
    return torch.Size(layout.network.shapes[node.name][1:]).numel() // layout.found[node].width
