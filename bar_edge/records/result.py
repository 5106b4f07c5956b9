"""result.json: what a run came to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bar_edge.records.counts import Counts
from bar_edge.records.json_data import json_data, read_record
from bar_edge.records.tolerance import PARITY_LIMIT
from bar_edge.records.verdict import Verdict, keeps_metric


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """What the task measures."""

    name: str
    higher_is_better: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BudgetResult:
    """A budget and what became of it; all costs in its unit."""

    text: str
    unit: str
    limit: float
    achieved: float
    within: bool
    #: counted, table or measured
    basis: str
    words: str = ""
    #: of a measured budget: by the table, of each round, and of the processes that judged
    by_table: float | None = None
    rounds_ms: tuple[float, ...] | None = None
    rounds_by_table: tuple[float, ...] | None = None
    verdict_ms: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Costs and metric of the dense or the sliced network."""

    volume: int
    flops: int
    params: int
    metric: float | None
    #: of the sliced network in its regular form
    volume_regular: int | None = None
    flops_regular: int | None = None

    @classmethod
    def of(cls, counts: Counts, metric: float, regular: Counts | None = None) -> Side:
        """Return the side of a network, of the sliced one with the counts of its regular form."""
        volume, flops = (regular.volume, regular.flops) if regular else (None, None)
        return cls(**dataclasses.asdict(counts), metric=metric, volume_regular=volume, flops_regular=flops)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """Relative differences of outputs; None where nothing was compared yet."""

    masked_vs_sliced: float
    sliced_vs_onnx: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LatencyEntry:
    """One measurement of one of the run's artifacts."""

    name: str
    on: str
    runtime: str
    precision: str
    threads: int
    batch: int
    p50_ms: float | None
    n: int
    #: below artifacts/
    file: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerResult:
    """One convolution: its output channels before and after, and the pixels of its output."""

    name: str
    kind: str
    width: int
    kept: int
    area: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InputResult:
    """What the network takes: mean and std of images scaled to [0, 1], per channel."""

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run came to; metrics are fractions in [0, 1], what has not been computed yet is None."""

    method: str
    model: str
    data: str
    seed: int
    metric: Metric
    budget: BudgetResult
    dense: Side
    sliced: Side
    parity: Parity
    latency: tuple[LatencyEntry, ...] = ()
    layers: tuple[LayerResult, ...]
    end_of_pruning: dict[str, Any]
    batchnorm_reestimated: bool
    #: percentage points
    max_drop: float | None
    input: InputResult
    versions: dict[str, str]

    @property
    def verdict(self) -> bool:
        """Whether the network is within its budget, computes what the masked one does and kept its metric."""
        drop = 0.0
        if self.max_drop is not None:
            before, after = (100 * (side.metric or 0.0) for side in (self.dense, self.sliced))
            drop = before - after if self.metric.higher_is_better else after - before
        return Verdict(
            within=self.budget.within,
            right=self.parity.masked_vs_sliced <= PARITY_LIMIT,
            kept=keeps_metric(drop, self.max_drop),
        ).yes

    def with_latency(self, entry: LatencyEntry) -> Result:
        """Return the result with a measurement, in place of an older one of the same file."""
        others = tuple(old for old in self.latency if old.file != entry.file)
        return dataclasses.replace(self, latency=(*others, entry))

    def with_onnx_parity(self, error: float) -> Result:
        """Return the result with the difference of an exported file's outputs."""
        return dataclasses.replace(self, parity=dataclasses.replace(self.parity, sliced_vs_onnx=error))

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON data (schema 1)."""
        data: dict[str, Any] = json_data(self)
        method = data.pop("method")
        for part in ("budget", "dense", "sliced"):
            data[part] = {name: v for name, v in data[part].items() if v is not None or name == "metric"}
        return {"schema": 1, "verdict": self.verdict, "method": method, **data}

    @classmethod
    def from_json(cls, data: Any) -> Result:
        """Read a result; raises InputError if the data is none of schema 1."""
        schema = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
        return read_record(cls, data if schema == 1 else schema, "a result.json of schema 1")
