"""Seeded runs as hashes of plan, weights and ONNX file: what is to change no behaviour changes none of them.

resnet20 on `digits`, few epochs: a quarter of the volume, of the FLOPs, of a latency by a made-up table, and by random
masks. Run it in both trees: python -m benchmarks.bit_for_bit [--cases volume flops ms random]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from pathlib import Path

import torch

from bar_edge import pipeline
from bar_edge.config import TrainConfig
from bar_edge.files import file_hash
from bar_edge.models import build
from bar_edge.network import Network, trace
from bar_edge.network.priced_operations import LatencyCounter, largest_widths
from bar_edge.records.latency_table import LatencyTable, Prices, knots
from bar_edge.records.lowering import Lowering
from bar_edge.requests import ExportRequest, PruneRequest

MODEL, SHAPE, CLASSES = "resnet20", (1, 8, 8), 10
TRAIN = TrainConfig(
    dense=1, prune=2, tune=1, batch=64, lr_dense=0.1, lr_prune=0.02, lr_tune=0.02, precision="fp32", threads=1
)
#: what is compared, by its place in the RUN folder
FILES = {"plan": "plan.json", "weights": "network/weights.safetensors", "onnx": "artifacts/onnx-fp32/model.onnx"}
#: case -> budget and method; in ms it is a quarter of what the table says of the whole network
CASES = {"volume": ("4x", "bar"), "flops": ("4x:flops", "bar"), "ms": ("", "bar"), "random": ("4x", "random")}


def made_up(network: Network) -> LatencyTable:
    """Return a table on which an operation takes 1 us and 0.1 us per product of its widths."""
    prices = {}
    for kind, widths in largest_widths(network).items():
        axes = tuple((0, *knots(n)) for n in widths)
        ms = tuple(1e-3 + 1e-4 * math.prod(point) if all(point) else 0.0 for point in itertools.product(*axes))
        prices[str(kind)] = Prices(widths=axes, ms=ms)
    return LatencyTable(lowering=Lowering.parse("gather:4"), rounding=4, step=16, prices=prices)


def hashes(case: str, folder: Path) -> dict[str, str]:
    """Prune and export once; return the beginnings of the files' hashes."""
    budget, method = CASES[case]
    table = None
    if case == "ms":
        network = trace(build(MODEL, input_shape=SHAPE, classes=CLASSES).eval(), torch.zeros(2, *SHAPE))
        prices = made_up(network)
        table = str(folder / "table.json")
        prices.save(Path(table))
        budget = f"{LatencyCounter(network, prices).ms({}) / 4:.4f}ms"
    request = PruneRequest(model=MODEL, data="digits", budget=budget, method=method, table=table, seed=3, train=TRAIN)
    run = folder / "run"
    pipeline.prune(request, run)
    pipeline.export_run(run, ExportRequest(target="onnx", lowering="gather:4"))
    return {name: file_hash(run / file)[:16] for name, file in FILES.items()}


def main() -> None:
    """Print the hashes of the cases as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    torch.set_num_threads(1)
    found = {}
    for case in parser.parse_args().cases:
        with tempfile.TemporaryDirectory() as folder:
            found[case] = hashes(case, Path(folder))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
