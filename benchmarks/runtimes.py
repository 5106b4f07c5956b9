"""The zoo in the runtimes and precisions that run here: does every file compute the same, what does pruning gain?

    python -m benchmarks.runtimes files --files FOLDER --data CIFAR10     exports, calibrates; keeps the files
    python -m benchmarks.runtimes parity --files FOLDER --data CIFAR10
    python -m benchmarks.runtimes speed --files FOLDER

Networks of the zoo have random weights (seed 0) and uneven random masks at a quarter of the volume; so that their
answers mean something, BatchNorm is re-estimated on 500 training images of CIFAR-10 and the classifier fitted to 2,000
by least squares. Parity: max|a-b| / max|a| and the share of equal top-1 answers on 1,000 test images, against torch in
float32. Speed: pruned against dense in turns, bar-edge's own protocol, batch 1, one thread. fp16 is a converted file,
which both runtimes compute in float32 here; bf16 OpenVINO's arithmetic on the fp32 file. What is measured already
stays, so that each part can be stopped and run again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from bar_edge.bench import bench_onnx, compare
from bar_edge.bench.runner.records import Settings
from bar_edge.bench.runner.runtimes import RUNTIMES
from bar_edge.bench.statistics import median_ms
from bar_edge.data import DataSource, Split, load_data
from bar_edge.files import read_json, write_json
from bar_edge.lowering.lower import lower, stream_sizes
from bar_edge.models import build
from bar_edge.network import Network, trace
from bar_edge.records.lowering import Lowering
from bar_edge.runs.run_folder import versions
from bar_edge.surgery import slice_network
from bar_edge.targets.onnx.file import export_onnx
from bar_edge.targets.onnx.parity import difference, relative
from bar_edge.targets.onnx.precision import to_half
from bar_edge_calibration.batchnorm import reestimate_batchnorm
from bar_edge_calibration.collect import random_images
from bar_edge_calibration.quantize import quantize
from bar_edge_calibration.recipe import load_recipe
from benchmarks.masks import uneven_plan

RESULTS = Path(__file__).resolve().parent / "results"
#: docs/zoo.md
ZOO = (
    *("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "wrn-16-2", "wrn-16-4", "resnet18", "resnet50"),
    *("vgg16", "mobilenetv2", "wrn-28-10", "wrn-28-12"),
)
#: pruned and trained, of benchmarks/cifar10.py, for parity only
TRAINED = ("resnet20_bar4_s0", "wrn-10-2_bar4_s0")
FACTOR, SEED, BATCH = 4, 0, 100
#: (runtime, precision) -> lowering, of those that `--lowering auto` tries first
LOWERINGS = {
    ("onnxruntime-cpu", "fp32"): "gather:4",
    ("onnxruntime-cpu", "fp16"): "slices",
    ("onnxruntime-cpu", "int8"): "slices:16",
    ("openvino-cpu", "fp32"): "slices",
    ("openvino-cpu", "fp16"): "slices",
    ("openvino-cpu", "bf16"): "slices:16",
    ("openvino-cpu", "int8"): "slices:16",
}
TIMED = [key for key in LOWERINGS if key[1] != "fp16"]


# ------------------------------------------------------------------------------------------ files


def images_of(split: Split, number: int, *, as_training: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first batches of a split, in drawn order for training."""
    batches = split.batches(BATCH, train=as_training, seed=SEED, epoch=0, device="cpu", augment="none")
    for _, batch in zip(range(number // BATCH), batches, strict=False):
        yield batch


def fit_classifier(network: Network, data: DataSource) -> None:
    """Set the last linear layer by ridge regression from what it reads to the classes."""
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    targets = []
    for images, labels in images_of(data.fit, 2000, as_training=True):
        network.eval()(images)
        targets.append(labels)
    handle.remove()
    features = torch.cat(seen).double()
    center, scale = features.mean(0), features.std(0) + 1e-6
    x = (features - center) / scale
    y = nn.functional.one_hot(torch.cat(targets), last.out_features).double() - 1 / last.out_features
    weight = torch.linalg.solve(x.T @ x + len(x) / 10 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y) / scale[:, None]
    last.weight.copy_(weight.T)
    last.bias.copy_(-center @ weight)


def networks(name: str, data: DataSource) -> tuple[Network, Network | None]:
    """Return a pruned network and, for one of the zoo, the dense one."""
    if name in TRAINED:
        return Network.load(RESULTS / "cifar10" / name / "network").eval(), None
    torch.manual_seed(SEED)
    dense = trace(build(name, input_shape=data.input_shape, classes=10), torch.zeros(2, *data.input_shape)).eval()
    pruned = slice_network(dense, uneven_plan(dense, FACTOR, SEED))
    reestimate_batchnorm(pruned, (images for images, _ in images_of(data.fit, 500, as_training=True)))
    fit_classifier(pruned, data)
    return pruned.eval(), dense


def file_of(folder: Path, role: str, runtime: str, precision: str) -> Path:
    """Name the file of a network that a runtime runs in a precision."""
    form = "dense" if role == "dense" else LOWERINGS[runtime, precision].replace(":", "-")
    kind = {"bf16": "fp32", "int8": f"int8-{runtime}"}.get(precision, precision)
    return folder / f"{form}.{kind}.onnx"


def write_file(network: Network, role: str, folder: Path, key: tuple[str, str], data: DataSource) -> None:
    """Export a network for a runtime and precision, unless the file is there."""
    path = file_of(folder, role, *key)
    float_path = path.with_name(f"{path.name.split('.')[0]}.fp32.onnx")
    if not float_path.is_file():
        lowering = "slices" if role == "dense" else LOWERINGS[key]
        if not stream_sizes(network):
            lowering = lowering.replace("gather", "slices")
        export_onnx(lower(network, Lowering.parse(lowering)), data.input_shape, float_path)
    if key[1] == "fp16":
        to_half(float_path, path, "fp16")
    elif key[1] == "int8" and not path.is_file():
        # the dense file is timed only
        calibration = (np.ascontiguousarray(x.numpy()) for x, _ in images_of(data.fit, 500, as_training=True))
        images = calibration if role == "pruned" else random_images(onnx.load(float_path), 64, SEED)
        quantize(float_path, path, images=images, data=data.name, seed=SEED, recipe=load_recipe(key[0]))


@torch.no_grad()
def write_files(name: str, folder: Path, data: DataSource) -> None:
    """Export a network in all forms and precisions, and keep what torch answers to the test images."""
    if (folder / "expected.npz").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pruned, dense = networks(name, data)
    for key in LOWERINGS:
        write_file(pruned, "pruned", folder, key, data)
        if dense is not None and key in TIMED:
            write_file(dense, "dense", folder, key, data)
    images, labels = zip(*images_of(data.test, 1000, as_training=False), strict=True)
    logits = torch.cat([pruned(part) for part in images])
    np.savez(folder / "expected.npz", images=torch.cat(images), labels=torch.cat(labels), logits=logits)
    print(name, f"{(logits.argmax(1) == torch.cat(labels)).float().mean():.1%} right", flush=True)


# ------------------------------------------------------------------------------------------ parity and speed


def outputs(runtime: str, precision: str, path: Path, images: np.ndarray) -> np.ndarray:
    """Run all images in batches."""
    settings = Settings(1, BATCH, "bf16" if precision == "bf16" else "fp32", True)
    loaded = RUNTIMES[runtime].load(path, path.name, settings)
    return np.concatenate([np.array(loaded.run([images[i : i + BATCH]])[0]) for i in range(0, len(images), BATCH)])


def alone(*arguments: Any) -> np.ndarray | None:
    """Return the outputs, computed in a process of its own; None if that dies."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(outputs, *arguments).result()
        except BrokenProcessPool:
            return None


def parity_row(name: str, folder: Path, runtime: str, precision: str) -> dict[str, Any]:
    """Compare a file with torch."""
    known = np.load(folder / "expected.npz")
    expected, labels = known["logits"], known["labels"]
    row: dict[str, Any] = {"images": len(labels), "torch_accuracy": float((expected.argmax(1) == labels).mean())}
    got = alone(runtime, precision, file_of(folder, "pruned", runtime, precision), known["images"])
    if got is None:
        return row | {"died": True}
    agreement = float((expected.argmax(1) == got.argmax(1)).mean())
    accuracy = float((got.argmax(1) == labels).mean())
    error = relative(*difference([expected], [got]))
    return row | {"error": error, "top1_agreement": agreement, "accuracy": accuracy, "died": False}


def speed_row(name: str, folder: Path, runtime: str, precision: str) -> dict[str, Any]:
    """Time the pruned file in turns with the dense one."""
    files = [file_of(folder, role, runtime, precision) for role in ("pruned", "dense")]
    hint = "bf16" if precision == "bf16" else "fp32"
    found = bench_onnx(files, runtime=runtime, precision=hint, seconds=1.5)
    comparison = compare(found[0], found[1])
    quartiles = [np.percentile(one.samples_ms, (25, 50, 75)).round(4).tolist() for one in found]
    return {
        "runs": len(found[0].samples_ms),
        "quartiles_ms": {"pruned": quartiles[0], "dense": quartiles[1]},
        "speedup": median_ms(found[1]) / median_ms(found[0]),
        "interval": [comparison.low, comparison.high],
        "environment": found[0].environment,
        "conditions": found[0].conditions,
    }


def fill(part: str, names: tuple[str, ...], options: argparse.Namespace) -> None:
    """Add the rows that the results lack."""
    result = read_json(options.out) if options.out.is_file() else {"parity": [], "speed": []}
    work = {"parity": (parity_row, LOWERINGS), "speed": (speed_row, TIMED)}[part]
    for name in names:
        for runtime, precision in work[1]:
            key = {"network": name, "runtime": runtime, "precision": precision}
            there = (options.files / name / "expected.npz").is_file()
            if not there or any(key.items() <= row.items() for row in result[part]):
                continue
            found = work[0](name, options.files / name, runtime, precision)
            result[part].append({**key, "lowering": LOWERINGS[runtime, precision], **found})
            print(key, {k: found[k] for k in ("error", "top1_agreement", "speedup") if k in found}, flush=True)
            write_json(options.out, {**result, "seed": SEED, "threads": 1, "factor": FACTOR, "versions": versions()})


def tables(result: dict[str, Any]) -> str:
    """Return both tables in Markdown, a column for each runtime and precision."""

    def table(part: str, keys: Any, cell: Any) -> list[str]:
        rows = {(row["network"], row["runtime"], row["precision"]): row for row in result[part]}
        names = [name for name in (*ZOO, *TRAINED) if any(row["network"] == name for row in result[part])]
        heads = [f"{'ORT' if runtime.startswith('onnx') else 'OpenVINO'} {precision}" for runtime, precision in keys]
        lines = [f"| network | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
        for name in names:
            cells = [cell(rows[name, *key]) if (name, *key) in rows else "" for key in keys]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return lines

    def parity_cell(row: dict[str, Any]) -> str:
        return "died" if row["died"] else f"{row['error']:.0e}, {row['top1_agreement']:.1%}"

    def speed_cell(row: dict[str, Any]) -> str:
        pruned, dense = (row["quartiles_ms"][role][1] for role in ("pruned", "dense"))
        low, high = row["interval"]
        return f"{pruned:.3g} of {dense:.3g}: {row['speedup']:.2f} ({low:.2f} to {high:.2f})"

    return "\n".join([*table("parity", LOWERINGS, parity_cell), "", *table("speed", TIMED, speed_cell)])


def main() -> None:
    """Do one part, write the JSON and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["files", "parity", "speed"])
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--data", help="CIFAR-10")
    parser.add_argument("--out", type=Path, default=RESULTS / "runtimes.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "files":
        data = load_data(options.data)
        for name in (*TRAINED, *ZOO):
            write_files(name, options.files / name, data)
        return
    fill(options.part, (*TRAINED, *ZOO) if options.part == "parity" else ZOO, options)
    print(tables(read_json(options.out)))


if __name__ == "__main__":
    main()
