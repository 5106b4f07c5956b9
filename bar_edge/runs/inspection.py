"""What a network lets itself be pruned of, before any training."""

from __future__ import annotations

import dataclasses
from typing import Any

from bar_edge.methods import GateLayout, smallest_cost
from bar_edge.network import layers
from bar_edge.network.counted_cost import computed_layers
from bar_edge.network.trace import source_line
from bar_edge.records import COSTS


def preflight(layout: GateLayout, unsure: list[str]) -> dict[str, Any]:
    """Return layers, costs with their prunable shares and smallest values, and everything without a channel rule.

    The prunable share of a cost is what is gone when only the cheapest path is left; at_half_width: the share
    that remains when every layer keeps half of its channels, which is what widths cost. uncounted: FLOPs of one
    image that belong to no convolution. unsure: see `modes_apart`.
    """
    costs, warnings, halves = {}, list(layout.network.notes), _halves(layout)
    for metric in (name for name, cost in COSTS.items() if not cost.of_device):
        total, least = layout.cost({}, metric), smallest_cost(layout, metric)
        share = 1 - least / total if total else 0.0
        remains = layout.cost(halves, metric) / total if total else 1.0
        costs[metric] = {"full": total, "prunable_share": share, "smallest": least, "at_half_width": remains}
        if share < 0.5:
            warnings.append(f"only {share:.0%} of the {metric} can be pruned: see the layers and operators below")
    opaque = [node for node, passage in layout.found.items() if passage.kind == "opaque"]
    if unsure:
        warnings.append("the forward of some modules asks for self.training: their eval form was traced")
    computed = computed_layers(layout.network)
    if computed:
        lines = ", ".join(source_line(node) for node in computed[:3])
        warnings.append(f"{len(computed)} layers whose weights are computed are counted but cannot be pruned: {lines}")
    return {
        "fingerprint": layout.network.fingerprint,
        "costs": costs,
        "layers": [_layer(layer, layout) for layer in layers(layout.network)],
        "without_rule": [
            {"operator": str(node.target), "node": node.name, "line": source_line(node)} for node in opaque
        ],
        "uncounted": [
            {"operator": str(node.target), "node": node.name, "line": source_line(node), "flops": flops}
            for node, flops in layout.uncounted.items()
        ],
        "traced_in_eval_form": unsure,
        "warnings": warnings,
    }


def _halves(layout: GateLayout) -> dict[str, tuple[int, ...]]:
    """Return half of the channels of every gated layer: the first ones, of every group."""
    kept = {}
    for name, (_, width) in layout.offsets.items():
        own = width // layout.groups.get(name, 1)
        kept[name] = tuple(i for i in range(width) if i % own < max(1, own // 2))
    return kept


def _layer(layer: Any, layout: GateLayout) -> dict[str, Any]:
    data = dataclasses.asdict(layer)
    if layer.gated and layer.name not in layout.offsets:
        data |= {"gated": False, "reason": "kept by --keep"}
    return data
