"""What a bundle's build.pyz does on the device: build the engine, and let the runner compare and measure it.

    python3 build.pyz

Exit status 0: an engine with the right outputs; 1: an engine with wrong ones, which is removed; 2 and 3 as
everywhere. One JSON object on stdout. Needs Python 3.10, numpy, TensorRT's Python bindings.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bar_edge.errors import BarEdgeError, EnvironmentLacks
from bar_edge.targets.tensorrt.build import build
from bar_edge.targets.tensorrt.engine import manifest_path
from bar_edge.targets.tensorrt.options import EngineOptions

MODEL, ENGINE, SAMPLES, MANIFEST = "model.onnx", "model.engine", "samples.safetensors", "manifest.json"
BUILDER, RUNNER = "build.pyz", "run.pyz"
MEASURE_S = 1.0


def build_and_check(folder: Path) -> dict[str, Any]:
    """Build a bundle's engine, compare it on all samples and measure it at the best batch; a wrong one is removed.

    Returns the runner's answer (see bench/runner/), and the engine's manifest as `engine`.
    """
    bundle = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    settings = bundle["engine_options"]
    options = EngineOptions(**{**settings, "batch": tuple(settings["batch"]), "timing_caches": str(folder)})
    manifest = build(folder / MODEL, folder / ENGINE, options, rebuild="sh build.sh")
    right = False
    try:
        answer = measure(folder, bundle, options.batch[1])
        right = answer["models"][0]["parity"]["within"]
    finally:
        if not right:
            (folder / ENGINE).unlink()
            manifest_path(folder / ENGINE).unlink()
    return {**answer, "engine": manifest}


def measure(folder: Path, bundle: dict[str, Any], batch: int) -> dict[str, Any]:
    """Run the bundle's runner on its engine, in a process of its own; returns its answer."""
    file = {
        **{"name": folder.name, "path": str(folder / MODEL), "samples": str(folder / SAMPLES)},
        **{side: [value["name"] for value in bundle[side]] for side in ("inputs", "outputs")},
        "tolerance": bundle["parity"]["tolerance"],
    }
    request = {"runtime": "tensorrt", "precision": "fp32", "threads": 1, "batch": batch, "seed": 0}
    request |= {"seconds": MEASURE_S, "files": [file], "modules": str(folder / BUILDER)}
    command = [sys.executable, str(folder / RUNNER)]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        got = f"exit status {done.returncode}: {last[-300:]}"
        raise BarEdgeError("an engine that runs", got=got, consequence="the engine was removed") from error
    if "error" in answer:
        fields = answer["error"]
        kind = EnvironmentLacks if fields.pop("kind") == "EnvironmentLacks" else BarEdgeError
        raise kind(fields.pop("required"), **fields)
    return answer


def main() -> int:
    """Build beside the program's own file."""
    try:
        answer = build_and_check(Path(sys.argv[0]).resolve().parent)
    except BarEdgeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(answer, indent=1))
    parity = answer["models"][0]["parity"]
    if not parity["within"]:
        print(f"the engine computes something else: error {parity['error']}; it was removed", file=sys.stderr)
    return 0 if parity["within"] else 1


if __name__ == "__main__":
    sys.exit(main())
