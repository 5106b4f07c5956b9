"""Closing the loop on a budget in ms: measure, and prune again until the measurement uses what the budget allows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bar_edge.files import read_json, write_json
from bar_edge.methods import smallest_cost
from bar_edge.runs.run_folder import Run, is_met

#: corrections at most
ROUNDS = 3
#: shares of the budget between which a measurement ends the loop, and at which a correction aims
LEAST, AIM, MOST = 0.92, 0.96, 0.98
#: share below which a verdict makes the loop go on
WASTED = 0.9
#: what a round leaves in the RUN folder
_RESULTS = ("network", "plan.json", "result.json", "artifacts")

Round = dict[str, Any]


def close_loop(
    run: Run, export: Callable[[], dict[str, Any]], measure: Callable[[str], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Export and measure a RUN's network; prune it again, more or less, while it misses or wastes a budget in ms.

    export: writes the RUN's artifact and returns what `export_run` does. measure: an artifact, as `bench` does.
    The round that uses most of the budget, or the fastest if none is within it, is measured anew for the verdict; where
    that misses or wastes the budget it counts as what the round measures, and the loop goes on. The RUN
    folder ends with that round; returns its export and its measurement. A stopped loop goes on.
    """
    folder = run.out / "checkpoints"
    file = folder / "rounds.json"
    rounds: list[Round] = read_json(file)["rounds"] if file.is_file() else []
    verdicts: dict[int, dict[str, Any]] = {}
    limit: float | None = min(run.limit, run.layout.cost({}, "ms"))
    while True:
        while not rounds or (len(rounds) <= ROUNDS and (limit := next_limit(run, rounds)) is not None):
            if rounds and limit is not None:
                run.progress.note(f"measured {rounds[-1]['measured']:.3f} ms: again for {limit:.3f} by the table")
                correct(run, limit)
            exported = export()
            if not exported["bytes"]:
                return exported, {"verdict": None}
            by_table = read_json(run.out / "result.json")["budget"]["achieved"]
            _, measured = in_fresh_processes(measure, exported["artifact"])
            _copy(run.out, folder / f"round-{len(rounds)}")
            rounds.append({"limit": limit, "by_table": by_table, "measured": measured, "export": exported})
            write_json(file, {"rounds": rounds})
        chosen = best(rounds, run.limit)
        _copy(folder / f"round-{chosen}", run.out)
        if chosen in verdicts:
            break
        found, median = in_fresh_processes(measure, rounds[chosen]["export"]["artifact"])
        verdicts[chosen] = {"found": found, "median": median}
        if WASTED * run.limit <= median <= run.limit:
            break
        rounds[chosen]["measured"] = median
        write_json(file, {"rounds": rounds})
    return rounds[chosen]["export"], _noted(run, rounds, **verdicts[chosen])


def best(rounds: list[Round], budget_ms: float) -> int:
    """Return which round uses most of the budget, the fastest if none is within it."""
    measured = [found["measured"] for found in rounds]
    within = [ms for ms in measured if ms <= MOST * budget_ms]
    return measured.index(max(within) if within else min(measured))


def next_limit(run: Run, rounds: list[Round]) -> float | None:
    """Return the limit in ms by the table under which the measurement should meet the budget; None to stop.

    Between a round within the budget and one beyond it latencies are linear; otherwise proportional to the nearest's.
    """
    budget_ms, aim = run.limit, AIM * run.limit
    if LEAST * budget_ms <= rounds[best(rounds, budget_ms)]["measured"] <= MOST * budget_ms:
        return None
    below = max((found for found in rounds if found["measured"] <= aim), key=_measured, default=None)
    above = min((found for found in rounds if found["measured"] > aim), key=_measured, default=None)
    if below and above:
        share = (aim - below["measured"]) / (above["measured"] - below["measured"])
        limit = below["by_table"] + share * (above["by_table"] - below["by_table"])
    else:
        nearest = below or above or rounds[-1]
        limit = nearest["by_table"] * aim / nearest["measured"]
    limit = min(max(limit, smallest_cost(run.layout, "ms")), run.layout.cost({}, "ms"))
    return None if any(abs(found["limit"] / limit - 1) < 1e-3 for found in rounds) else limit


def correct(run: Run, limit: float) -> None:
    """Prune a RUN again, onto a limit in ms by the table; writes network, plan and result."""
    dense = run.dense()
    sliced, plan, forced = run.corrected(limit)
    run.result(dense, sliced, plan, forced)


def in_fresh_processes(measure: Callable[[str], dict[str, Any]], artifact: str) -> tuple[list[dict[str, Any]], float]:
    """Return three measurements and the median of their medians in ms: processes differ by more than runs do."""
    found = [measure(artifact) for _ in range(3)]
    return found, sorted(float(answer["percentiles_ms"]["p50"]) for answer in found)[1]


def _noted(run: Run, rounds: list[Round], found: list[dict[str, Any]], median: float) -> dict[str, Any]:
    """Write the verdict, the median of fresh processes' medians, into result.json; return the measurement of it."""
    medians = [answer["percentiles_ms"]["p50"] for answer in found]
    within = median <= run.limit and all(answer["verdict"] is not False for answer in found)
    result = read_json(run.out / "result.json")
    result["budget"] |= {
        "achieved": median,
        "within": within,
        "basis": "measured",
        "by_table": result["budget"]["achieved"],
        "rounds_ms": [one["measured"] for one in rounds],
        "rounds_by_table": [one["by_table"] for one in rounds],
        "verdict_ms": medians,
    }
    result["verdict"] = is_met(result)
    write_json(run.out / "result.json", result)
    return {**found[medians.index(median)], "verdict": within, "rounds": len(rounds), "medians_ms": medians}


def _copy(source: Path, destination: Path) -> None:
    """Copy a round's results from one folder to another."""
    for name in _RESULTS:
        if (source / name).is_dir():
            shutil.rmtree(destination / name, ignore_errors=True)
            shutil.copytree(source / name, destination / name)
        elif (source / name).is_file():
            destination.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, destination / name)


def _measured(found: Round) -> float:
    measured: float = found["measured"]
    return measured
