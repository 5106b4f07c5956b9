"""What a bundle's build.pyz does on the device: build the engine, compare its outputs, time it.

    python3 build.pyz

Exit status 0: an engine with the right outputs; 1: an engine with wrong ones, which is removed; 2 and 3 as
everywhere. One JSON object on stdout. Needs Python 3.10, numpy, TensorRT's Python bindings.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bar_edge.errors import BarEdgeError
from bar_edge.export.tensorrt import Engine, EngineOptions, build, load, manifest_path

MODEL, ENGINE, SAMPLES, MANIFEST = "model.onnx", "model.engine", "samples.safetensors", "manifest.json"
WARMUP_RUNS, TIMED_RUNS = 20, 200


def build_and_check(folder: Path) -> dict[str, Any]:
    """Build a bundle's engine, run it on all samples and time it at the best batch; a wrong engine is removed."""
    bundle = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    settings = bundle["engine_options"]
    options = EngineOptions(**{**settings, "batch": tuple(settings["batch"]), "timing_caches": str(folder)})
    manifest = build(folder / MODEL, folder / ENGINE, options, rebuild="sh build.sh")
    engine = load(folder / ENGINE, folder / MODEL)
    tensors = read_safetensors(folder / SAMPLES)
    inputs = [tensors[value["name"]] for value in bundle["inputs"]]
    expected = [tensors[value["name"]] for value in bundle["outputs"]]
    error = sample_error(engine, inputs, expected, options.batch)
    within = error <= bundle["parity"]["tolerance"]
    answer = {
        "within": within,
        "error": error if np.isfinite(error) else None,
        "tolerance": bundle["parity"]["tolerance"],
        "samples": len(inputs[0]),
        "latency": timings(engine, [array[: options.batch[1]] for array in inputs]),
        "engine": manifest,
    }
    if not within:
        (folder / ENGINE).unlink()
        manifest_path(folder / ENGINE).unlink()
    return answer


def sample_error(
    engine: Engine, inputs: list[np.ndarray], expected: list[np.ndarray], batch: tuple[int, int, int]
) -> float:
    """Return max|a-b| / max|a| over all samples, at the best batch; infinity where an output is not finite.

    What does not fill a batch runs at a smaller one, or twice where the engine takes no smaller one.
    """
    low, best, _ = batch
    largest_error = 0.0
    for start in range(0, len(inputs[0]), best):
        count = min(best, len(inputs[0]) - start)
        rows = [min(start + i, len(inputs[0]) - 1) for i in range(max(low, count))]
        for a, b in zip(expected, engine.run([array[rows] for array in inputs]), strict=True):
            found = float(np.abs(a[rows].astype(np.float64) - b).max()) if a[rows].shape == b.shape else np.inf
            largest_error = max(largest_error, found if np.isfinite(found) else np.inf)
    scale = max(float(np.abs(array).max()) for array in expected)
    return 0.0 if largest_error == 0 else largest_error / scale if scale else np.inf


def timings(engine: Engine, inputs: list[np.ndarray]) -> dict[str, Any]:
    """Return median and 90th percentile of each part of a run, in milliseconds."""
    for _ in range(WARMUP_RUNS):
        engine.timed_run(inputs)
    runs = [engine.timed_run(inputs) for _ in range(TIMED_RUNS)]
    parts: dict[str, Any] = {}
    for part in ("h2d", "compute", "d2h", "enqueue", "total"):
        values = [getattr(run, part) for run in runs]
        parts[f"{part}_ms"] = {"p50": statistics.median(values), "p90": statistics.quantiles(values, n=10)[-1]}
    return {"batch": len(inputs[0]), "runs": TIMED_RUNS, "cuda_graph": True, **parts}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file of plain types: eight bytes of length, a JSON header, the arrays."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    dtypes = {"F32": "<f4", "U8": "u1", "I64": "<i8"}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[start:end], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def main() -> int:
    """Build beside the program's own file."""
    try:
        answer = build_and_check(Path(sys.argv[0]).resolve().parent)
    except BarEdgeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(answer, indent=1))
    if not answer["within"]:
        print(f"the engine computes something else: error {answer['error']}; it was removed", file=sys.stderr)
    return 0 if answer["within"] else 1


if __name__ == "__main__":
    sys.exit(main())
