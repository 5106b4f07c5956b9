"""Prune, then INT8: accuracy on CIFAR-10, speed beside FP32 and BF16, memory of a calibration.

    python -m benchmarks.int8 --files FOLDER train --data FOLDER
    python -m benchmarks.int8 --files FOLDER accuracy --data FOLDER
    python -m benchmarks.int8 --files FOLDER check
    python -m benchmarks.int8 --files FOLDER files
    python -m benchmarks.int8 --files FOLDER speed [--seconds 1]
    python -m benchmarks.int8 --files FOLDER pairs [--seconds 3]
    python -m benchmarks.int8 --files FOLDER memory [--images 64 256]

train: the networks that results/cifar10 and results/int8 lack, a few hundred steps; pruned by the masks of masks.py.
accuracy: the networks there and those, calibrated on 500 training images, chosen for at most .5 points on
5,000 held-out training images; the test split is read once, by FP32, by onnxruntime's static MinMax recipe and
by ours, and McNemar's exact test compares the last two. check: of the
same networks, what runs in float between INT8 convolutions of ONNX Runtime (nothing), and what TensorRT's checker
says (accepted). speed: random weights and the random masks of masks.py, all files of a network in one interleaved
run per runtime. pairs: FP32 and INT8 of one form alone. memory: on random images. Files are kept in FOLDER, what was
measured in results/int8.json: an interrupted part goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
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
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from bar_edge.bench import bench_onnx, compare
from bar_edge.bench.statistics import median_ms
from bar_edge.data import DataSource, Split, load_data
from bar_edge.errors import BarEdgeError
from bar_edge.files import read_json, write_json
from bar_edge.lowering.lower import lower
from bar_edge.models import ZOO, build
from bar_edge.network import Network, trace
from bar_edge.records.lowering import Lowering
from bar_edge.runs.run_folder import versions
from bar_edge.surgery import slice_network
from bar_edge.targets.onnx.file import export_onnx
from bar_edge.targets.tensorrt.check import require_accepted
from bar_edge.targets.tensorrt.operators import VERSIONS
from bar_edge_calibration.collect import random_images
from bar_edge_calibration.islands import float_islands
from bar_edge_calibration.quantize import Promise, quantize
from bar_edge_calibration.recipe import load_recipe, recipes
from benchmarks.masks import uneven_plan

RESULTS = Path(__file__).resolve().parent / "results"
#: networks that results/cifar10 lacks -> what each starts from (a model of the zoo or a trained network), factor, steps
SHORT = {
    "resnet20_uneven16_s0": ("resnet20_dense_s0", 16, 1500),
    "wrn-10-2_uneven2_s0": ("wrn-10-2_dense_s0", 2, 300),
    "wrn-10-2_uneven16_s0": ("wrn-10-2_dense_s0", 16, 1500),
    "mobilenetv2_dense_s0": ("mobilenetv2", 1, 600),
    "mobilenetv2_uneven2_s0": ("mobilenetv2_dense_s0", 2, 300),
    "mobilenetv2_uneven4_s0": ("mobilenetv2_dense_s0", 4, 300),
    "mobilenetv2_uneven16_s0": ("mobilenetv2_dense_s0", 16, 300),
}
BATCH, PEAK_LR = 64, 3e-3
TRAINED = ("resnet20_bar4_s0", "wrn-10-2_bar4_s0", "resnet20_dense_s0", "resnet20_bar2_s0", "wrn-10-2_dense_s0", *SHORT)
#: networks that show the other recipes too, and ten times as many images
WITH_ALL_RECIPES = ("resnet20_bar4_s0",)
OURS = "onnxruntime-cpu"
IMAGES, MORE_IMAGES, MAX_DROP, SEED = 500, 5000, 0.5, 0
SPEED = ("wrn-28-12", "wrn-16-4", "resnet56")
#: runtime -> forms whose FP32 and INT8 files are measured alone
PAIRS = {
    "onnxruntime-cpu": ("regular", "slices", "gather", "gather:4", "pointwise:16", "deferred:4", "deferred:16"),
    "openvino-cpu": ("regular", "regular:16", "zero-filled:32"),
}
FACTORS = (4, 16)
FORMS = (
    *("slices:4", "gather:4", "pointwise:16", "slices:16", "deferred:4", "deferred:16"),
    *("deferred:4,gather:4,gather:4", "zero-filled:32", "regular:16", "regular"),
)
#: runtime -> what it shall compute in where the file leaves it open
RUNTIMES = {"onnxruntime-cpu": ("fp32",), "openvino-cpu": ("fp32", "bf16")}
PRECISIONS = ("fp32", "bf16", "int8")
#: runtime -> INT8 recipes whose pairs are measured; the last one is the faster here with one thread, on a CPU with AMX
INT8 = {"onnxruntime-cpu": ("onnxruntime-cpu", "onnxruntime-amx"), "openvino-cpu": ("openvino-cpu",)}


# ------------------------------------------------------------------------------------------ train


def trained(name: str, folder: Path) -> Path:
    """Return the folder of a trained network: among the results, or where `train` puts it."""
    kept = [RESULTS / part / name / "network" for part in ("cifar10", "int8")]
    return next((path for path in kept if path.is_dir()), folder / name / "network")


def train(options: argparse.Namespace) -> None:
    """Train the networks of SHORT that are not there yet, into the folder: AdamW, one cycle, bf16, one thread."""
    torch.set_num_threads(1)
    data = load_data(str(options.data))
    for name, (origin, factor, steps) in SHORT.items():
        if trained(name, options.files).is_dir():
            continue
        torch.manual_seed(SEED)
        if origin in ZOO:
            module = build(origin, input_shape=data.input_shape, classes=10)
            network = trace(module.eval(), torch.zeros(2, *data.input_shape))
        else:
            network = Network.load(trained(origin, options.files))
        network = slice_network(network, uneven_plan(network, factor, SEED)) if factor > 1 else network
        optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
        epochs = (data.fit.batches(BATCH, train=True, seed=SEED, epoch=e, device="cpu") for e in itertools.count())
        for images, labels in itertools.islice(itertools.chain.from_iterable(epochs), steps):
            with torch.autocast("cpu", torch.bfloat16):
                logits = network.train()(images)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval().save(options.files / name / "network")
        print(f"{name}: {loss.item():.2f}", file=sys.stderr, flush=True)


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


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
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


def trained_file(name: str, folder: Path) -> Path:
    """Export a trained network unless it is there."""
    path = folder / f"{name}.onnx"
    if not path.is_file():
        network = Network.load(trained(name, folder)).eval()
        export_onnx(lower(network, Lowering.parse("slices")), network.input_shapes, path)
    return path


def accuracy_of(name: str, data: DataSource, folder: Path) -> dict[str, Any]:
    """Quantise one trained network; returns accuracies on the test split and the records."""
    source = trained_file(name, folder)
    scores: dict[str, float] = {}

    def score(path: Path) -> float:
        if path != source:
            return float(correct(path, data.held_out).mean())
        if path.name not in scores:
            scores[path.name] = float(correct(path, data.held_out).mean())
        return scores[path.name]

    files, records = {"fp32": source, "plain": folder / f"{name}.plain.onnx"}, {}
    plain(source, files["plain"], Images(data.fit, IMAGES))
    kinds = {recipe: (recipe, IMAGES) for recipe in INT8["onnxruntime-cpu"]}
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
    found["rows"] = [row for row in found["rows"] if {*INT8["onnxruntime-cpu"]} <= row["test"].keys()]
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


def check(options: argparse.Namespace) -> None:
    """Print the float operations between INT8 convolutions in ONNX Runtime, and whether TensorRT's checker accepts."""
    for name in TRAINED:
        source = trained_file(name, options.files)
        int8, tensorrt = (int8_file(source, recipe) for recipe in (OURS, "tensorrt"))
        require_accepted(tensorrt)
        print(
            f"{name}: float between INT8 convolutions: {float_islands(int8)}; TensorRT {', '.join(VERSIONS)} accepted"
        )


# ------------------------------------------------------------------------------------------ speed


def float_files(model: str, folder: Path, forms: tuple[str, ...] = FORMS) -> list[Path]:
    """Export the dense network and its pruned forms, those that are not there yet."""
    names = {"dense": (1, "slices")} | {f"{f}x.{form.replace(':', '_')}": (f, form) for f in FACTORS for form in forms}
    paths = {name: folder / f"{model}.{name}.onnx" for name in names}
    if not all(path.is_file() for path in paths.values()):
        torch.manual_seed(SEED)
        network = trace(build(model, input_shape=(3, 32, 32), classes=10).eval(), torch.zeros(2, 3, 32, 32)).eval()
        sliced = {1: network} | {f: slice_network(network, uneven_plan(network, f, SEED)).eval() for f in FACTORS}
        for name, (factor, form) in names.items():
            if not paths[name].is_file():
                export_onnx(lower(sliced[factor], Lowering.parse(form)), (3, 32, 32), paths[name])
    return list(paths.values())


def int8_file(source: Path, recipe: str) -> Path:
    """Quantise by a recipe, on random images: for speed and structure only."""
    target = source.with_name(f"{source.stem}.{recipe}.random.onnx")
    if not target.is_file():
        images = random_images(onnx.load(source), 64, SEED)
        quantize(source, target, images=images, data="random", recipe=load_recipe(recipe), seed=SEED)
    return target


def files(options: argparse.Namespace) -> None:
    """Write all files that are measured."""
    for model in SPEED:
        for source in float_files(model, options.files):
            print(source.stem, file=sys.stderr, flush=True)
            for recipe in itertools.chain.from_iterable(INT8.values()):
                int8_file(source, recipe)


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all networks, interleaved within a network, runtime and number of threads."""
    settings = {"seed": SEED, "batch": 1, "seconds": options.seconds, "forms": [*FORMS]}
    settings["recipes"] = {runtime: names[-1] for runtime, names in INT8.items()}
    found: dict[str, Any] = read_results().get("speed", {})
    if any(found.get(key) != value for key, value in settings.items()):
        found = {**settings, "rows": []}
    for model, (runtime, precisions), threads in itertools.product(SPEED, RUNTIMES.items(), (1, 2)):
        if any((row["model"], row["runtime"], row["threads"]) == (model, runtime, threads) for row in found["rows"]):
            continue
        sources = float_files(model, options.files)
        for hint in precisions:
            cells = [(source, source, hint) for source in sources]
            if hint == "fp32":
                cells += [(source, int8_file(source, INT8[runtime][-1]), "int8") for source in sources]
            measured = bench_onnx(
                [path for _, path, _ in cells],
                runtime=runtime,
                precision=hint,
                threads=threads,
                seconds=options.seconds,
                seed=SEED,
            )
            for (source, _, precision), latency in zip(cells, measured, strict=True):
                p10, median, p90 = np.percentile(latency.samples_ms, [10, 50, 90]).tolist()
                row = {"model": model, "runtime": runtime, "threads": threads, "file": source.stem.partition(".")[2]}
                row |= {"precision": precision, "median_ms": median, "p10_ms": p10, "p90_ms": p90}
                found["rows"].append({**row, "runs": len(latency.samples_ms)})
            found["environment"] = measured[0].environment
        save("speed", found)
        print(f"{model} {runtime} {threads}", file=sys.stderr, flush=True)
    return found


def pairs(options: argparse.Namespace) -> dict[str, Any]:
    """Measure wrn-28-12's FP32 and INT8 files of one form in turn, nothing else in the process."""
    rows = list[dict[str, Any]]()
    for runtime, forms in PAIRS.items():
        sources = float_files("wrn-28-12", options.files, forms)
        for recipe, source in itertools.product(INT8[runtime], sources):
            both = [source, int8_file(source, recipe)]
            fp32, int8 = bench_onnx(both, runtime=runtime, seconds=options.seconds, seed=SEED)
            volume, _, form = source.stem.partition(".")[2].partition(".")
            gain = compare(int8, fp32)
            row: dict[str, Any] = {"recipe": recipe, "volume": volume, "form": form.replace("_", ":")}
            row |= {"fp32_ms": median_ms(fp32), "int8_ms": median_ms(int8), "times": gain.speedup}
            rows.append({**row, "low": gain.low, "high": gain.high, "runs": len(int8.samples_ms)})
    return {"network": "wrn-28-12", "seed": SEED, "batch": 1, "threads": 1, "seconds": options.seconds, "rows": rows}


def pairs_table(found: dict[str, Any]) -> str:
    """Return Markdown: medians in ms, and how many times faster INT8 is."""
    lines = ["| recipe | volume | form | FP32 ms | INT8 ms | times faster (95 %) |", "|---" * 6 + "|"]
    for row in found["rows"]:
        lines.append(
            f"| {row['recipe']} | {row['volume']} | {row['form']} | {row['fp32_ms']:.3g} | {row['int8_ms']:.3g} "
            f"| {row['times']:.2f} ({row['low']:.2f}, {row['high']:.2f}) |"
        )
    return "\n".join(lines)


def speed_table(found: dict[str, Any]) -> str:
    """Return Markdown: medians in ms, and how many times faster INT8 is than FP32: fastest files, and same form."""
    cells: dict[tuple[str, str, int, str], dict[str, dict[str, float]]] = {}
    for row in found["rows"]:
        volume, _, form = row["file"].partition(".")
        cell = cells.setdefault((row["model"], row["runtime"], row["threads"], volume), {})
        cell.setdefault(row["precision"], {})[form] = row["median_ms"]
    lines = ["| network | runtime | threads | volume | FP32 | BF16 | INT8 | INT8, fastest | same form | mixed |"]
    lines.append("|---" * 10 + "|")
    for (model, runtime, threads, volume), cell in cells.items():
        best = {precision: min(forms, key=forms.__getitem__) for precision, forms in cell.items()}
        texts = [f"{cell[p][best[p]]:.3g} {best[p].replace('_', ':')}" if p in best else "" for p in PRECISIONS]
        fp32, int8, form = cell["fp32"], cell["int8"], best["int8"]
        gains = [min(fp32.values()) / int8[form], fp32[form] / int8[form], int8.get("regular", math.nan) / int8[form]]
        texts += [f"{gain:.2f}" for gain in gains]
        lines.append(f"| {model} | {runtime} | {threads} | {volume} | {' | '.join(texts)} |")
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
        command = [sys.executable, "-m", "benchmarks.int8", "--files", str(options.files)]
        command += ["one", "--images", str(count)]
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
    parser.add_argument("part", choices=["train", "accuracy", "check", "files", "speed", "pairs", "memory", "one"])
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as Parquet")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--images", type=int, nargs="+", default=[64, 256])
    options = parser.parse_args()
    options.files.mkdir(parents=True, exist_ok=True)
    others = {"train": train, "check": check, "files": files, "one": one}
    if options.part in others:
        others[options.part](options)
        return
    found = {"accuracy": accuracy, "speed": speed, "pairs": pairs, "memory": memory}[options.part](options)
    save(options.part, found)
    tables = {"accuracy": accuracy_table, "speed": speed_table, "pairs": pairs_table}
    if options.part in tables:
        print(tables[options.part](found))


if __name__ == "__main__":
    main()
