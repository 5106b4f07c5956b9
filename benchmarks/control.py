"""Does BAR meet its budget for any schedule length? One setting for all runs, on the images of `digits`.

{resnet20, wrn-10-2} x {300, 1,000, 5,000} steps x {2x, 4x, 8x, 16x} of the activation volume, and 100,000
steps of gates alone. Before any projection: B - V <= max(.07 B, one map), V <= B + one map (the largest),
no fall of V by more than 15 % of V_F within 1 % of the steps (1,000 steps and more), the gated network's
accuracy, and that of the network pruned hard with the gates folded in. Run: python benchmarks/control.py
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

from bar_edge.config import BarConfig, TrainConfig
from bar_edge.data import DataSource, load_data
from bar_edge.files import write_json
from bar_edge.methods import BAR, GateLayout
from bar_edge.methods.bar.barrier import BudgetSchedule, barrier
from bar_edge.methods.bar.gate_optimizer import BalancedSteps
from bar_edge.methods.gating.gate_cost import GateCost
from bar_edge.methods.gating.hard_concrete import is_open, probability_open
from bar_edge.models import build
from bar_edge.network import Network, trace
from bar_edge.runs.run_folder import versions
from bar_edge.surgery import slice_network
from bar_edge.training import evaluate, load_task, train
from bar_edge_calibration import reestimate_batchnorm

TASK = load_task("classification")
BATCH = 64
CHANCE = 0.1


def dense_network(model: str, data: DataSource, folder: Path, seed: int) -> Network:
    """Train the dense network once (25 epochs), or load it."""
    if not (folder / "network.json").is_file():
        torch.manual_seed(seed)
        module = build(model, input_shape=data.input_shape, classes=len(data.classes))
        network = trace(module, torch.zeros(2, *data.input_shape))
        train(network, data, TASK, TrainConfig(dense=25, batch=BATCH, precision="fp32"), "dense", seed=seed)
        network.save(folder)
    return Network.load(folder)


def accuracy(network: torch.nn.Module, data: DataSource) -> float:
    """Return the accuracy on the test split."""
    return evaluate(network, data.test, TASK, batch=256, precision="fp32")


def run(dense: Network, data: DataSource, budget: str, steps: int, seed: int) -> dict[str, Any]:
    """Prune for a number of steps; return what the gates did and what the network can."""
    torch.manual_seed(seed)
    teacher = copy.deepcopy(dense).eval()
    pruner = BAR(dense, budget=budget, steps=steps, teacher=teacher, seed=seed)
    optimizer = torch.optim.SGD(pruner.weights(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    volumes, flips, start = [], [], time.perf_counter()
    batches = itertools.chain.from_iterable(
        data.fit.batches(BATCH, train=True, seed=seed, epoch=epoch, device="cpu") for epoch in itertools.count()
    )
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
        volumes.append(stats["volume"])
        flips.append(stats["flips"])
    seconds = time.perf_counter() - start
    gates, layout = pruner.network.gates, pruner.layout
    full, limit = pruner.schedule.full, pruner.schedule.limit
    volume = pruner.cost.hard(gates.opened())
    largest = max(layout.network.shapes[layout.node(name).name][2:] for name in layout.offsets)
    one_map = float(torch.Size(largest).numel())
    window = max(1, steps // 100)
    drop = max((a - b) / full for a, b in zip(volumes, volumes[window:], strict=False))
    pruner.network.eval()
    reestimate_batchnorm(
        pruner.network,
        (x for x, _ in data.fit.batches(BATCH, train=True, seed=0, epoch=0, device="cpu", augment="none")),
    )
    gated = accuracy(pruner.network, data)
    folded, plan, end = pruner.finish()
    hard = accuracy(slice_network(folded, layout.plan(gates.opened())), data)
    projected = accuracy(slice_network(folded, plan), data)
    dense_accuracy = accuracy(dense, data)
    on_budget = limit - volume <= max(0.07 * limit, one_map) and volume <= limit + one_map
    alive = gated >= 3 * CHANCE
    close = steps < 1000 or full / limit > 4.01 or gated >= dense_accuracy - 0.1
    return {
        "volume": volume,
        "limit": limit,
        "volume_over_limit": volume / limit,
        "gap_in_maps": (volume - limit) / one_map,
        "forced": end["forced"],
        "largest_fall_in_1_percent": drop,
        "flips_per_step_max": max(flips),
        "gated": gated,
        "hard": hard,
        "projected": projected,
        "dense": dense_accuracy,
        "trajectory": [volumes[i * steps // 10] / full for i in range(10)],
        "seconds_per_step": seconds / steps,
        "on_budget": on_budget,
        "smooth": steps < 1000 or drop <= 0.15,
        "alive": alive and close,
        "fold_exact": abs(gated - hard) <= 0.001,
    }


def simulate(model: str, factor: float, steps: int, seed: int) -> dict[str, Any]:
    """Move the gates of a network at 32x32 alone: random importances pull gates open, with noise."""
    module = build(model, input_shape=(3, 32, 32), classes=10)
    layout = GateLayout(trace(module, torch.zeros(2, 3, 32, 32)))
    cost, config = GateCost(layout, "volume"), BarConfig()
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(layout.size, generator=generator) ** 3
    log_alpha = torch.nn.Parameter(0.5 + 2.5 * torch.rand(layout.size, generator=generator))
    optimizer = BalancedSteps(log_alpha, steps, config)
    schedule = BudgetSchedule(full=cost.full, limit=cost.full / factor, steps=steps)
    volumes, volume = [], cost.full
    (area,) = torch.autograd.grad(cost.expected(probability_open(log_alpha)), log_alpha)
    for step in range(steps):
        with torch.no_grad():
            p = probability_open(log_alpha)
            slope = p * (1 - p)
            noise = torch.randn(layout.size, generator=generator)
            data_gradient = -importance * slope + 0.3 * noise * slope
            if step == 0:
                rates = area / slope  # the volume is linear in p: its rates never change
            volume = float((rates * is_open(log_alpha)).sum())
            volumes.append(volume)
            f = barrier(volume, schedule.lower, schedule.upper(step), config.barrier_cap)
            optimizer.step(data_gradient, rates * slope, f, 1.0)
    window = max(1, steps // 100)
    drop = max((a - b) / cost.full for a, b in zip(volumes, volumes[window:], strict=False))
    limit, one_map = cost.full / factor, 1024.0
    return {
        "volume_over_limit": volume / limit,
        "largest_fall_in_1_percent": drop,
        "on_budget": limit - volume <= max(0.07 * limit, one_map) and volume <= limit + one_map,
        "smooth": drop <= 0.15,
    }


def main() -> None:
    """Run everything that the output file does not hold yet, and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/control.json"))
    parser.add_argument("--steps", type=int, nargs="*", default=[300, 1000, 5000])
    parser.add_argument("--simulate", type=int, default=100_000, help="steps of the simulation, 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {"runs": {}}
    done["versions"], done["seed"], done["setting"] = versions(), options.seed, "BarConfig() of this version"
    data = load_data("digits", seed=options.seed)
    for steps, model, factor in itertools.product(options.steps, ("resnet20", "wrn-10-2"), (2, 4, 8, 16)):
        key = f"{model} {factor}x {steps}"
        if key not in done["runs"]:
            dense = dense_network(model, data, options.out.parent / f"digits-{model}", options.seed)
            done["runs"][key] = run(dense, data, f"{factor}x", steps, options.seed)
            write_json(options.out, done)
        print(key, _line(done["runs"][key]), flush=True)
    for model, factor in itertools.product(("resnet20", "wrn-28-12"), (2, 16)) if options.simulate else ():
        key = f"simulated {model} {factor}x {options.simulate}"
        if key not in done["runs"]:
            done["runs"][key] = simulate(model, factor, options.simulate, options.seed)
            write_json(options.out, done)
        print(key, _line(done["runs"][key]), flush=True)
    for name in ("on_budget", "smooth", "alive", "fold_exact"):
        values = [run[name] for run in done["runs"].values() if name in run]
        print(f"{name}: {sum(values)} of {len(values)}")


def _line(values: dict[str, Any]) -> str:
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items() if k != "trajectory"}
    return " ".join(f"{k}={v}" for k, v in shown.items())


if __name__ == "__main__":
    main()
