"""The cells as rows and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bar_edge.files import read_json, write_json
from benchmarks.cifar10 import paired_bootstrap

RESULTS = Path(__file__).parents[1] / "results" / "equal_latency"


def rows(by: str) -> list[dict[str, Any]]:
    """Return one row for each cell, with ours minus its arm; write table_BY.json and the plot."""
    cells = [read_json(file) for file in sorted((RESULTS / by).glob("*_s*.json"))]
    right = {
        _key(c, c["arm"]): np.unpackbits(np.frombuffer(bytes.fromhex(c["right"]), np.uint8))[:10_000] for c in cells
    }
    found = []
    for c in cells:
        row = {k: v for k, v in c.items() if k not in ("right", "environment")}
        ours = _key(c, "ours")
        if c["arm"] != "ours" and ours in right:
            points, low = paired_bootstrap([right[ours]], [right[_key(c, c["arm"])]])
            row |= {"ours_minus": points, "low_95": low}
        found.append(row)
    write_json(RESULTS / f"table_{by}.json", {"test_images": 10_000, "cells": found})
    if found:
        plot(found, by)
    return found


def _right(c: dict[str, Any]) -> np.ndarray:
    """Return for each test image whether it was classified right."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(c["right"]), np.uint8))[:10_000]


def _key(c: dict[str, Any], arm: str) -> tuple[Any, ...]:
    return (c["model"], arm, c["share"], c["seed"])


def plot(found: list[dict[str, Any]], by: str) -> None:
    """Draw accuracy against the cost, a line for each arm, seeds averaged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cost = "ms" if by == "ms" else "flops"
    models = sorted({row["model"] for row in found})
    figure, grid = plt.subplots(1, len(models), figsize=(6 * len(models), 4), squeeze=False)
    for axes, model in zip(grid[0], models, strict=True):
        for arm in dict.fromkeys(row["arm"] for row in found):
            own = [row for row in found if row["arm"] == arm and row["model"] == model and cost in row]
            points = []
            for share in sorted({row["share"] for row in own}):
                seeds = [row for row in own if row["share"] == share]
                points.append([np.mean([r[cost] for r in seeds]), 100 * np.mean([r["accuracy"] for r in seeds])])
            if points:
                axes.plot(*np.array(points).T, "o-", label=arm, markersize=4, linewidth=2 if arm == "ours" else 1)
        axes.set(title=model, xlabel="latency, ms" if by == "ms" else "FLOPs", ylabel="accuracy, %")
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{by}.svg", metadata={"Date": None})
    plt.close(figure)
