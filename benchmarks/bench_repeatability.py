"""How well `bar-edge bench` repeats itself: the same file three times, quietly and beside busy neighbours.

Each run is a process of its own. Aim: medians within 3 % of each other; beside neighbours the runs must say that
they were disturbed. Others on the machine are reported too. Run: python -m benchmarks.bench_repeatability
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bar_edge.bench import RUNTIMES, bench_onnx, summary
from bar_edge.errors import EnvironmentLacks
from bar_edge.files import write_json
from bar_edge.models import build
from bar_edge.network import trace
from bar_edge.targets.onnx.file import export_onnx

RUNS, AIM = 3, 0.03


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep so many cores busy with processes of this program's own."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def repeat(file: Path, runtime: str, count: int, seconds: float) -> dict[str, Any]:
    """Measure a file `RUNS` times beside so many busy neighbours."""
    with neighbours(count):
        found = [summary(*bench_onnx([file], runtime=runtime, seconds=seconds)) for _ in range(RUNS)]
    medians = [answer["percentiles_ms"]["p50"] for answer in found]
    return {
        "runtime": runtime,
        "neighbours": count,
        "medians_ms": medians,
        "spread": max(medians) / min(medians) - 1,
        "cpu_medians_ms": [answer["cpu_median_ms"] for answer in found],
        "n": [answer["runs"] for answer in found],
        "disturbed": [any(text.startswith("disturbed") for text in answer["warnings"]) for answer in found],
        "interference": [answer["conditions"]["interference"] for answer in found],
        "environment": found[0]["environment"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    headings = ["runtime", "neighbours", "medians in ms", "spread", "of processor time", "cores busy elsewhere"]
    headings += ["waited for a core", "said so"]
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for row in rows:
        medians, cpu = (", ".join(f"{ms:.3f}" for ms in row[key]) for key in ("medians_ms", "cpu_medians_ms"))
        busy, waited = (
            ", ".join("-" if seen[key] is None else f"{seen[key]:.2f}" for seen in row["interference"])
            for key in ("cores_busy_elsewhere", "waited_for_core")
        )
        said = f"{sum(row['disturbed'])} of {len(row['disturbed'])}"
        spread = f"{100 * row['spread']:.1f} % | {cpu}"
        lines.append(f"| {row['runtime']} | {row['neighbours']} | {medians} | {spread} | {busy} | {waited} | {said} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every runtime that works here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring, per run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bench_repeatability.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    network = trace(build(options.model, input_shape=(3, 32, 32), classes=10), torch.zeros(2, 3, 32, 32)).eval()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{options.model}.onnx"
        export_onnx(network, (3, 32, 32), file)
        for runtime in RUNTIMES:
            for count in (0, 1, os.cpu_count() or 1):
                try:
                    rows.append(repeat(file, runtime, count, options.seconds))
                except EnvironmentLacks as error:
                    print(f"{runtime} is left out: {error.required}; got: {error.got}", file=sys.stderr)
                    break
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, {"model": options.model, "seconds": options.seconds, "aim": AIM, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
