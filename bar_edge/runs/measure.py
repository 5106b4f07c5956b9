"""An artifact or ONNX file measured and judged, and the measurement noted in the run that it belongs to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bar_edge.bench import (
    Comparison,
    Measurement,
    bench_onnx,
    compare,
    load_measurement,
    meets,
    save_measurement,
    summary,
)
from bar_edge.files import read_json
from bar_edge.records import Budget
from bar_edge.records.result import LatencyEntry
from bar_edge.records.verdict import Verdict
from bar_edge.requests import BenchRequest
from bar_edge.runs.door import judge
from bar_edge.runs.run_folder import read_result, write_result
from bar_edge.targets.verify import MANIFEST, overflow_note


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Benched:
    """A measurement and what it is held against."""

    measurement: Measurement
    budget: Budget | None
    comparison: Comparison | None
    #: name of the file that holds it
    file: str
    #: what speaks against the file on the processor that was measured
    warnings: tuple[str, ...] = ()

    @property
    def verdict(self) -> bool | None:
        """Whether the outputs are right and the budget is met; None where nothing was asked and nothing is wrong."""
        parity = self.measurement.parity
        right = None if parity is None else bool(parity["within"])
        within = None if self.budget is None else meets(self.measurement, self.budget)
        return Verdict(right=right, within=within).yes if within is not None or right is False else None

    @property
    def p50_ms(self) -> float | None:
        """The median, None where the runs are too few for it."""
        return self.measurement.percentile_ms(50)

    def to_json(self) -> dict[str, Any]:
        """Return the measurement without its raw samples."""
        found = summary(self.measurement, budget=self.budget, comparison=self.comparison)
        found["warnings"] = [*found["warnings"], *self.warnings]
        return {"verdict": self.verdict, **found, "file": self.file}


def runtime_of(target: Path, request: BenchRequest) -> str:
    """Return the runtime that measures a file: the one asked for, else the one that the artifact was made for."""
    return request.runtime or judge(_manifest(target).get("target", ""))


def _manifest(target: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(target / MANIFEST) if (target / MANIFEST).is_file() else {}
    return found


def measure(target: Path, request: BenchRequest) -> Benched:
    """Measure an artifact or ONNX file alone, in turn with another or against a measurement; save it beside the file.

    It is noted in result.json if the file is an artifact of a RUN. Raises what `bench_onnx` raises.
    """
    against = request.against
    older = load_measurement(against) if against is not None and against.suffix == ".json" else None
    found = bench_onnx(
        [target] if against is None or older else [target, against],
        runtime=runtime_of(target, request),
        precision=request.precision,
        threads=request.threads,
        batch=request.batch,
        seconds=request.seconds,
        on=request.on,
        expect=older.environment if older else None,
    )
    comparison = compare(found[0], older or found[1]) if against else None
    budget = Budget.parse(request.budget) if request.budget else None
    file = save_measurement(target, found[0], budget=budget, comparison=comparison)
    run = target.resolve().parent.parent
    if target.is_dir() and (run / "result.json").is_file():
        entry = _entry(found[0], f"{target.name}/{file.name}")
        write_result(run, read_result(run).with_latency(entry))
    warnings = tuple(overflow_note(_manifest(target), found[0].environment))
    return Benched(measurement=found[0], budget=budget, comparison=comparison, file=file.name, warnings=warnings)


def _entry(measured: Measurement, file: str) -> LatencyEntry:
    environment = measured.environment
    return LatencyEntry(
        name=measured.name,
        on=str(environment["on"]),
        runtime=str(environment["runtime"]),
        precision=str(environment["precision"]),
        threads=int(environment["threads"] or 0),
        batch=measured.batch,
        p50_ms=measured.percentile_ms(50),
        n=len(measured.samples_ms),
        file=file,
    )
