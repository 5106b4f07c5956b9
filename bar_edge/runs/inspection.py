"""What a network lets itself be pruned of, before any training."""

from __future__ import annotations

import dataclasses
from typing import Any

from bar_edge.methods import GateLayout, smallest_cost
from bar_edge.network import count, layers
from bar_edge.network.trace import source_line


def preflight(layout: GateLayout, unsure: list[str]) -> dict[str, Any]:
    """Return layers, costs with their prunable shares and smallest values, and everything without a channel rule.

    The prunable share of a cost is what is gone when only the cheapest path is left. unsure: see
    `modes_apart`.
    """
    full, costs, warnings = count(layout.network), {}, []
    for metric in ("volume", "flops", "params"):
        total, least = full.of(metric), smallest_cost(layout, metric)
        share = 1 - least / total if total else 0.0
        costs[metric] = {"full": total, "prunable_share": share, "smallest": least}
        if share < 0.5:
            warnings.append(f"only {share:.0%} of the {metric} can be pruned: see the layers and operators below")
    opaque = [node for node, passage in layout.found.items() if passage.kind == "opaque"]
    if unsure:
        warnings.append("the forward of some modules asks for self.training: their eval form was traced")
    return {
        "fingerprint": layout.network.fingerprint,
        "costs": costs,
        "layers": [_layer(layer, layout) for layer in layers(layout.network)],
        "without_rule": [
            {"operator": str(node.target), "node": node.name, "line": source_line(node)} for node in opaque
        ],
        "traced_in_eval_form": unsure,
        "warnings": warnings,
    }


def _layer(layer: Any, layout: GateLayout) -> dict[str, Any]:
    data = dataclasses.asdict(layer)
    if layer.gated and layer.name not in layout.offsets:
        data |= {"gated": False, "reason": "kept by --keep"}
    return data
