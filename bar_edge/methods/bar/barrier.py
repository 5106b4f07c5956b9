"""The barrier and the moving budget (Lemaire et al. 2019, eq. 5 to 7; supplement, eq. 1)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Transition = Literal["sigmoid", "linear", "exponential"]


def barrier(cost: float, low: float, high: float, cap: float = math.inf) -> float:
    """Return f(V, a, b): 0 up to `low`, (V-a)^2 / ((b-V)(b-a)) between, `cap` from `high` on (eq. 5)."""
    if cost <= low:
        return 0.0
    if cost >= high:
        return cap
    return min(cap, (cost - low) ** 2 / ((high - cost) * (high - low)))


def transition(t: float, kind: Transition = "sigmoid", steepness: float = 10.0) -> float:
    """Return T(t), from T(0) = 0 to T(1) = 1.

    sigmoid: slow at both ends (supplement, eq. 1; steepness 0 is the linear limit); exponential:
    (1 - e^(-d t)) / (1 - e^(-d)), fast first (paper, section 3.4, in words).
    """
    t = min(max(t, 0.0), 1.0)
    if kind == "linear" or steepness == 0:
        return t
    if kind == "exponential":
        return math.expm1(-steepness * t) / math.expm1(-steepness)
    delta = 1 / (1 + math.exp(steepness / 2))
    return (1 / (1 + math.exp(-steepness * (t - 0.5))) - delta) / (1 - 2 * delta)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BudgetSchedule:
    """The margins (a, b) of the barrier over a pruning phase, in the unit of the cost (eq. 7)."""

    full: float
    limit: float
    steps: int
    kind: Transition = "sigmoid"
    steepness: float = 10.0
    #: b(0) = (1 + slack) * full, so that the barrier is finite at the first step
    slack: float = 0.01
    #: a = limit - margin * full
    margin: float = 1e-4

    def upper(self, step: int) -> float:
        """Return b at a step; b(steps) = limit."""
        moved = transition(step / max(1, self.steps), self.kind, self.steepness)
        return (1 - moved) * (1 + self.slack) * self.full + moved * self.limit

    @property
    def lower(self) -> float:
        """Return a."""
        return self.limit - self.margin * self.full
