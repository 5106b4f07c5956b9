"""BAR against the baselines of the same volume on CIFAR-10, all arms with the same epochs and teacher.

    python benchmarks/cifar10.py --data FOLDER --model resnet20 --seed 0 --arm dense
    python benchmarks/cifar10.py --data FOLDER --model resnet20 --seed 0 --arm bar --factor 4
    python benchmarks/cifar10.py --data FOLDER --table

Arms: dense (dense epochs only; it is everybody's teacher), bar, random (random masks on the dense weights,
then as many epochs), uniform (all widths divided by the factor, from scratch: dense epochs alone, the rest
with the teacher). An interrupted arm goes on. The table tests BAR minus each baseline by a paired bootstrap
over the test images.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bar_edge.config import TrainConfig
from bar_edge.data import DataSource, load_data
from bar_edge.files import write_json
from bar_edge.network import Network
from bar_edge.pipeline import prune
from bar_edge.progress import NoProgress, Record
from bar_edge.requests import PruneRequest

#: what later work measures on, copied from every finished run
KEPT_FILES = ("plan.json", "result.json", "config.toml", "network/network.json", "network/weights.safetensors")


class Lines(NoProgress):
    """One line per epoch."""

    def epoch(self, record: Record) -> None:
        """Print the epoch's record."""
        keys = ("phase", "epoch", "loss", "volume", "budget", "barrier", "open", "metric")
        print(" ".join(f"{k}={record[k]}" for k in keys if record[k] is not None), flush=True)


def arm_config(options: argparse.Namespace, dense: Path) -> PruneRequest:
    """Return the run of one arm."""
    epochs = {"dense": options.epochs[0], "prune": options.epochs[1], "tune": options.epochs[2]}
    common: dict[str, Any] = {"model": options.model, "data": str(options.data), "seed": options.seed}
    if options.arm == "dense":
        train = TrainConfig(**(epochs | {"prune": 0, "tune": 0}), threads=options.threads)
        return PruneRequest(**common, budget="1x", method="random", train=train)
    train = TrainConfig(**epochs, threads=options.threads)
    if options.arm == "uniform":
        width = (f"width={1 / options.factor}",)
        return PruneRequest(
            **common, budget="1x", method="random", model_arg=width, teacher=str(dense / "dense"), train=train
        )
    return PruneRequest(
        **common, budget=f"{options.factor:g}x", method=options.arm, weights=str(dense / "dense"), train=train
    )


def correct(network: Network, data: DataSource) -> np.ndarray:
    """Return which test images a network gets right (images,) bool, in float32."""
    found = []
    with torch.no_grad():
        for images, targets in data.test.batches(500, train=False, seed=0, epoch=0, device="cpu", augment="none"):
            found.append((network.eval()(images).argmax(1) == targets).numpy())
    return np.concatenate(found)


def paired_bootstrap(ours: list[np.ndarray], theirs: list[np.ndarray], resamples: int = 2000) -> tuple[float, float]:
    """Return the difference in points and the lower end of its one-sided 95 % interval, over images, seeds averaged."""
    difference = 100 * (np.mean(ours, axis=0) - np.mean(theirs, axis=0))
    rng = np.random.default_rng(0)
    means = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(resamples)]
    return float(difference.mean()), float(np.percentile(means, 5))


def table(kept: Path, data: DataSource) -> dict[str, Any]:
    """Compare all finished runs under `kept`; returns JSON data."""
    arms: dict[str, dict[int, np.ndarray]] = {}
    rows = []
    for folder in sorted(path.parent for path in kept.glob("*/result.json")):
        result = json.loads((folder / "result.json").read_text())
        model, arm, seed = folder.name.rsplit("_", 2)
        right = correct(Network.load(folder / "network"), data)
        arms.setdefault(f"{model}_{arm}", {})[int(seed.removeprefix("s"))] = right
        counts = {name: result["sliced"][name] for name in ("volume", "flops", "params")}
        forced = result["end_of_pruning"]["forced"]
        rows.append({"run": folder.name, "accuracy": float(right.mean()), **counts, "forced": forced})
    differences = []
    for name, ours in arms.items():
        model, _, arm = name.rpartition("_")
        if not arm.startswith("bar"):
            continue
        for other in ("dense", arm.replace("bar", "uniform"), arm.replace("bar", "random")):
            theirs = arms.get(f"{model}_{other}", {})
            seeds = sorted(ours.keys() & theirs.keys())
            if seeds:
                points, low = paired_bootstrap([ours[s] for s in seeds], [theirs[s] for s in seeds])
                differences.append({"arm": name, "against": other, "seeds": seeds, "points": points, "low_95": low})
    return {"test_images": 10_000, "runs": rows, "differences": differences}


def main() -> None:
    """Run one arm, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as Parquet")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--arm", choices=["dense", "bar", "random", "uniform"])
    parser.add_argument("--factor", type=float, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, nargs=3, default=[12, 10, 6], metavar=("DENSE", "PRUNE", "TUNE"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--kept", type=Path, default=Path("benchmarks/results/cifar10"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        found = table(options.kept, load_data(str(options.data)))
        write_json(options.kept / "table.json", found)
        print(json.dumps(found, indent=1))
        return
    dense = options.runs / f"{options.model}_dense_s{options.seed}"
    arm = options.arm if options.arm == "dense" else f"{options.arm}{options.factor:g}"
    out = options.runs / f"{options.model}_{arm}_s{options.seed}"
    result = prune(arm_config(options, dense), out, resume=out.exists(), progress=Lines())
    for name in KEPT_FILES:
        target = options.kept / out.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / name, target)
    print(json.dumps({key: result[key] for key in ("budget", "dense", "sliced", "end_of_pruning")}, indent=1))


if __name__ == "__main__":
    main()
