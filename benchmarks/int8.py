"""Prune, then INT8: accuracy on CIFAR-10, speed beside FP32 and BF16, memory of a calibration.

    python benchmarks/int8.py --files FOLDER accuracy --data FOLDER
    python benchmarks/int8.py --files FOLDER speed [--seconds 2]
    python benchmarks/int8.py --files FOLDER memory [--images 64 256]

accuracy: the networks in results/cifar10, calibrated on 500 training images, chosen for at most .5 points on
5,000 held-out training images; the test split is read once, by FP32, by onnxruntime's static MinMax recipe and
by ours, and McNemar's exact test compares the last two. speed: random weights and the random masks of
masks.py, all files of a network in one interleaved run per runtime. Float files are kept in FOLDER.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from masks import uneven_plan
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from bar_edge.bench.protocol import bench_onnx
from bar_edge.data import DataSource, Split, load_data
from bar_edge.errors import BarEdgeError
from bar_edge.export.lowering import lower
from bar_edge.export.onnx import export_onnx
from bar_edge.models import build
from bar_edge.network import Network, trace
from bar_edge.records import read_json, write_json
from bar_edge.run import versions
from bar_edge.surgery import slice_network
from bar_edge_calibration.collect import random_images
from bar_edge_calibration.quantize import Promise, quantize
from bar_edge_calibration.recipe import load_recipe, recipes

RESULTS = Path(__file__).resolve().parent / "results"
TRAINED = ("resnet20_bar4_s0", "wrn-10-2_bar4_s0", "resnet20_dense_s0", "resnet20_bar2_s0", "wrn-10-2_dense_s0")
#: networks that show the other recipes too, and ten times as many images
WITH_ALL_RECIPES = ("resnet20_bar4_s0", "wrn-10-2_bar4_s0")
OURS = "onnxruntime-cpu"
IMAGES, MORE_IMAGES, MAX_DROP, SEED = 500, 5000, 0.5, 0
SPEED = ("resnet56", "wrn-16-4", "wrn-28-12")
FACTORS, FORMS = (4, 16), ("slices", "zero-filled", "regular")
#: what is measured: runtime, precision that its hint asks for, files by the recipe of
RUNS = (
    ("onnxruntime-cpu", "fp32", ("fp32", "int8")),
    ("openvino-cpu", "fp32", ("fp32", "int8")),
    ("openvino-cpu", "bf16", ("fp32",)),
)


# ------------------------------------------------------------------------------------------ accuracy


class Images:
    """The first images of a split in an order drawn from SEED, as often as they are asked for."""

    def __init__(self, split: Split, count: int) -> None:
        self.split, self.count = split, count

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield batches of 100, normalised, not augmented."""
        batches = self.split.batches(100, train=True, seed=SEED, epoch=0, device="cpu", augment="none")
        for _, (images, _) in zip(range(self.count // 100), batches, strict=False):
            yield np.ascontiguousarray(images.numpy())


class Reader(CalibrationDataReader):
    """The same images for onnxruntime's own calibration."""

    def __init__(self, images: Images) -> None:
        self.batches = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch as a feed."""
        batch = next(self.batches, None)
        return None if batch is None else {"input": batch}


def correct(path: Path, split: Split) -> np.ndarray:
    """Return which images of a split the file gets right (images,) bool, on one thread of ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    batches = split.batches(100, train=False, seed=0, epoch=0, device="cpu", augment="none")
    return np.concatenate(
        [session.run(None, {"input": np.ascontiguousarray(x.numpy())})[0].argmax(1) == y.numpy() for x, y in batches]
    )


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the p-value of McNemar's exact two-sided test that two files are right equally often."""
    better, worse = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return min(1.0, float(2 * tail / 2**n)) if n else 1.0


def plain(source: Path, target: Path, images: Images) -> None:
    """Quantise by onnxruntime's static recipe: MinMax, U8 activations, S8 weights per channel, Q/DQ."""
    logging.disable(logging.WARNING)
    quantize_static(
        source,
        target,
        Reader(images),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        calibrate_method=CalibrationMethod.MinMax,
    )


def accuracy_of(name: str, data: DataSource, folder: Path) -> dict[str, Any]:
    """Quantise one trained network; returns accuracies on the test split and the records."""
    source = folder / f"{name}.onnx"
    if not source.is_file():
        network = Network.load(RESULTS / "cifar10" / name / "network").eval()
        export_onnx(lower(network, "slices"), data.input_shape, source)
    scores: dict[str, float] = {}

    def score(path: Path) -> float:
        if path != source:
            return float(correct(path, data.held_out).mean())
        if path.name not in scores:
            scores[path.name] = float(correct(path, data.held_out).mean())
        return scores[path.name]

    files, records = {"fp32": source, "plain": folder / f"{name}.plain.onnx"}, {}
    plain(source, files["plain"], Images(data.fit, IMAGES))
    kinds = {OURS: (OURS, IMAGES)}
    if name in WITH_ALL_RECIPES:
        kinds |= {recipe: (recipe, IMAGES) for recipe in recipes()} | {"5000 images": (OURS, MORE_IMAGES)}
    for kind, (recipe, count) in kinds.items():
        files[kind] = folder / f"{name}.{kind.replace(' ', '-')}.onnx"
        records[kind] = quantize(
            source,
            files[kind],
            images=Images(data.fit, count),
            data=data.name,
            seed=SEED,
            recipe=load_recipe(recipe),
            promise=Promise(score=score, max_drop=MAX_DROP),
        )
    right = {kind: correct(path, data.test) for kind, path in files.items()}
    return {
        "network": name,
        "test": {kind: float(r.mean()) for kind, r in right.items()},
        "mcnemar_p_against_plain": {kind: mcnemar(right[kind], right["plain"]) for kind in kinds},
        "mcnemar_p_against_fp32": {kind: mcnemar(right[kind], right["fp32"]) for kind in kinds},
        "records": records,
    }


def accuracy(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the trained networks that are not in the results yet."""
    data = load_data(str(options.data))
    found = read_results().get("accuracy") or {
        "calibration_images": IMAGES,
        "held_out": len(data.held_out),
        "test": len(data.test),
        "seed": SEED,
        "form": "slices",
        "threads": 1,
        "rows": [],
    }
    for name in TRAINED:
        if name not in [row["network"] for row in found["rows"]]:
            found["rows"].append(accuracy_of(name, data, options.files))
            save("accuracy", found)
            print(json.dumps({key: found["rows"][-1][key] for key in ("network", "test")}), file=sys.stderr, flush=True)
    return found


def accuracy_table(found: dict[str, Any]) -> str:
    """Return Markdown."""
    kinds = ["fp32", "plain", *recipes(), "5000 images"]
    lines = [f"| test accuracy, % | {' | '.join(kinds)} | McNemar p |", "|---" * (len(kinds) + 2) + "|"]
    for row in found["rows"]:
        cells = " | ".join(f"{100 * row['test'][kind]:.2f}" if kind in row["test"] else "" for kind in kinds)
        lines.append(f"| {row['network']} | {cells} | {row['mcnemar_p_against_plain'][OURS]:.2f} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ speed


def float_files(model: str, folder: Path) -> list[Path]:
    """Export the dense network and its pruned forms, those that are not there yet."""
    names = [f"{model}.1x.dense", *(f"{model}.{factor}x.{form}" for factor in FACTORS for form in FORMS)]
    paths = [folder / f"{name}.onnx" for name in names]
    if all(path.is_file() for path in paths):
        return paths
    torch.manual_seed(SEED)
    network = trace(build(model, input_shape=(3, 32, 32), classes=10).eval(), torch.zeros(2, 3, 32, 32)).eval()
    export_onnx(lower(network, "slices"), (3, 32, 32), paths[0])
    for factor in FACTORS:
        sliced = slice_network(network, uneven_plan(network, factor, SEED)).eval()
        for form in FORMS:
            export_onnx(lower(sliced, form), (3, 32, 32), folder / f"{model}.{factor}x.{form}.onnx")
    return paths


def int8_file(source: Path, runtime: str) -> Path:
    """Quantise by the runtime's recipe, on random images: for speed only."""
    target = source.with_name(f"{source.stem}.{runtime}-int8.onnx")
    images = random_images(onnx.load(source), 64, SEED)
    quantize(source, target, images=images, data="random", recipe=load_recipe(runtime), seed=SEED)
    return target


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all networks, interleaved within a network, runtime and number of threads."""
    rows = []
    for model in SPEED:
        sources = float_files(model, options.files)
        for runtime, hint, precisions in RUNS:
            files = [(p, hint) for p in sources]
            if "int8" in precisions:
                files += [(int8_file(p, runtime), "int8") for p in sources]
            for threads in (1, 2):
                try:
                    measured = bench_onnx(
                        [path for path, _ in files],
                        runtime=runtime,
                        precision=hint,
                        threads=threads,
                        seconds=options.seconds,
                        seed=SEED,
                    )
                except BarEdgeError as error:
                    rows.append({"model": model, "runtime": runtime, "threads": threads, "error": str(error)})
                    continue
                for source, (path, precision), latency in zip([*sources, *sources], files, measured, strict=False):
                    samples = np.array(latency.samples_ms)
                    p10, median, p90 = np.percentile(samples, [10, 50, 90]).tolist()
                    _, factor, form = source.name.removesuffix(".onnx").rsplit(".", 2)
                    assert path.name.startswith(source.stem)
                    rows.append(
                        {
                            "model": model,
                            "runtime": runtime,
                            "threads": threads,
                            "factor": factor,
                            "form": form,
                            "precision": precision,
                            "median_ms": median,
                            "p10_ms": p10,
                            "p90_ms": p90,
                            "runs": len(samples),
                            "environment": latency.environment,
                        }
                    )
            print(f"{model} {runtime} {hint}", file=sys.stderr, flush=True)
    return {"seed": SEED, "seconds": options.seconds, "rows": rows}


def speed_table(found: dict[str, Any]) -> str:
    """Return Markdown: medians and 10th percentiles, the fastest form of each precision, and the gain of INT8."""
    cells: dict[tuple[str, int, str, str], dict[str, dict[str, Any]]] = {}
    lines = []
    for row in found["rows"]:
        if "error" in row:
            lines.append(f"{row['model']} {row['runtime']}: {row['error']}")
            continue
        best = cells.setdefault((row["model"], row["threads"], row["factor"], row["runtime"]), {})
        if row["precision"] not in best or row["median_ms"] < best[row["precision"]]["median_ms"]:
            best[row["precision"]] = row
    lines += ["| network | threads | volume | runtime | FP32 ms | BF16 ms | INT8 ms | FP32 / INT8 |", "|---" * 8 + "|"]
    for (model, threads, factor, runtime), best in cells.items():
        texts = []
        for precision in ("fp32", "bf16", "int8"):
            row = best.get(precision)
            texts.append(f"{row['median_ms']:.3g} ({row['p10_ms']:.3g}) {row['form']}" if row else "")
        gain = best["fp32"]["median_ms"] / best["int8"]["median_ms"] if {"fp32", "int8"} <= best.keys() else math.nan
        lines.append(f"| {model} | {threads} | {factor} | {runtime} | {' | '.join(texts)} | {gain:.2f} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ memory


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate resnet50 at 224x224 on different numbers of images, each in a process of its own."""
    source = options.files / "resnet50.onnx"
    if not source.is_file():
        torch.manual_seed(SEED)
        export_onnx(build("resnet50", input_shape=(3, 224, 224), classes=1000).eval(), (3, 224, 224), source)
    rows = []
    for count in options.images:
        command = [sys.executable, __file__, "--files", str(options.files), "one", "--images", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(rows[-1], file=sys.stderr, flush=True)
    return {"network": "resnet50 at 224x224", "batch": 1, "rows": rows}


def one(options: argparse.Namespace) -> None:
    """Calibrate once on random images; prints the largest resident memory of the process."""
    source = options.files / "resnet50.onnx"
    images = random_images(onnx.load(source), options.images[0], SEED)
    recipe = load_recipe("onnxruntime-cpu")
    quantize(source, options.files / "resnet50.int8.onnx", images=images, data="random", recipe=recipe)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"images": options.images[0], "peak_gib": round(peak, 3)}))


def read_results() -> dict[str, Any]:
    """Return what was measured so far."""
    with contextlib.suppress(BarEdgeError):
        found: dict[str, Any] = read_json(RESULTS / "int8.json")
        return found
    return {}


def save(part: str, found: dict[str, Any]) -> None:
    """Put one part into the results."""
    write_json(RESULTS / "int8.json", {**read_results(), part: {**found, "versions": versions()}})


def main() -> None:
    """Run one part; what it finds goes into results/int8.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["accuracy", "speed", "memory", "one"])
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as Parquet")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--images", type=int, nargs="+", default=[64, 256])
    options = parser.parse_args()
    options.files.mkdir(parents=True, exist_ok=True)
    if options.part == "one":
        one(options)
        return
    found = {"accuracy": accuracy, "speed": speed, "memory": memory}[options.part](options)
    save(options.part, found)
    if options.part != "memory":
        print({"accuracy": accuracy_table, "speed": speed_table}[options.part](found))


if __name__ == "__main__":
    main()
