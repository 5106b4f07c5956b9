"""What a network lets itself be pruned of, before any training."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from typing import Any

from torch import nn

from bar_edge.methods import GateLayout, smallest_cost
from bar_edge.network import layers
from bar_edge.network.trace import source_line
from bar_edge.records import COSTS


def preflight(layout: GateLayout, unsure: list[str]) -> dict[str, Any]:
    """Return layers, costs with their prunable shares and smallest values, and everything without a channel rule.

    The prunable share of a cost is what is gone when only the cheapest path is left. unsure: see
    `modes_apart`.
    """
    costs, warnings = {}, []
    for metric in (name for name, cost in COSTS.items() if not cost.of_device):
        total, least = layout.cost({}, metric), smallest_cost(layout, metric)
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


def modes_apart(module: nn.Module) -> list[str]:
    """Return the types of modules whose forward decides something by self.training.

    torch's own modules aside: what they do in training is known. Code that cannot be read is not named.
    """
    kinds = {type(part) for part in module.modules() if not type(part).__module__.startswith("torch.")}
    return sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds if _decides_by_mode(kind))


def _decides_by_mode(kind: type[nn.Module]) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp | ast.While)]
    inside = [part for test in tests for part in ast.walk(test)]
    return any(isinstance(part, ast.Attribute) and part.attr == "training" for part in inside)
