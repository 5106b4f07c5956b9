"""Pruning methods: each scores channels, and ends in a plan that meets the budget."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bar_edge.methods.bar.bar import BAR as BAR
    from bar_edge.methods.gating.layout import GateLayout as GateLayout
    from bar_edge.methods.gating.projection import budget_limit as budget_limit
    from bar_edge.methods.gating.projection import smallest_cost as smallest_cost
    from bar_edge.methods.method import METHODS as METHODS
    from bar_edge.methods.random import random_plan as random_plan

__all__ = ["BAR", "METHODS", "GateLayout", "budget_limit", "random_plan", "smallest_cost"]

_HOMES = {
    "BAR": "bar.bar",
    "GateLayout": "gating.layout",
    "METHODS": "method",
    "budget_limit": "gating.projection",
    "random_plan": "random",
    "smallest_cost": "gating.projection",
}


def __getattr__(name: str) -> Any:
    # loaded on first use: `--help` lists METHODS and loads no torch
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
