"""Budgets in milliseconds: does `deploy` end within them, how much do they use, and is training for them worth it?

    python -m benchmarks.closed_loop --data FOLDER [--images 10000] [--models resnet20,wrn-10-2] [--compare resnet20]

Every model has one dense network and one table; a budget is a share of the dense network's latency by that table.
`--compare`: at three budgets BAR is trained for activation volume and for FLOPs as well, with other factors until the
measured latency is within 3 % of what the latency-trained network has, four times at most. If it is not, the nearest is
cut as the latency-trained one was: in the order of the scores that its training left, until its measured latency is.
Both networks are measured in turn: the median ratio of three fresh processes, times what the latency-trained one had.
Resumable; writes JSON after every run. MODEL may carry arguments: "resnet20 width=0.5". Run folders stay in --work.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

from bar_edge.bench import bench_onnx
from bar_edge.bench.statistics import median_ms
from bar_edge.config import TrainConfig
from bar_edge.files import read_json, write_json
from bar_edge.latency_budget.measured_loop import correct
from bar_edge.methods import GateLayout, smallest_cost
from bar_edge.pipeline import deploy, export_run, profile, prune
from bar_edge.progress import NoProgress
from bar_edge.records import ChannelPlan
from bar_edge.records.latency_table import LatencyTable
from bar_edge.requests import BenchRequest, DeployRequest, ExportRequest, PruneRequest
from bar_edge.runs.run_folder import Run
from bar_edge.runs.specs import read_data, read_material, read_network

RESULTS = Path(__file__).parent / "results" / "closed_loop.json"
#: budgets, as shares of the dense network's latency, and which of them are compared
SHARES, COMPARED = (0.85, 0.7, 0.6, 0.5, 0.4, 0.3), (0.7, 0.5, 0.4)
#: how near the other metrics' latencies must come, and in how many trainings and cuts
NEAR, TRAININGS, CUTS = 0.03, 4, 6


def subset(data: str, images: int, work: Path) -> str:
    """Return a data SPEC of the first training images only, and of all test images."""
    if not images:
        return data
    import pyarrow.parquet as pq

    folder = work / f"data-{images}"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        if not (folder / f"{split}.parquet").is_file():
            rows = pq.read_table(Path(data) / f"{split}.parquet")
            pq.write_table(rows[:images] if split == "train" else rows, folder / f"{split}.parquet")
    return str(folder)


class Bed:
    """One model: its dense network, its table, and runs on them."""

    def __init__(self, model: str, options: argparse.Namespace, data: str) -> None:
        self.work: Path = options.work / model.replace(" ", "-").replace("=", "")
        spec, *arguments = model.split()
        self.epochs: tuple[int, int, int] = tuple(options.epochs)
        self.common: dict[str, Any] = {"model": spec, "model_arg": tuple(arguments), "data": data, "seed": options.seed}
        self.seconds: float = options.seconds
        self.size = {"image_size": options.image_size, "threads": 1, "device": "cpu"}
        train = TrainConfig(dense=self.epochs[0], prune=0, tune=0, **self.size)
        config = PruneRequest(**self.common, budget="1x", method="random", train=train)
        self.dense = prune(config, self.work / "dense", resume=True)["dense"]
        source = read_data(config)
        self.table = self.work / "table.json"
        if not self.table.is_file():
            profile(spec, out=self.table, model_args=tuple(arguments), input_shape=tuple(source.input_shape))
        table = LatencyTable.load(self.table)
        network = read_network(spec, tuple(arguments), source.input_shape, len(source.classes))
        layout = GateLayout(network, table=table)
        self.lowering, self.full_ms, self.least_ms = table.lowering, layout.cost({}, "ms"), smallest_cost(layout, "ms")

    def config(self, budget: str, table: str | None = None) -> PruneRequest:
        """Return a run on the dense network."""
        train = TrainConfig(dense=0, prune=self.epochs[1], tune=self.epochs[2], **self.size)
        return PruneRequest(
            **self.common, budget=budget, table=table, weights=str(self.work / "dense" / "dense"), train=train
        )

    def within(self, share: float) -> dict[str, Any]:
        """Deploy with a budget in ms."""
        budget = round(share * self.full_ms, 3)
        out = self.work / f"ms-{budget:g}"
        answer = deploy(
            DeployRequest(
                prune=self.config(f"{budget:g}ms", str(self.table)), bench=BenchRequest(seconds=self.seconds)
            ),
            out,
            resume=True,
        )
        found = answer["prune"]["budget"]
        return {
            "share": share,
            "budget_ms": budget,
            "verdict": answer["verdict"],
            "used": found["achieved"] / budget,
            **{key: found[key] for key in ("achieved", "by_table", "rounds_ms", "rounds_by_table", "verdict_ms")},
            **self.costs(answer["prune"]),
            "interference": answer["bench"]["conditions"]["interference"],
        }

    def costs(self, result: dict[str, Any]) -> dict[str, Any]:
        """Return metric and costs of a run, as shares of the dense network's."""
        costs = {key: result["sliced"][key] / result["dense"][key] for key in ("volume", "flops")}
        return {"metric": result["sliced"]["metric"], "dense_metric": result["dense"]["metric"], **costs}

    def alike(self, metric: str, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Train for another metric until the latency is that of the latency-trained network; returns the attempts."""
        aim, attempts = row["achieved"], list[dict[str, Any]]()
        factor = 1 / row[metric]
        while len(attempts) < TRAININGS and not any(_apart(one, aim) <= NEAR for one in attempts):
            slower = max((one for one in attempts if one["ms"] > aim), key=_factor, default=None)
            faster = min((one for one in attempts if one["ms"] <= aim), key=_factor, default=None)
            if slower and faster:  # linear in the logarithms, well inside: latencies jump
                share = math.log(slower["ms"] / aim) / math.log(slower["ms"] / faster["ms"])
                factor = slower["factor"] * (faster["factor"] / slower["factor"]) ** min(max(share, 0.2), 0.8)
            elif attempts:
                factor = attempts[-1]["factor"] * (attempts[-1]["ms"] / aim) ** 2
            factor = round(max(1.01, factor), 3)
            if factor in map(_factor, attempts):
                break
            out = self.work / f"{metric}-{factor:g}"
            result = prune(self.config(f"{factor:g}x:{metric}"), out, resume=True)
            attempts.append({"factor": factor, "ms": self.measured(out, row), **self.costs(result)})
        nearest = _nearest(attempts, aim)
        return attempts if _apart(nearest, aim) <= NEAR else attempts + self.cut(metric, nearest, row)

    def measured(self, out: Path, row: dict[str, Any]) -> float:
        """Export a run in the table's form; return its latency in ms, measured in turn with the latency-trained one."""
        exported = export_run(out, ExportRequest(lowering=str(self.lowering)))
        files = [Path(exported["artifact"]), self.work / f"ms-{row['budget_ms']:g}" / "artifacts" / "onnx-fp32"]
        pairs = [bench_onnx(files, seconds=self.seconds) for _ in range(3)]
        ms: float = row["achieved"] * sorted(median_ms(own) / median_ms(other) for own, other in pairs)[1]
        return ms

    def cut(self, metric: str, trained: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
        """Cut a trained network anew by its scores until the latency is that of the latency-trained one."""
        aim, cuts = row["achieved"], list[dict[str, Any]]()
        out = self.work / f"{metric}-{trained['factor']:g}-at-{row['budget_ms']:g}ms"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.work / f"{metric}-{trained['factor']:g}", out)
        (out / "config.toml").unlink()
        config = self.config(f"{row['budget_ms']:g}ms", str(self.table))
        run = Run(config, read_material(config), out, resume=True, progress=NoProgress())
        plan = ChannelPlan.from_json(read_json(out / "plan.json"))
        limit = run.layout.cost(plan.kept, "ms") * aim / trained["ms"]
        while len(cuts) < CUTS and not any(_apart(one, aim) <= NEAR for one in cuts):
            correct(run, run.dense(), limit)
            found = {"factor": trained["factor"], "cut": True, "limit": limit, "ms": self.measured(out, row)}
            cuts.append({**found, **self.costs(read_json(out / "result.json"))})
            limit = min(max(limit * aim / found["ms"], self.least_ms), self.full_ms)
        return cuts


def _factor(attempt: dict[str, Any]) -> float:
    factor: float = attempt["factor"]
    return factor


def _apart(attempt: dict[str, Any], aim: float) -> float:
    """Return how far a latency is from another, as a share."""
    return abs(float(attempt["ms"]) / aim - 1)


def _nearest(attempts: list[dict[str, Any]], aim: float) -> dict[str, Any]:
    return min(attempts, key=lambda attempt: _apart(attempt, aim))


def report(results: dict[str, Any]) -> str:
    """Return budgets and comparisons as Markdown."""
    lines = ["| network | budget | rounds | measured | used | dense | sliced |", "|---|---|---|---|---|---|---|"]
    rows = [(model, row) for model, found in results["models"].items() for row in found["budgets"]]
    for model, row in rows:
        rounds = ", ".join(f"{ms:.3f}" for ms in row["rounds_ms"])
        lines.append(
            f"| {model} | {row['budget_ms']:.3f} ms | {rounds} | {row['achieved']:.3f} ms | {row['used']:.2f} "
            f"| {row['dense_metric']:.2%} | {row['metric']:.2%} |"
        )
    met = sum(row["used"] <= 1 for _, row in rows)
    lines.append(f"\nWithin budget: {met} of {len(rows)}; of those at least .9 used: "
                 f"{sum(0.9 <= row['used'] <= 1 for _, row in rows)}.\n")  # fmt: skip
    lines += [
        "| network | trained for | ms | metric | volume | FLOPs | trainings and cuts |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, found in results["models"].items():
        for one in found["compared"]:
            latency = next(row for row in found["budgets"] if row["budget_ms"] == one["budget_ms"])
            arms = [("latency", {**latency, "ms": latency["achieved"]}, 1)]
            for metric in ("volume", "flops"):
                attempts = one.get(metric, [])
                if attempts:
                    arms.append((metric, _nearest(attempts, latency["achieved"]), len(attempts)))
            for metric, arm, n in arms:
                lines.append(
                    f"| {model} | {metric} | {arm['ms']:.3f} | {arm['metric']:.2%} | {arm['volume']:.3f} "
                    f"| {arm['flops']:.3f} | {n} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Do what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with train.parquet and test.parquet, or a SPEC")
    parser.add_argument("--images", type=int, default=0, help="training images, 0 for all")
    parser.add_argument("--image-size", type=int, default=0)
    parser.add_argument("--models", default="resnet20,wrn-10-2")
    parser.add_argument("--compare", default="", help="models to compare metrics on")
    parser.add_argument("--epochs", type=int, nargs=3, default=(3, 3, 1), metavar=("DENSE", "PRUNE", "TUNE"))
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring, per process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="for the run folders")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work = options.work.resolve()
    data = subset(options.data, options.images, options.work)
    results = read_json(options.out) if options.out.is_file() else {"models": {}}
    results |= {key: getattr(options, key) for key in ("images", "image_size", "epochs", "seed", "seconds")}
    for model in options.models.split(","):
        bed = Bed(model, options, data)
        found = results["models"].setdefault(model, {"budgets": [], "compared": []})
        found |= {"full_ms": bed.full_ms, "least_ms": bed.least_ms, "environment": read_json(bed.table)["environment"]}
        done = {row["share"] for row in found["budgets"]}
        for share in SHARES:
            if share not in done and share * bed.full_ms > bed.least_ms:
                found["budgets"].append(bed.within(share))
                write_json(options.out, results)
        for share in COMPARED if model in options.compare.split(",") else ():
            row = next((row for row in found["budgets"] if row["share"] == share), None)
            one = next((one for one in found["compared"] if one["share"] == share), None)
            if row and one is None:
                found["compared"].append(one := {"share": share, "budget_ms": row["budget_ms"]})
            for metric in ("volume", "flops"):
                if row and one is not None and metric not in one:
                    one[metric] = bed.alike(metric, row)
                    write_json(options.out, results)
    print(report(results))


if __name__ == "__main__":
    main()
