"""Accuracy at equal measured latency (or FLOPs): our default against the field, on one network, its data and its start.

    python -m benchmarks.equal_latency --data FOLDER --shares 0.5 0.33 0.17 --seeds 0 1 --epochs 8

Every arm starts from the same dense network (scratch excepted), learns from it as teacher and has the same epochs,
optimiser, schedule, rates, augmentation and batch; ours spends the first of them on pruning, the others are cut at once
and tune for all of them. Arms:

    ours            `prune` with its defaults and a budget in ms by the table (--by flops: in FLOPs)
    taylor          first-order scores over the table's latency, greedy, in our mixed connectivity, cut at once
    tp-l2           Torch-Pruning 1.6.1: group L2 norm, one ratio for all layers
    tp-l2-global    the same, ranked over all layers
    tp-l2-round8    as tp-l2, widths rounded to 8; tp-l2-round16: to 16
    tp-groupnorm    its group-norm sparse training in the epochs that ours prunes in, then cut
    scratch         one width for all layers, new weights, the dense network's epochs and these
    random          random channels, an equal share in every layer

Three stages, each resumable, network by network: cut (ours first; a rival's ratio is searched until it costs at most
2 % more than ours, both measured in turn), tune (no clock is read: several seeds may run at once) and measure (each
network in the fastest form that `choose_lowering` finds for it, then all arms of a share and the dense network in turn
in one process). Choices are made on held-out images; test images are read once for each cell. One JSON file for each
cell; `--stages table` prints and plots them: accuracy against cost, ours minus each arm by a paired bootstrap over the
test images. The tp- arms need Torch-Pruning: pip install --no-deps torch-pruning==1.6.1.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bar_edge.bench import bench_onnx
from bar_edge.bench.statistics import median_ms
from bar_edge.files import read_json, write_json
from bar_edge.lowering.lower import lower
from bar_edge.network import Network, count
from bar_edge.targets.form_search import choose_lowering
from bar_edge.targets.onnx.file import export_onnx
from bar_edge.training import evaluate
from benchmarks.cifar10 import correct
from benchmarks.equal_latency.arms import ARMS
from benchmarks.equal_latency.bed import TASK, Bed
from benchmarks.equal_latency.table import RESULTS, rows

STAGES = ("cut", "tune", "measure", "table")


def cut(bed: Bed, arm: str, share: float) -> None:
    """Keep the network that an arm tunes."""
    folder = bed.work / f"{arm}-{share:g}-cut"
    if not folder.exists():
        ARMS[arm].cut(bed, share).save(folder)
        bed.teacher.keep()


def tune(bed: Bed, arm: str, share: float) -> None:
    """Keep the tuned network, and what it can."""
    file, folder = cell_file(bed, arm, share), bed.work / f"{arm}-{share:g}-tuned"
    if file.is_file():
        return
    network = ARMS[arm].tuned(bed, Network.load(bed.work / f"{arm}-{share:g}-cut"))
    network.save(folder)
    bed.teacher.keep()
    right = correct(network, bed.data)
    cell = {
        "model": bed.model,
        "arm": arm,
        "share": share,
        "seed": bed.seed,
        "epochs": bed.options.epochs,
        "held_out": evaluate(network, bed.data.held_out, TASK, batch=500),
        "accuracy": float(right.mean()),
        **dataclasses.asdict(count(network)),
        "right": np.packbits(right).tobytes().hex(),
    }
    write_json(file, cell)
    print(bed.model, share, bed.seed, arm, f"{cell['accuracy']:.4f}, {cell['flops'] / 1e6:.1f} MFLOPs", flush=True)


def measure(bed: Bed, share: float) -> None:
    """Add to the cells of a share what each network takes, all in turn in one process."""
    files = {arm: cell_file(bed, arm, share) for arm in bed.options.arms}
    cells: dict[str, dict[str, Any]] = {arm: read_json(file) for arm, file in files.items() if file.is_file()}
    if all("ms" in cell for cell in cells.values()):
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.onnx" for name in (*cells, "dense")]
        export_onnx(bed.dense, bed.dense.input_shapes, paths[-1])
        lowerings = []
        for arm, path in zip(cells, paths, strict=False):
            network = Network.load(bed.work / f"{arm}-{share:g}-tuned")
            lowerings.append(choose_lowering(network, bed.dense, seconds=bed.options.seconds).lowering)
            form = lower(network, lowerings[-1])
            export_onnx(form, form.input_shapes, path)
        measured = bench_onnx(paths, seconds=3.0)
    times = list(map(median_ms, measured))
    for arm, lowering, ms in zip(cells, lowerings, times, strict=False):
        added = {"ms": ms, "dense_ms": times[-1], "share_of_dense": ms / times[-1], "lowering": str(lowering)}
        write_json(files[arm], cells[arm] | added | {"environment": measured[0].environment})
        print(bed.model, share, bed.seed, arm, f"{ms:.4f} of {times[-1]:.4f} ms, {lowering}", flush=True)


def cell_file(bed: Bed, arm: str, share: float) -> Path:
    """Return where a cell is kept."""
    return RESULTS / bed.by / f"{bed.model}_{share:g}_s{bed.seed}_{arm}.json"


def main() -> None:
    """Go through the stages, from cut to the one that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as Parquet")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--dense", default="benchmarks/results/cifar10/{model}_dense_s{seed}")
    parser.add_argument("--dense-epochs", type=int, default=12, help="that the dense network had")
    parser.add_argument("--by", choices=("ms", "flops"), default="ms", help="what is equal")
    parser.add_argument("--table-file", type=Path, help="latency table; made if missing")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.33, 0.17])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=8, help="after the dense network")
    parser.add_argument("--prune", type=int, default=2, help="of them, in which ours prunes: by default a quarter too")
    parser.add_argument("--seconds", type=float, default=10.0, help="of choosing a form")
    parser.add_argument("--work", type=Path, default=Path("runs/equal_latency"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    (RESULTS / options.by).mkdir(parents=True, exist_ok=True)
    stages = options.stages
    for seed in options.seeds if set(stages) - {"table"} else []:
        bed = Bed(options, seed)
        for share in options.shares:
            for arm in sorted(options.arms, key=list(ARMS).index):
                if "cut" in stages:
                    cut(bed, arm, share)
                if "tune" in stages:
                    tune(bed, arm, share)
            if "measure" in stages and bed.by == "ms":
                measure(bed, share)
    for row in rows(options.by) if "table" in stages else []:
        print(row)


if __name__ == "__main__":
    main()
