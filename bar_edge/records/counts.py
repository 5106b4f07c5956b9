"""What is counted of a network."""

from __future__ import annotations

import dataclasses
from typing import Literal

Metric = Literal["volume", "flops", "params", "ms"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Costs of a network: activations, FLOPs (2 per multiply-add, convolutions only), all parameters."""

    volume: int
    flops: int
    params: int

    def of(self, metric: Metric) -> int:
        """Return the count that a counted metric names; raises KeyError for ms."""
        return {"volume": self.volume, "flops": self.flops, "params": self.params}[metric]
