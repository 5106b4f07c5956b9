"""What travels between the stages: small frozen records, free of torch."""

from bar_edge.records.budget import Budget
from bar_edge.records.cost import COSTS, Cost
from bar_edge.records.counts import Counts, Metric
from bar_edge.records.latency import Latency
from bar_edge.records.plan import ChannelPlan

__all__ = ["COSTS", "Budget", "ChannelPlan", "Cost", "Counts", "Latency", "Metric"]
