"""What travels between the stages: small frozen records, free of torch."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bar_edge.errors import InputError

Metric = Literal["volume", "flops", "params", "ms"]

_UNITS: dict[str, tuple[Metric, float]] = {
    "act": ("volume", 1),
    "FLOPs": ("flops", 1),
    "kFLOPs": ("flops", 1e3),
    "MFLOPs": ("flops", 1e6),
    "GFLOPs": ("flops", 1e9),
    "params": ("params", 1),
    "kparams": ("params", 1e3),
    "Mparams": ("params", 1e6),
    "ms": ("ms", 1),
}
_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)(?P<unit>[a-zA-Z%]+)(?::(?P<metric>[a-z]+))?")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Costs of a network: activations, FLOPs (2 per multiply-add, convolutions only), all parameters."""

    volume: int
    flops: int
    params: int

    def of(self, metric: Metric) -> int:
        """Return the count that a counted metric names; raises KeyError for ms."""
        return {"volume": self.volume, "flops": self.flops, "params": self.params}[metric]


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
            if metric not in (None, "volume", "flops", "params"):
                raise _bad_budget(text)
            share = 1 / number if unit == "x" and number else number / 100
            if not 0 < share <= 1:
                raise _bad_budget(text)
            return cls(text=text, metric=metric or "volume", share=share)  # type: ignore[arg-type]
        if unit not in _UNITS or metric is not None or number == 0:
            raise _bad_budget(text)
        named, factor = _UNITS[unit]
        return cls(text=text, metric=named, absolute=number * factor)

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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChannelPlan:
    """Which output channels of every gated convolution stay.

    network: fingerprint of the dense network's graph; kept: module name -> sorted original indices.
    """

    network: str
    kept: dict[str, tuple[int, ...]]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON data (schema 1)."""
        return {"schema": 1, "network": self.network, "kept": {k: list(v) for k, v in self.kept.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ChannelPlan:
        """Read a plan; raises InputError if the data is not one."""
        try:
            if data["schema"] != 1:
                raise ValueError(f"schema {data['schema']}")
            kept = {str(name): tuple(int(i) for i in ids) for name, ids in data["kept"].items()}
            return cls(network=str(data["network"]), kept=kept)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError("a plan.json of schema 1", got=f"{type(error).__name__}: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Timed runs of one artifact on one device, raw samples kept; percentiles are derived.

    samples_ms: one entry per inference, in order of measurement; environment: runtime and its
    version, threads, device, operating system, whatever the verdict depends on.
    """

    name: str
    samples_ms: tuple[float, ...]
    warmup_runs: int
    batch: int
    environment: dict[str, str | int | float | None]

    def percentile_ms(self, p: float) -> float | None:
        """Return the p-th percentile (nearest rank), or None if too few samples carry it.

        A percentile needs 1/(1 - p/100) samples beyond it tenfold, but at least 64 for p90 and
        662 for p99 (MLPerf's early-stopping floors); the median needs 5.
        """
        needed = 5 if p <= 50 else {90: 64, 99: 662}.get(int(p), math.ceil(10 / (1 - p / 100)))
        if len(self.samples_ms) < needed:
            return None
        ordered = sorted(self.samples_ms)
        return ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)]


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, then rename: the old file stays whole until then.

    Raises InputError where that cannot be done.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"a place to write {path.name}",
            got=error.strerror or type(error).__name__,
            consequence="no file was written",
        ) from error


def write_json(path: Path, data: Any) -> None:
    """Write JSON as `write_bytes` does."""
    write_bytes(path, (json.dumps(data, indent=1, sort_keys=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; raises InputError if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        got = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise InputError(f"a JSON file at {path.name}", got=str(got), remedy="correct the path") from error
