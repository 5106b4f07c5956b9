"""Accuracy at equal measured latency: our default against the field, on one network, its data and its trained start.

    python -m benchmarks.equal_latency --data FOLDER --shares 0.5 0.33 0.17 --seeds 0 --epochs 8

Every arm starts from the same dense network (scratch excepted), learns from it as teacher and has the same epochs,
optimiser, schedule, rates, augmentation and batch; ours spends the first of them on pruning, the others are cut at once
and tune for all of them. Arms:

    ours          `prune` with its defaults and a budget in ms by the table
    taylor        first-order scores over the table's latency, greedy, in our mixed connectivity, cut at once
    tp-l2         Torch-Pruning 1.6.1: group L2 norm, one ratio for all layers
    tp-l2-global  the same, ranked over all layers
    tp-l2-round8  as tp-l2, widths rounded to 8
    tp-groupnorm  its group-norm sparse training in the epochs that ours prunes in, then cut
    scratch       one width for all layers, new weights, the dense network's epochs and these
    random        random channels, an equal share in every layer

Ours is measured first; the others' ratio is searched until their latency is at most 2 % above it. Each network runs in
the fastest form that `choose_lowering` finds. Choices are made on held-out images; test images are read once per cell.
One JSON file per cell, made cells are skipped; --table prints and plots them: accuracy against ms, ours minus each arm
by a paired bootstrap over the test images. Torch-Pruning is needed for its arms only: pip install --no-deps
torch-pruning==1.6.1.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bar_edge.bench import bench_onnx
from bar_edge.config import BarConfig, DistillConfig, TrainConfig
from bar_edge.data import DataSource, load_data
from bar_edge.files import read_json, write_json
from bar_edge.latency_budget.operation_prices import undisturbed_ms
from bar_edge.lowering.lower import lower
from bar_edge.methods import BAR, GateLayout, random_plan, smallest_cost
from bar_edge.methods.bar.closing import Closer
from bar_edge.models import build, load_weights
from bar_edge.network import Network, count, trace
from bar_edge.pipeline import profile
from bar_edge.records.latency_table import LatencyTable
from bar_edge.records.lowering import Lowering
from bar_edge.requests import PruneRequest
from bar_edge.runs.run_folder import Run
from bar_edge.runs.specs import read_material
from bar_edge.surgery import slice_network
from bar_edge.targets.form_search import choose_lowering
from bar_edge.targets.onnx.file import export_onnx
from bar_edge.training import evaluate, load_task, train
from benchmarks.cifar10 import Lines, correct, paired_bootstrap
from benchmarks.torch_pruned import group_norm, torch_pruned

RESULTS = Path(__file__).parent / "results" / "equal_latency"
ARMS = ("ours", "taylor", "tp-l2", "tp-l2-global", "tp-l2-round8", "tp-groupnorm", "scratch", "random")
TASK = load_task("classification")
#: forms in which a search measures, how far above ours a rival may be, and how often its ratio is halved
FORMS, ABOVE, HALVINGS = ("regular:4", "regular:16", "gather:4"), 1.02, 7
#: share of the epochs in which ours prunes, as by default
PRUNING = 0.25
#: batches that give the first-order scores
SCORED = 100


class Remembering(nn.Module):
    """A teacher that remembers its answers, in a file: all arms of a seed see the same images."""

    def __init__(self, network: nn.Module, file: Path) -> None:
        super().__init__()
        self.network, self.file = [network.eval()], file
        self.known: dict[int, Tensor] = torch.load(file, weights_only=True) if file.is_file() else {}

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's outputs, from memory where these images came before."""
        key = zlib.crc32(images.float().contiguous().numpy().tobytes())
        if key not in self.known:
            self.known[key] = self.network[0](images).float()
        return self.known[key]


class Taught(Run):
    """The product's run, with a teacher that remembers."""

    def __init__(self, bed: Bed, config: PruneRequest, out: Path) -> None:
        self.remembering = bed.teacher
        super().__init__(config, read_material(config), out, resume=out.exists(), progress=Lines())

    def teacher(self, dense: Network) -> nn.Module:
        """Return the dense network."""
        return self.remembering


class Bed:
    """One model and one seed: its dense network, its data, its table, and all arms on them."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed, self.model = options, seed, str(options.model)
        self.data: DataSource = load_data(str(options.data), seed=seed)
        self.folder = Path(options.dense.format(seed=seed)) / "network"
        self.dense = Network.load(self.folder)
        self.work: Path = options.work / f"{self.model}_s{seed}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.teacher = Remembering(copy.deepcopy(self.dense), self.work / "teacher.pt")
        table = options.table_file or options.work / f"{self.model}.json"
        if not table.is_file():
            profile(self.model, out=table, input_shape=tuple(self.data.input_shape))
        self.table_file, self.table = table, LatencyTable.load(table)
        self.layout = GateLayout(self.dense, table=self.table)
        self.full = self.layout.cost({}, "ms")
        first = max(1, round(PRUNING * options.epochs))
        config = TrainConfig(threads=1, dense=0, prune=first, tune=options.epochs - first)
        self.train = config.chosen(len(self.data.fit))
        self.batch = self.train.batch or 1

    def module(self, width: float = 1.0) -> nn.Module:
        """Return the zoo's module, with the dense network's weights at full width."""
        arguments = (f"width={width}",) if width != 1 else ()
        module = build(self.model, input_shape=self.data.input_shape, classes=10, model_args=arguments)
        if width == 1:
            load_weights(module, self.folder / "weights.safetensors")
        return module

    def traced(self, module: nn.Module) -> Network:
        """Return a module as a Network."""
        return trace(module, torch.zeros(2, *self.data.input_shape))

    def tuned(self, network: Network, epochs: int) -> Network:
        """Return the network after some epochs of tuning, as every arm has them."""
        config = dataclasses.replace(self.train, tune=epochs)
        distill = DistillConfig()
        train(network, self.data, TASK, config, "tune", seed=self.seed, teacher=self.teacher, distill=distill)
        return network

    def share(self, network: Network, seconds: float = 0.5) -> float:
        """Return the latency of a network in its fastest quick form, as a share of the dense network's."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / f"{i}.onnx" for i in range(len(FORMS) + 1)]
            forms = [self.dense, *(lower(network, Lowering.parse(form)) for form in FORMS)]
            for form, file in zip(forms, files, strict=True):
                export_onnx(form, form.input_shapes, file)
            dense, *others = map(undisturbed_ms, bench_onnx(files, seconds=seconds))
        return min(others) / dense

    def matched(self, make: Callable[[float], Network], target: float, low: float, high: float) -> Network:
        """Return the slowest network of a family that is at most 2 % above a share of the latency, else the fastest.

        make: a network for a number between low (slow) and high (fast).
        """
        best: tuple[float, Network] | None = None
        fastest: tuple[float, Network] | None = None
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            network = make(middle)
            share = self.share(network)
            if share <= ABOVE * target:
                high = middle
                best = max(best or (share, network), (share, network), key=lambda pair: pair[0])
            else:
                low = middle
            fastest = min(fastest or (share, network), (share, network), key=lambda pair: pair[0])
        found = best or fastest
        assert found is not None
        return found[1]


def ours(bed: Bed, target: float) -> Network:
    """Prune with the product's defaults."""
    out = bed.work / f"ours-{target:g}"
    config = PruneRequest(
        model=bed.model,
        data=str(bed.options.data),
        budget=f"{target * bed.full:.6f}ms",
        weights=str(bed.folder),
        table=str(bed.table_file),
        seed=bed.seed,
        train=bed.train,
    )
    run = Taught(bed, config, out)
    sliced, _, _ = run.pruned(bed.dense, bed.teacher)
    run.tune(sliced, bed.teacher)
    return sliced


def taylor(bed: Bed, target: float) -> Network:
    """Cut at once by first-order scores over the table's latency."""
    least, scored = smallest_cost(bed.layout, "ms"), _Scored(bed)

    def make(less: float) -> Network:
        return slice_network(bed.dense, scored.plan_for(max((1 - less) * bed.full, least)))

    return bed.tuned(bed.matched(make, target, 0.0, 1.0), bed.options.epochs)


class _Scored:
    """First-order scores of the dense network's channels."""

    def __init__(self, bed: Bed) -> None:
        self.bed, self.closer = bed, Closer(bed.layout, "ms")
        self.pruner = BAR(bed.dense, budget="99%", steps=SCORED, config=BarConfig(), seed=bed.seed)
        gates = self.pruner.network.gates
        self.scores = torch.zeros(bed.layout.size)
        batches = bed.data.fit.batches(bed.batch, train=True, seed=bed.seed, epoch=0, device="cpu")
        for (images, targets), _ in zip(batches, range(SCORED), strict=False):
            TASK.loss(self.pruner.network(images), targets).backward()
            assert gates.log_alpha.grad is not None
            self.scores += gates.log_alpha.grad.square()
            gates.log_alpha.grad = None

    def plan_for(self, limit: float) -> Any:
        """Return the greedy plan within a limit in ms."""
        opened = torch.ones(self.bed.layout.size, dtype=torch.bool)
        for gates, _ in self.closer.close(opened, self.scores, limit):
            opened[gates] = False
        return self.bed.layout.plan(opened)


def random(bed: Bed, target: float) -> Network:
    """Cut random channels, an equal share of every layer."""
    volume = bed.layout.cost({}, "volume")
    least = smallest_cost(bed.layout, "volume") / volume

    def make(closed: float) -> Network:
        limit = max(1 - closed, least) * volume
        return slice_network(bed.dense, random_plan(bed.layout, "volume", limit, bed.seed))

    return bed.tuned(bed.matched(make, target, 0.0, 1.0), bed.options.epochs)


def scratch(bed: Bed, target: float) -> Network:
    """Train a narrow network of the same kind from new weights, for the dense network's epochs and these."""

    def make(narrower: float) -> Network:
        torch.manual_seed(bed.seed)
        return bed.traced(bed.module(max(1 - narrower, 0.05)))

    network = bed.matched(make, target, 0.0, 0.95)
    first = dataclasses.replace(bed.train, dense=bed.options.dense_epochs)
    train(network, bed.data, TASK, first, "dense", seed=bed.seed)
    return bed.tuned(network, bed.options.epochs)


def run_arm(bed: Bed, arm: str, target: float) -> Network:
    """Return the tuned network of an arm."""
    own: dict[str, Callable[[Bed, float], Network]] = {
        "ours": ours, "taylor": taylor, "random": random, "scratch": scratch, "tp-groupnorm": group_norm
    }  # fmt: skip
    return own[arm](bed, target) if arm in own else torch_pruned(bed, target, arm)


def cell(bed: Bed, arm: str, share: float) -> dict[str, Any]:
    """Return what a cell's network can and takes; it is kept in --work."""
    reference = RESULTS / name(bed.model, "ours", share, bed.seed)
    target = share if arm == "ours" else float(read_json(reference)["share_of_dense"])
    network = run_arm(bed, arm, target)
    network.save(bed.work / f"{arm}-{share:g}-network")
    torch.save(bed.teacher.known, bed.teacher.file)
    choice = choose_lowering(network, bed.dense, seconds=bed.options.seconds)
    right = correct(network, bed.data)
    return {
        "model": bed.model,
        "arm": arm,
        "share": share,
        "seed": bed.seed,
        "epochs": bed.options.epochs,
        "held_out": evaluate(network, bed.data.held_out, TASK, batch=500),
        "accuracy": float(right.mean()),
        "ms": choice.chosen_ms,
        "dense_ms": choice.dense_ms,
        "share_of_dense": bed.share(network, 1.0),
        "lowering": str(choice.lowering),
        **dataclasses.asdict(count(network)),
        "environment": choice.environment,
        "right": np.packbits(right).tobytes().hex(),
    }


def name(model: str, arm: str, share: float, seed: int) -> str:
    """Return a cell's file name."""
    return f"{model}_{arm}_{share:g}_s{seed}.json"


def table() -> list[dict[str, Any]]:
    """Return the cells as rows, with ours minus each arm; write table.json and the plot."""
    cells = [read_json(file) for file in sorted(RESULTS.glob("*_s*.json"))]
    right = {_key(c): np.unpackbits(np.frombuffer(bytes.fromhex(c["right"]), np.uint8))[:10_000] for c in cells}
    rows = []
    for c in cells:
        row = {k: c[k] for k in ("model", "share", "arm", "seed", "accuracy", "ms", "dense_ms", "share_of_dense")}
        mine = (c["model"], "ours", c["share"], c["seed"])
        if c["arm"] != "ours" and mine in right:
            points, low = paired_bootstrap([right[mine]], [right[_key(c)]])
            row |= {"ours_minus": points, "low_95": low}
        rows.append(row | {k: c[k] for k in ("flops", "params", "epochs", "lowering")})
    write_json(RESULTS / "table.json", {"test_images": 10_000, "cells": rows})
    plot(rows)
    return rows


def _key(c: dict[str, Any]) -> tuple[Any, ...]:
    return (c["model"], c["arm"], c["share"], c["seed"])


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw accuracy against the share of the dense network's latency, a line per arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = sorted({row["model"] for row in rows})
    figure, grid = plt.subplots(1, len(models), figsize=(6 * len(models), 4), squeeze=False)
    for axes, model in zip(grid[0], models, strict=True):
        for arm in ARMS:
            own = sorted(
                (r["share_of_dense"], 100 * r["accuracy"]) for r in rows if r["arm"] == arm and r["model"] == model
            )
            if own:
                x, y = zip(*own, strict=True)
                axes.plot(x, y, "o-", label=arm, markersize=4, linewidth=2 if arm == "ours" else 1)
        axes.set(title=model, xlabel="latency, share of dense", ylabel="accuracy, %")
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "equal_latency.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Make the cells that are missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as Parquet")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--dense", default="benchmarks/results/cifar10/resnet20_dense_s{seed}")
    parser.add_argument("--dense-epochs", type=int, default=12, help="that the dense network had")
    parser.add_argument("--table-file", type=Path, help="latency table; made if missing")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.33, 0.17])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=8, help="after the dense network")
    parser.add_argument("--seconds", type=float, default=20.0, help="of choosing a form")
    parser.add_argument("--work", type=Path, default=Path("runs/equal_latency"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in [] if options.table else options.seeds:
        bed = Bed(options, seed)
        for share in options.shares:
            for arm in sorted(options.arms, key=ARMS.index):
                file = RESULTS / name(bed.model, arm, share, seed)
                if not file.is_file():
                    write_json(file, cell(bed, arm, share))
                found = read_json(file)
                print(share, arm, f"{found['accuracy']:.4f} {found['ms']:.3f} ms", flush=True)
    for row in table():
        print(row)


if __name__ == "__main__":
    main()
