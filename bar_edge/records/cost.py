"""What a budget can limit: one line each in COSTS, with its units, how it is counted, and how a person reads it.

FLOPs are 2 per multiply-add, as in Lemaire et al. 2019, section 5.2; volume is their equation 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol


class Work(Protocol):
    """One call of an operation with parameters, as `bar_edge.network.counted_cost.Unit` describes it."""

    @property
    def area(self) -> int:
        """Output positions of a convolution, 0 for other operations."""

    @property
    def flop_rate(self) -> int:
        """FLOPs per pair of an input and an output channel."""

    @property
    def weights(self) -> int:
        """Parameters per pair of an input and an output channel."""

    @property
    def vectors(self) -> int:
        """Parameters per output channel."""

    @property
    def constant(self) -> int:
        """Parameters that belong to no channel."""

    @property
    def whole(self) -> tuple[int, int]:
        """Activations and FLOPs of a layer that is never pruned but in one piece."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a call costs: per output channel, per pair of an input and an output channel, and as long as it is there."""

    per_output: float = 0
    per_pair: float = 0
    constant: float = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """One line of COSTS."""

    #: "activation volume"
    title: str
    #: of its numbers: "activations"
    unit: str
    #: ends of absolute budgets, and how many of the unit each is: {"MFLOPs": 1e6}
    suffixes: Mapping[str, float]
    #: of one call; of a cost of a device only to find the cheapest path
    rates: Callable[[Work], Rates]
    #: priced by a table that `profile` writes, and measured by `bench`; other costs are counted
    of_device: bool = False
    #: a module that is called twice costs once, and numbers that the graph reads by themselves cost too
    of_parameters: bool = False
    #: falls as widths do, where FLOPs fall as their square
    by_width: bool = False

    @property
    def basis(self) -> str:
        """How a network's cost is known without measuring it."""
        return "table" if self.of_device else "counted"

    def say(self, value: float) -> str:
        """Return a value with its unit, as a person reads it."""
        return f"{write_cost(value)} {self.unit}"


def write_cost(value: float, *, short: bool = False) -> str:
    """Return a value of any cost as a person reads it: 100 and more in whole numbers, less in four digits.

    short: from a million on as `1.234 M`, so that a phone shows three of them side by side.
    """
    for power, sign in ((1e9, "G"), (1e6, "M")):
        if short and value >= power:
            return f"{value / power:.4g} {sign}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.4g}"


def _volume(work: Work) -> Rates:
    return Rates(per_output=work.area, constant=work.whole[0])


def _flops(work: Work) -> Rates:
    return Rates(per_pair=work.flop_rate, constant=work.whole[1])


def _params(work: Work) -> Rates:
    return Rates(per_output=work.vectors, per_pair=work.weights, constant=work.constant)


#: name, as in `16x:flops` and result.json, to what it is
COSTS: dict[str, Cost] = {
    "volume": Cost(title="activation volume", unit="activations", suffixes={"act": 1}, rates=_volume, by_width=True),
    "flops": Cost(
        title="FLOPs", unit="FLOPs", suffixes={"FLOPs": 1, "kFLOPs": 1e3, "MFLOPs": 1e6, "GFLOPs": 1e9}, rates=_flops
    ),
    "params": Cost(
        title="parameters",
        unit="parameters",
        suffixes={"params": 1, "kparams": 1e3, "Mparams": 1e6},
        rates=_params,
        of_parameters=True,
    ),
    "ms": Cost(title="latency", unit="ms", suffixes={"ms": 1}, rates=_flops, of_device=True),
}
