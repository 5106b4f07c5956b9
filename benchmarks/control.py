"""Does the cost follow the budget, for any schedule length, network and metric? One setting for all runs, on `digits`.

{resnet20, wrn-10-2} x {300, 1,000, 5,000} steps x {2x, 4x, 8x, 16x} of volume, FLOPs, parameters, and of the latency by
a table where one is given. Of every run: by how much V exceeds b(t) at most and stays below it, as shares of the whole;
gates that the end had to force; accuracy at the end of pruning, before any tuning. Run: python -m benchmarks.control
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch

from bar_edge.config import TrainConfig
from bar_edge.data import DataSource, load_data
from bar_edge.files import write_json
from bar_edge.methods import BAR, GateLayout
from bar_edge.models import build
from bar_edge.network import Network, trace
from bar_edge.records.latency_table import LatencyTable
from bar_edge.runs.run_folder import versions
from bar_edge.surgery import slice_network
from bar_edge.training import evaluate, load_task, train

TASK = load_task("classification")
BATCH = 64


def dense_network(model: str, data: DataSource, folder: Path, seed: int) -> Network:
    """Train the dense network once (25 epochs), or load it."""
    if not (folder / "network.json").is_file():
        torch.manual_seed(seed)
        module = build(model, input_shape=data.input_shape, classes=len(data.classes))
        network = trace(module, torch.zeros(2, *data.input_shape))
        config = TrainConfig(dense=25, batch=BATCH, lr_dense=0.1, precision="fp32", threads=1)
        train(network, data, TASK, config, "dense", seed=seed)
        network.save(folder)
    return Network.load(folder)


def accuracy(network: torch.nn.Module, data: DataSource) -> float:
    """Return the accuracy on the test split."""
    return evaluate(network, data.test, TASK, batch=256, precision="fp32")


def run(
    dense: Network, data: DataSource, budget: str, steps: int, seed: int, table: LatencyTable | None
) -> dict[str, Any]:
    """Prune for a number of steps; return how the cost followed the budget, and what the network can."""
    torch.manual_seed(seed)
    pruner = BAR(dense, budget=budget, steps=steps, teacher=copy.deepcopy(dense), seed=seed, table=table)
    optimizer = torch.optim.SGD(pruner.weights(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    above, below, start = [], [], time.perf_counter()
    batches = itertools.chain.from_iterable(
        data.fit.batches(BATCH, train=True, seed=seed, epoch=epoch, device="cpu") for epoch in itertools.count()
    )
    full = pruner.schedule.full
    for step, (images, targets) in enumerate(itertools.islice(batches, steps)):
        rise, fall = step / (0.3 * steps), (steps - step) / (0.7 * steps)
        optimizer.param_groups[0]["lr"] = 0.02 * min(1.0, rise, fall)
        outputs = pruner.network(images)
        loss = pruner.loss(TASK.loss(outputs, targets), images, outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
        stats = pruner.stats()
        above.append((stats["volume"] - stats["budget"]) / full)
        below.append(-above[-1] if step > steps / 10 else 0.0)
    seconds = (time.perf_counter() - start) / steps
    opened = pruner.network.gates.opened()
    cost = pruner.layout.cost(pruner.layout.kept(opened), pruner.budget.metric)
    folded, plan, end = pruner.finish()
    return {
        "limit": pruner.schedule.limit / full,
        "cost": cost / full,
        "used": pruner.layout.cost(plan.kept, pruner.budget.metric) / pruner.schedule.limit,
        "most_above": max(0.0, *above),
        "most_below": max(below),
        "forced": end["forced"],
        "accuracy": accuracy(slice_network(folded, plan), data),
        "dense": accuracy(dense, data),
        "seconds_per_step": seconds,
    }


def main() -> None:
    """Run everything that the output file does not hold yet, and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/control.json"))
    parser.add_argument("--models", nargs="*", default=["resnet20", "wrn-10-2"])
    parser.add_argument("--steps", type=int, nargs="*", default=[300, 1000, 5000])
    parser.add_argument("--factors", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--metrics", nargs="*", default=["volume", "flops", "params", "ms"])
    parser.add_argument("--table", type=Path, help="latency table of the first model at 1x8x8, for ms")
    parser.add_argument("--work", type=Path, default=Path("runs/control"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {"runs": {}}
    done["versions"], done["seed"], done["setting"] = versions(), options.seed, "BarConfig() of this version"
    data = load_data("digits", seed=options.seed)
    for steps, metric, model, factor in itertools.product(
        options.steps, options.metrics, options.models, options.factors
    ):
        key, table = f"{model} {factor}x:{metric} {steps}", None
        if key in done["runs"] or (metric == "ms" and (options.table is None or model != options.models[0])):
            continue
        dense = dense_network(model, data, options.work / f"digits-{model}", options.seed)
        budget = f"{factor}x:{metric}"
        if metric == "ms":
            table = LatencyTable.load(options.table)
            budget = f"{_latency(dense, table) / factor:.6f}ms"
        done["runs"][key] = run(dense, data, budget, steps, options.seed, table)
        write_json(options.out, done)
        print(key, " ".join(f"{k}={v:.4g}" for k, v in done["runs"][key].items()), flush=True)


def _latency(dense: Network, table: LatencyTable) -> float:
    return GateLayout(dense, table=table).cost({}, "ms")


if __name__ == "__main__":
    main()
