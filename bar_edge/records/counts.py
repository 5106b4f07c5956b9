"""What is counted of a network."""

from __future__ import annotations

import dataclasses

#: a name in COSTS
Metric = str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Costs of a network: activations, FLOPs (2 per multiply-add, convolutions only), all parameters."""

    volume: int
    flops: int
    params: int

    def of(self, metric: Metric) -> int:
        """Return one of the counts; raises KeyError for what is none."""
        counts: dict[str, int] = dataclasses.asdict(self)
        return counts[metric]
