"""A limit on what a network costs."""

from __future__ import annotations

import dataclasses
import re

from bar_edge.errors import InputError
from bar_edge.records.cost import COSTS, Cost
from bar_edge.records.counts import Metric

_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)(?P<unit>[a-zA-Z%]+)(?::(?P<metric>[a-z]+))?")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """A limit with its unit: a factor or share of the full cost, or an absolute number."""

    text: str
    metric: Metric
    #: share of the full cost (factor 16x: 1/16); None for an absolute budget
    share: float | None = None
    #: activations, FLOPs, parameters or milliseconds; None for a relative budget
    absolute: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `16x`, `6.25%`, `16x:flops`, `25%:params`, `194560act`, `50MFLOPs`, `1.2Mparams` or `8ms`.

        Raises InputError for anything else, and for a factor below 1 or a share above 100 %.
        """
        match = _BUDGET.fullmatch(text.strip())
        if match is None:
            raise _bad_budget(text)
        number, unit, metric = float(match["number"]), match["unit"], match["metric"]
        if unit in ("x", "%"):
            if metric is not None and (metric not in COSTS or COSTS[metric].of_device):
                raise _bad_budget(text)
            share = 1 / number if unit == "x" and number else number / 100
            if not 0 < share <= 1:
                raise _bad_budget(text)
            return cls(text=text, metric=metric or "volume", share=share)
        named = next((name for name, cost in COSTS.items() if unit in cost.suffixes), None)
        if named is None or metric is not None or number == 0:
            raise _bad_budget(text)
        return cls(text=text, metric=named, absolute=number * COSTS[named].suffixes[unit])

    @property
    def cost(self) -> Cost:
        """Return what it limits."""
        return COSTS[self.metric]

    def limit(self, full: float) -> float:
        """Return the limit in the metric's unit, given the full network's cost in that unit."""
        if self.absolute is not None:
            return self.absolute
        assert self.share is not None
        return self.share * full


def _bad_budget(text: str) -> InputError:
    return InputError(
        "a budget with a unit: 16x, 6.25%, 16x:flops, 25%:params, 194560act, 50MFLOPs, 1.2Mparams or 8ms",
        got=repr(text),
        consequence="nothing was started",
        remedy="give a factor of at least 1x, a share of at most 100%, or a positive absolute number",
    )
