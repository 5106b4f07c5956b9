"""Fills the templates: what a run's files say, in the words and units of a person."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bar_edge.errors import InputError
from bar_edge.files import write_bytes
from bar_edge.records import COSTS, Latency
from bar_edge.records.cost import write_cost
from bar_edge.report import plots
from bar_edge.report.run_files import RunFiles, read_run

_PERCENTILES = (50, 90, 99)
_PRECISIONS = ("fp32", "bf16", "fp16", "int8")


@contextlib.contextmanager
def _as_written() -> Iterator[None]:
    """Raise InputError where a manifest or a measurement of a run holds something else than bar-edge writes."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, jinja2.TemplateError) as error:
        raise InputError(
            "files of a run as bar-edge wrote them",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            consequence="no page was written",
            remedy="remove the artifact whose manifest or measurement was changed, or write it again",
        ) from error


@_as_written()
def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write a run's page, `report.html` in its folder or `out`, and return its path.

    The page is one file that asks for no other. Raises InputError if the folder is no run or cannot be written.
    """
    run = read_run(run_folder)
    context = {
        "run": run,
        "result": run.result,
        "headline": _headline(run),
        "costs": _costs(run.result),
        "budget_curve": _markup(
            plots.budget_curve(run.metrics, run.result["budget"].get("limit"), _unit(run.result["budget"]))
        ),
        "metric_curve": _markup(plots.metric_curve(run.metrics, run.result["metric"]["name"])),
        "layers": run.result.get("layers") or [],
        "removed": removed_blocks(run.result.get("layers") or []),
        "widths": _markup(plots.widths(run.result.get("layers") or [])),
        "latencies": [latency for artifact in run.artifacts for latency in _latencies(artifact.measurements)],
        "artifacts": _side_by_side(run),
        "parity": [(_words(k), v) for k, v in (run.result.get("parity") or {}).items()],
    }
    return _render("report.html.j2", context, out or run_folder / "report.html")


@_as_written()
def write_comparison(run_folders: Sequence[Path], out: Path) -> Path:
    """Write one page that sets several runs side by side, and return its path; raises InputError as above."""
    runs = [read_run(folder) for folder in run_folders]
    names = {run.result["metric"]["name"] for run in runs}
    points = []
    for run in runs:
        dense, sliced = run.result["dense"], run.result["sliced"]
        factor = _factor(dense["volume"], sliced["volume"])
        if factor and sliced["metric"] is not None:
            points.append((run.result["method"], factor, sliced["metric"]))
            if dense["metric"] is not None:
                points.append(("dense", 1.0, dense["metric"]))
    context = {
        "runs": [(run, _headline(run), {row["cost"]: row for row in _costs(run.result)}) for run in runs],
        # metrics of several kinds share no axis
        "trade_off": _markup(plots.trade_off(points, names.pop())) if len(names) == 1 else None,
    }
    return _render("comparison.html.j2", context, out)


def removed_blocks(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the blocks of which no convolution is left, and single removed convolutions outside such blocks.

    A block is what shares a module as parent: `layer1.0` for `layer1.0.conv1` and `layer1.0.conv2`.
    """
    blocks: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        blocks.setdefault(layer["name"].rpartition(".")[0], []).append(layer)
    found: list[str] = []
    for parent, members in blocks.items():
        gone = [layer["name"] for layer in members if not layer["kept"]]
        found += [parent] if parent and len(members) > 1 and len(gone) == len(members) else gone
    return found


def _headline(run: RunFiles) -> dict[str, Any]:
    result, budget = run.result, run.result["budget"]
    dense, sliced = result["dense"]["metric"], result["sliced"]["metric"]
    known = dense is not None and sliced is not None
    medians = [
        latency["median"]
        for a in run.artifacts
        for latency in _latencies(a.measurements)
        if latency["median"] is not None
    ] or [entry["p50_ms"] for entry in result.get("latency") or [] if entry.get("p50_ms") is not None]
    return {
        "within": budget.get("within"),
        "verdict": result.get("verdict", budget.get("within")),
        "unit": _unit(budget),
        "limit": budget.get("limit"),
        "achieved": budget.get("achieved"),
        "metric_name": result["metric"]["name"],
        "dense": dense,
        "sliced": sliced,
        "known": known,
        "points": 100 * (sliced - dense) if known else None,
        "median_ms": medians[0] if medians else None,
    }


def _costs(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    dense, sliced = result["dense"], result["sliced"]
    return [
        {
            "cost": cost.title,
            "dense": dense[key],
            "mixed": sliced[key],
            "mixed_factor": _factor(dense[key], sliced[key]),
            "regular": sliced.get(f"{key}_regular"),
            "regular_factor": _factor(dense[key], sliced.get(f"{key}_regular")),
        }
        for key, cost in COSTS.items()
        if key in dense
    ]


def _side_by_side(run: RunFiles) -> list[dict[str, Any]]:
    """Return what there is to compare of the artifacts that say their precision, fp32 first."""
    rows = []
    for artifact in run.artifacts:
        manifest = artifact.manifest or {}
        precision, held_out = manifest.get("precision"), manifest.get("held_out")
        if precision not in _PRECISIONS:
            continue
        rows.append(
            {
                "name": artifact.name,
                "precision": precision,
                "lowering": manifest.get("lowering"),
                "size_bytes": artifact.size_bytes,
                "measured": list(_latencies(artifact.measurements)),
                "speedup": manifest.get("speedup_over_fp32"),
                "metric": (held_out["fp32"], held_out[precision]) if held_out else None,
                "difference": manifest.get("difference_from_fp32", (manifest.get("parity") or {}).get("error")),
            }
        )
    return sorted(rows, key=lambda row: _PRECISIONS.index(row["precision"]))


def _latencies(measurements: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for file, record in measurements.items():
        latency = Latency(
            name=str(record.get("name") or file),
            samples_ms=tuple(float(ms) for ms in record.get("samples_ms") or ()),
            warmup_runs=int(record.get("warmup_runs") or 0),
            batch=int(record.get("batch") or 1),
            environment=dict(record.get("environment") or {}),
        )
        if latency.samples_ms:
            yield {
                "file": file,
                "latency": latency,
                "median": latency.percentile_ms(50),
                "percentiles": [(p, latency.percentile_ms(p)) for p in _PERCENTILES],
                "budget": record.get("budget"),
                "comparison": record.get("comparison"),
                "histogram": _markup(plots.histogram(latency.samples_ms)),
            }


def _unit(budget: Mapping[str, Any]) -> str:
    return COSTS[budget["unit"]].unit


def _factor(before: float | None, after: float | None) -> float | None:
    return before / after if before and after else None


def _markup(svg: str | None) -> Markup | None:
    # plots.py makes these, and matplotlib escapes the text in them
    return None if svg is None else Markup(svg)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: object, digits: int = 2) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or value.is_integer():
        return f"{int(value):,}"
    return f"{value:,.{digits}f}"


def _cost(value: float | None, short: bool = False) -> str:
    return "not measured" if value is None else write_cost(value, short=short)


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.2f} %"


def _render(template: str, context: Mapping[str, Any], out: Path) -> Path:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bar_edge.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "cost": _cost, "words": _words}
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    text = environment.get_template(template).render(style=Markup(re.sub(r"\s+", " ", style)), **context)
    write_bytes(out, text.encode())
    return out
