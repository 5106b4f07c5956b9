"""Closing the loop on a budget in ms: measure, and prune again until the measurement uses what the budget allows."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bar_edge.errors import InputError
from bar_edge.files import read_json, write_json
from bar_edge.methods import smallest_cost
from bar_edge.network import Network
from bar_edge.records.export_result import ExportResult
from bar_edge.records.json_data import json_data, read_record
from bar_edge.runs.measure import Benched
from bar_edge.runs.run_folder import Pruned, Run, read_result, write_result

#: corrections at most
ROUNDS = 3
#: shares of the budget between which a measurement ends the loop, and at which a correction aims
LEAST, AIM, MOST = 0.92, 0.96, 0.98
#: share below which a verdict makes the loop go on
WASTED = 0.9
#: what a round leaves in the RUN folder
_RESULTS = ("network", "plan.json", "result.json", "artifacts")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One pruned network of the loop; all latencies in ms."""

    #: by the table, that it was projected onto
    limit: float
    by_table: float
    measured: float
    export: ExportResult


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Rounds:
    rounds: tuple[Round, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Closed:
    """What the loop ends with: the round's export, and the measurement in the middle of those that judged it."""

    export: ExportResult
    #: None where nothing could be exported
    measured: Benched | None = None
    within: bool | None = None
    rounds: int = 0
    medians_ms: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the verdict and the measurement as `bench` does, with the medians that judged."""
        if self.measured is None:
            return {"verdict": None}
        found = {"verdict": self.within, "rounds": self.rounds, "medians_ms": list(self.medians_ms)}
        return {**self.measured.to_json(), **found}


def close_loop(
    run: Run,
    first: Pruned,
    export: Callable[[Pruned], ExportResult],
    measure: Callable[[Path], Benched],
) -> Closed:
    """Export and measure a RUN's network; prune it again, more or less, while it misses or wastes a budget in ms.

    first: what the run came to. export: writes the RUN's artifact. measure: an artifact. The round that uses most of
    the budget, or the fastest if none is within it, is measured anew for the verdict; where
    that misses or wastes the budget it counts as what the round measures, and the loop goes on. The RUN
    folder ends with that round. A stopped loop goes on.
    """
    folder = run.out / "checkpoints"
    rounds = _read_rounds(folder / "rounds.json")
    verdicts: dict[int, tuple[list[Benched], float]] = {}
    pruned, limit = first, min(run.limit, run.layout.cost({}, run.budget.metric))
    while True:
        while not rounds or (len(rounds) <= ROUNDS and (again := next_limit(run, rounds)) is not None):
            if rounds and again is not None:
                limit = again
                run.progress.note(f"measured {rounds[-1].measured:.3f} ms: again for {limit:.3f} by the table")
                pruned = correct(run, pruned.dense, limit)
            exported = export(pruned)
            if not exported.bytes:
                return Closed(export=exported)
            _, measured = in_fresh_processes(measure, exported)
            _copy(run.out, folder / f"round-{len(rounds)}")
            by_table = pruned.result.budget.achieved
            rounds.append(Round(limit=limit, by_table=by_table, measured=measured, export=exported))
            write_json(folder / "rounds.json", {"rounds": json_data(rounds)})
        chosen = best(rounds, run.limit)
        _copy(folder / f"round-{chosen}", run.out)
        if chosen in verdicts:
            break
        verdicts[chosen] = in_fresh_processes(measure, rounds[chosen].export)
        median = verdicts[chosen][1]
        if WASTED * run.limit <= median <= run.limit:
            break
        rounds[chosen] = dataclasses.replace(rounds[chosen], measured=median)
        write_json(folder / "rounds.json", {"rounds": json_data(rounds)})
    return _noted(run, rounds, rounds[chosen].export, *verdicts[chosen])


def _read_rounds(file: Path) -> list[Round]:
    """Return the rounds that a stopped loop has done."""
    if not file.is_file():
        return []
    return list(read_record(_Rounds, read_json(file), "the rounds.json of a stopped deploy").rounds)


def best(rounds: list[Round], budget_ms: float) -> int:
    """Return which round uses most of the budget, the fastest if none is within it."""
    measured = [found.measured for found in rounds]
    within = [ms for ms in measured if ms <= MOST * budget_ms]
    return measured.index(max(within) if within else min(measured))


def next_limit(run: Run, rounds: list[Round]) -> float | None:
    """Return the limit in ms by the table under which the measurement should meet the budget; None to stop.

    Between a round within the budget and one beyond it latencies are linear; otherwise proportional to the nearest's.
    """
    budget_ms, aim = run.limit, AIM * run.limit
    if LEAST * budget_ms <= rounds[best(rounds, budget_ms)].measured <= MOST * budget_ms:
        return None
    below = max((found for found in rounds if found.measured <= aim), key=lambda found: found.measured, default=None)
    above = min((found for found in rounds if found.measured > aim), key=lambda found: found.measured, default=None)
    if below and above:
        share = (aim - below.measured) / (above.measured - below.measured)
        limit = below.by_table + share * (above.by_table - below.by_table)
    else:
        nearest = below or above or rounds[-1]
        limit = nearest.by_table * aim / nearest.measured
    limit = min(max(limit, smallest_cost(run.layout, run.budget.metric)), run.layout.cost({}, run.budget.metric))
    return None if any(abs(found.limit / limit - 1) < 1e-3 for found in rounds) else limit


def correct(run: Run, dense: Network, limit: float) -> Pruned:
    """Prune a RUN again, onto a limit in ms by the table; writes network, plan and result."""
    return run.judged(dense, *run.corrected(limit))


def in_fresh_processes(measure: Callable[[Path], Benched], exported: ExportResult) -> tuple[list[Benched], float]:
    """Return three measurements and the median of their medians in ms: processes differ by more than runs do."""
    found = [measure(Path(exported.artifact)) for _ in range(3)]
    return found, sorted(map(_median, found))[1]


def _median(found: Benched) -> float:
    if found.p50_ms is None:
        runs = len(found.measurement.samples_ms)
        raise InputError("runs enough for a median", got=f"{runs} runs", remedy="measure longer: --seconds")
    return found.p50_ms


def _noted(run: Run, rounds: list[Round], exported: ExportResult, found: list[Benched], median: float) -> Closed:
    """Write the verdict, the median of fresh processes' medians, into result.json; return the measurement of it."""
    medians = tuple(map(_median, found))
    within = median <= run.limit and all(one.verdict is not False for one in found)
    result = read_result(run.out)
    budget = dataclasses.replace(
        result.budget,
        achieved=median,
        within=within,
        basis="measured",
        by_table=result.budget.achieved,
        rounds_ms=tuple(one.measured for one in rounds),
        rounds_by_table=tuple(one.by_table for one in rounds),
        verdict_ms=medians,
    )
    write_result(run.out, dataclasses.replace(result, budget=budget))
    middle = found[medians.index(median)]
    return Closed(export=exported, measured=middle, within=within, rounds=len(rounds), medians_ms=medians)


def _copy(source: Path, destination: Path) -> None:
    """Copy a round's results from one folder to another."""
    for name in _RESULTS:
        if (source / name).is_dir():
            shutil.rmtree(destination / name, ignore_errors=True)
            shutil.copytree(source / name, destination / name)
        elif (source / name).is_file():
            destination.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, destination / name)
