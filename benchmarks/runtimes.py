"""Trained networks in every runtime and precision that runs here: do they compute the same, and how fast are they?

    python benchmarks/runtimes.py --data FOLDER

Parity: max|a-b| / max|a| and the share of equal top-1 answers on CIFAR-10 test images, against torch in float32. fp16
is our converted file (ONNX Runtime and OpenVINO on this kind of CPU compute it in float32 and round between layers),
bf16 OpenVINO's own arithmetic on the float32 file; our bf16 file is checked with ONNX's reference implementation on a
few images, since no runtime here computes it. Speed: pruned against dense, batch 1, one thread, in turns. A runtime
that dies takes only its own process with it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bar_edge.data import load_data
from bar_edge.export.lowering import lower
from bar_edge.export.onnx import export_onnx
from bar_edge.export.precision import to_half
from bar_edge.network import Network
from bar_edge.records import read_json, write_json

#: runtime, precision -> file, images
PARITY = {
    ("onnxruntime", "fp32"): ("fp32", 1000),
    ("onnxruntime", "fp16"): ("fp16", 1000),
    ("openvino", "fp32"): ("fp32", 1000),
    ("openvino", "fp16"): ("fp16", 1000),
    ("openvino", "bf16"): ("fp32", 1000),
    ("onnx reference", "bf16"): ("bf16", 4),
}
#: pruned, dense
PAIRS = [("resnet20_bar4_s0", "resnet20_dense_s0"), ("wrn-10-2_bar4_s0", "wrn-10-2_dense_s0")]
SPEED = [("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")]
WARMUP_RUNS, SECONDS = 50, 6.0


def load(runtime: str, precision: str, path: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from images to logits on one thread."""
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"input": images})[0]
    if runtime == "openvino":
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        }
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(path), "CPU", settings)
        request = compiled.create_infer_request()
        return lambda images: request.infer([images]).to_tuple()[0]
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(path)
    return lambda images: evaluator.run(None, {"input": images})[0]


def outputs(runtime: str, precision: str, path: str, images: np.ndarray) -> np.ndarray:
    """Run all images in batches of 100."""
    run = load(runtime, precision, path)
    return np.concatenate([np.array(run(images[i : i + 100])) for i in range(0, len(images), 100)])


def race(runtime: str, precision: str, paths: list[str]) -> list[list[float]]:
    """Time files in turns, the order drawn anew in every round; returns milliseconds per file."""
    runs = [load(runtime, precision, path) for path in paths]
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, 3, 32, 32), np.float32)
    times: list[list[float]] = [[] for _ in runs]
    for run in runs * WARMUP_RUNS:
        run(image)
    end = time.perf_counter() + SECONDS * len(runs)
    while time.perf_counter() < end:
        for i in rng.permutation(len(runs)):
            start = time.perf_counter_ns()
            runs[i](image)
            times[i].append((time.perf_counter_ns() - start) / 1e6)
    return times


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Do it in a process of its own; None if that dies."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool:
            return None


def write_files(kept: Path, name: str, folder: Path) -> Network:
    """Export one network in every precision; returns it."""
    network = Network.load(kept / name / "network")
    export_onnx(lower(network, "slices"), network.input_shapes, folder / f"{name}-fp32.onnx")
    for precision in ("fp16", "bf16"):
        to_half(folder / f"{name}-fp32.onnx", folder / f"{name}-{precision}.onnx", precision)  # type: ignore[arg-type]
    return network


def parity_rows(name: str, network: Network, folder: Path, images: np.ndarray) -> list[dict[str, Any]]:
    """Compare every runtime and precision with torch."""
    with torch.no_grad():
        expected = torch.cat([network.eval()(part) for part in torch.from_numpy(images).split(100)]).numpy()
    rows = []
    for (runtime, precision), (file, count) in PARITY.items():
        got = alone(outputs, runtime, precision, str(folder / f"{name}-{file}.onnx"), images[:count])
        row: dict[str, Any] = {"network": name, "runtime": runtime, "precision": precision, "images": count}
        if got is None:
            rows.append(row | {"error": None, "top1_agreement": None, "died": True})
            continue
        a, b = expected[:count].astype(np.float64), got
        error = float(np.abs(a - b).max() / np.abs(a).max())
        agreement = float((a.argmax(1) == b.argmax(1)).mean())
        rows.append(row | {"error": error, "top1_agreement": agreement, "died": False})
        print(rows[-1], flush=True)
    return rows


def speed_rows(folder: Path) -> list[dict[str, Any]]:
    """Race each pruned network against its dense one."""
    rows = []
    for pair in PAIRS:
        for runtime, precision in SPEED:
            times = alone(race, runtime, precision, [str(folder / f"{name}-fp32.onnx") for name in pair])
            quartiles = [[round(q, 4) for q in statistics.quantiles(samples, n=4)] for samples in times]
            rows.append(
                {
                    "pruned": pair[0],
                    "dense": pair[1],
                    "runtime": runtime,
                    "precision": precision,
                    "runs": len(times[0]),
                    "quartiles_ms": {"pruned": quartiles[0], "dense": quartiles[1]},
                    "speedup": quartiles[1][1] / quartiles[0][1],
                }
            )
            print(rows[-1], flush=True)
    return rows


def tables(result: dict[str, Any]) -> str:
    """Return both tables in Markdown."""
    lines = [
        "| network | runtime | precision | images | max difference | top-1 agreement |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["parity"]:
        found = "died |" if row["died"] else f"{row['error']:.1e} | {row['top1_agreement']:.1%}"
        lines.append(f"| {row['network']} | {row['runtime']} | {row['precision']} | {row['images']} | {found} |")
    lines += ["", "| pruned | runtime | precision | pruned ms | dense ms | faster |", "|---|---|---|---|---|---|"]
    for row in result["speed"]:
        pruned, dense = (
            f"{q[1]:.3f} ({q[0]:.3f} to {q[2]:.3f})" for q in (row["quartiles_ms"][key] for key in ("pruned", "dense"))
        )
        name = f"{row['pruned']} | {row['runtime']} | {row['precision']}"
        lines.append(f"| {name} | {pruned} | {dense} | {row['speedup']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Compare, race, write the JSON and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10")
    parser.add_argument("--kept", type=Path, default=Path("benchmarks/results/cifar10"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/runtimes.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    batches = load_data(options.data).test.batches(1000, train=False, seed=0, epoch=0, device="cpu", augment="none")
    images = next(iter(batches))[0].numpy()
    with tempfile.TemporaryDirectory() as temporary:
        folder, parity = Path(temporary), []
        for name in (name for pair in PAIRS for name in pair):
            network = write_files(options.kept, name, folder)
            accuracy = read_json(options.kept / name / "result.json")["sliced"]["metric"]
            parity += [row | {"accuracy": accuracy} for row in parity_rows(name, network, folder, images)]
        speed = speed_rows(folder)
    packages = ("torch", "onnx", "onnxruntime", "openvino")
    versions = {package: importlib.metadata.version(package) for package in packages}
    cpu = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    machine = {"cpu": cpu, "cores": os.cpu_count(), "load_5min_at_the_end": round(os.getloadavg()[1], 2)}
    result = {
        "seed": 0,
        "threads": 1,
        "batch": 1,
        "lowering": "slices",
        "versions": versions,
        "environment": machine,
        "parity": parity,
        "speed": speed,
    }
    write_json(options.out, result)
    print(tables(result))


if __name__ == "__main__":
    main()
