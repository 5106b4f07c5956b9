"""Pruning methods: each ends in a plan that meets the budget."""

from bar_edge.methods.bar.bar import BAR
from bar_edge.methods.gating.layout import GateLayout
from bar_edge.methods.gating.projection import budget_limit, random_plan, smallest_cost

__all__ = ["BAR", "GateLayout", "budget_limit", "random_plan", "smallest_cost"]
