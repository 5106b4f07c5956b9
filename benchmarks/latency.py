"""How well does a latency table predict whole networks, beside what is proportional to FLOPs or volume?

Per network: a table by `bar-edge profile`, then random plans of uneven widths (benchmarks/masks.py; the table is
fitted to plans of even ones), exported in the table's form and measured in interleaved groups. The proportional
predictors are fitted to the same measurements that they are judged by, each with its best factor and constant.
Resumable. Run: python -m benchmarks.latency --files FOLDER [--prepare] [--models resnet56] [--plans 20]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bar_edge.bench import bench_onnx
from bar_edge.files import read_json, write_json
from bar_edge.latency_budget.operation_prices import undisturbed_ms
from bar_edge.latency_budget.profile_device import export_plan, plot_table, profile_network
from bar_edge.methods import GateLayout
from bar_edge.models import build
from bar_edge.network import Network, count, trace
from bar_edge.records import ChannelPlan
from bar_edge.records.latency_table import LatencyTable
from bar_edge.records.lowering import Lowering
from bar_edge.targets.table import forms_for
from benchmarks.masks import uneven_plan

HERE = Path(__file__).parent / "results" / "latency"
RESULTS = HERE.with_suffix(".json")
MODELS = ("resnet56", "wrn-16-4", "mobilenetv2")
#: what `bar-edge profile` chooses for mobilenetv2, whose bottlenecks are slow below 16 channels, and for the others
LOWERINGS = {"mobilenetv2": Lowering.parse("pointwise:16")}
USUAL = forms_for("onnxruntime-cpu", "fp32").candidates[0]
FACTORS = (1.5, 2, 3, 4, 6, 8, 12, 16)
#: plans measured in turn, and for how long each
GROUP, SECONDS = 20, 1.5


def network_of(model: str) -> Network:
    """Return the dense network with random weights."""
    torch.manual_seed(0)
    return trace(build(model, input_shape=(3, 32, 32), classes=10).eval(), torch.zeros(2, 3, 32, 32))


def table_of(model: str, network: Network) -> tuple[LatencyTable, float | None]:
    """Return the table of a network and the seconds of making it, None if it was there."""
    file = HERE / f"{model}.json"
    if file.is_file():
        return LatencyTable.load(file), None
    HERE.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    table = profile_network(network, file, model=model, lowering=LOWERINGS.get(model, USUAL))
    plot_table(table, file.with_suffix(".svg"))
    return table, time.monotonic() - start


def plans_of(network: Network, seeds: range) -> dict[int, ChannelPlan]:
    """Return the random plans of some seeds."""
    return {seed: uneven_plan(network, FACTORS[seed % len(FACTORS)], 100 + seed) for seed in seeds}


def export(network: Network, plans: dict[int, ChannelPlan], prefix: Path, lowering: Lowering) -> list[Path]:
    """Export what is not there yet, as PREFIX-FORM-SEED.onnx."""
    files = [prefix.with_name(f"{prefix.name}-{str(lowering).replace(':', '_')}-{seed}.onnx") for seed in plans]
    for file, plan in zip(files, plans.values(), strict=True):
        if not file.is_file():
            export_plan(network, plan, lowering, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    return files


def measure(network: Network, table: LatencyTable, seeds: range, prefix: Path) -> list[dict[str, Any]]:
    """Predict and measure one group of random plans."""
    layout, plans = GateLayout(network, table=table), plans_of(network, seeds)
    rows = list[dict[str, Any]]()
    for seed, plan in plans.items():
        counts = count(network, plan)
        predicted = layout.cost(plan.kept, "ms")
        rows.append({"seed": seed, "predicted_ms": predicted, "flops": counts.flops, "volume": counts.volume})
    for row, found in zip(
        rows, bench_onnx(export(network, plans, prefix, table.lowering), seconds=SECONDS), strict=True
    ):
        row |= {"ms": undisturbed_ms(found), "wall_ms": found.percentile_ms(50), "runs": len(found.samples_ms)}
    return rows


def errors(rows: list[dict[str, Any]], by: str) -> np.ndarray:
    """Return relative errors; those of `flops` and `volume` after the best linear fit of relative errors."""
    ms = np.array([row["ms"] for row in rows])
    predicted = np.array([row["predicted_ms" if by == "table" else by] for row in rows], dtype=float)
    if by != "table":
        design = np.stack([predicted, np.ones_like(predicted)], 1)
        predicted = design @ np.linalg.lstsq(design / ms[:, None], np.ones_like(ms), rcond=None)[0]
    found: np.ndarray = np.abs(predicted / ms - 1)
    return found


def report(results: dict[str, Any]) -> str:
    """Return the errors as Markdown."""
    lines = ["| network | n | predictor | median error | within 10 % | worst |", "|---|---|---|---|---|---|"]
    for model, found in results["models"].items():
        for by in ("table", "flops", "volume"):
            e = errors(found["rows"], by)
            within = float((e <= 0.1).mean())
            lines.append(f"| {model} | {len(e)} | {by} | {np.median(e):.1%} | {within:.0%} | {e.max():.1%} |")
    together = np.concatenate([errors(found["rows"], "table") for found in results["models"].values()])
    within = float((together <= 0.1).mean())
    lines.append(f"| all | {len(together)} | table | {np.median(together):.1%} | {within:.0%} | {together.max():.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, write JSON after every group, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--plans", type=int, default=20, help="per network")
    parser.add_argument("--files", type=Path, required=True, help="a folder for the exported networks")
    parser.add_argument("--prepare", action="store_true", help="only export, which needs no quiet machine")
    options = parser.parse_args()
    options.files.mkdir(parents=True, exist_ok=True)
    results = read_json(RESULTS) if RESULTS.is_file() else {"models": {}}
    for model in options.models.split(","):
        network, prefix = network_of(model), options.files / model
        if options.prepare:
            export(network, plans_of(network, range(options.plans)), prefix, LOWERINGS.get(model, USUAL))
            continue
        table, seconds = table_of(model, network)
        found = results["models"].setdefault(model, {"rows": [], "environment": table.environment, "loads": []})
        if seconds is not None:
            found["table_seconds"] = round(seconds)
        while len(found["rows"]) < options.plans:
            start = len(found["rows"])
            found["rows"] += measure(network, table, range(start, min(start + GROUP, options.plans)), prefix)
            found["loads"].append(round(os.getloadavg()[0], 2))
            write_json(RESULTS, results)
    print(report(results))


if __name__ == "__main__":
    main()
