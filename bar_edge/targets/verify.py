"""Checking an artifact folder: is it what was written, and does it compute what it should? Needs no torch."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file

from bar_edge.bench.runner import device as processor
from bar_edge.bench.runner.telling import end_with_parent, library_says
from bar_edge.errors import InputError
from bar_edge.files import file_hash, read_json
from bar_edge.records.tolerance import TOLERANCES
from bar_edge.targets.onnx.parity import cpu_session, difference, relative

MODEL, SAMPLES, MANIFEST = "model.onnx", "samples.safetensors", "manifest.json"
#: that ONNX's reference implementation runs, which is slow
REFERENCE_SAMPLES = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One question to an artifact and its answer."""

    name: str
    passed: bool
    detail: str


def verify_artifact(folder: Path, *, limit_s: float = 600.0) -> list[Check]:
    """Check an artifact's hashes, its description inside the model file, and parity on its samples.

    A file that was changed or is missing is a failed check, and so is one that does not end within limit_s: it runs in
    a process of its own, for it may be anybody's. Raises InputError if the folder is no artifact.
    """
    manifest = read_manifest(folder)
    checks = [_check_hash(folder / name, entry["sha256"]) for name, entry in manifest["files"].items()]
    if not all(check.passed for check in checks):
        return [
            *checks,
            Check(name="parity", passed=False, detail="not measured: these are not the files that were written"),
        ]
    try:
        checks.append(_check_description(folder, manifest))
        precision = file_precision(manifest)
        error, number = _sample_error_apart(folder, limit_s)
    except Exception as problem:  # runtime and file errors of many kinds: all mean that the artifact does not run
        said = f"{type(problem).__name__}: {library_says(problem)}"
        return [*checks, Check(name="parity", passed=False, detail=said)]
    tolerance = TOLERANCES[precision]
    notes = overflow_note(manifest, processor.device(with_gpu=False))
    detail = "; ".join([f"{error:.2e}, at most {tolerance:g}, on {number} samples", *notes])
    return [*checks, Check(name="parity", passed=error <= tolerance, detail=detail)]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read an artifact's manifest; raises InputError if the folder is no artifact of schema 1."""
    remedy = "name a folder that `bar-edge export` wrote"
    if not (folder / MANIFEST).is_file():
        raise InputError(f"an artifact folder with a {MANIFEST}", got=folder.name, remedy=remedy)
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    try:
        if manifest["schema"] != 1:
            raise ValueError(f"schema {manifest['schema']}")
        names = {name for name, entry in manifest["files"].items() if len(entry["sha256"]) == 64}
        if not {MODEL, SAMPLES} <= names or any(Path(name).name != name for name in manifest["files"]):
            raise ValueError(f"files {sorted(names)}")
        if manifest["precision"] not in TOLERANCES:
            raise ValueError(f"precision {manifest['precision']}")
        _ = [value["name"] for value in [*manifest["inputs"], *manifest["outputs"]]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError("a manifest of schema 1", got=f"{type(error).__name__}: {error}", remedy=remedy) from error
    return manifest


def overflow_note(manifest: dict[str, Any], device: Mapping[str, Any]) -> list[str]:
    """Say what an INT8 artifact with weights of eight bits meets on a device whose sums of products overflow.

    device: as the runner describes it. Nothing to say of other artifacts and devices.
    """
    recipe = (manifest.get("conversion") or {}).get("recipe") or {}
    eight = manifest.get("precision") == "int8" and recipe.get("weight_bits", 8) == 8
    if not eight or str(manifest.get("target")).startswith("trt") or not processor.overflows(device):
        return []
    return ["weights of eight bits on a CPU without VNNI and AMX: its sums of products overflow; export the file anew"]


def file_precision(manifest: dict[str, Any]) -> str:
    """Return the precision of the numbers in an artifact's file: with a hint, the runtime rounds what is in fp32."""
    return "fp32" if manifest.get("precision_hint") else str(manifest["precision"])


def sample_error(folder: Path, interface: dict[str, Any], precision: str) -> tuple[float, int]:
    """Run the model on the samples beside it; returns max|a-b| / max|a| against their expected outputs, and how many.

    No runtime here computes bf16: ONNX's reference implementation does, on the first samples.
    """
    tensors = load_file(folder / SAMPLES)
    if precision == "bf16":
        tensors = {name: array[:REFERENCE_SAMPLES] for name, array in tensors.items()}
    feed = {value["name"]: tensors[value["name"]] for value in interface["inputs"]}
    expected = [tensors[value["name"]] for value in interface["outputs"]]
    if precision == "bf16":
        got = list(ReferenceEvaluator(str(folder / MODEL)).run(None, feed))
    else:
        # what TensorRT computes is compared where it runs; here a file for it is computed as it stands there
        for_tensorrt = str(interface.get("target")).startswith("trt")
        got = cpu_session(folder / MODEL, as_written=precision == "int8" and for_tensorrt).run(None, feed)
    return relative(*difference(expected, got)), len(expected[0])


def _sample_error_apart(folder: Path, limit_s: float) -> tuple[float, int]:
    """Return `sample_error` of an artifact, found by a process that is ended with its time or with this one."""
    command = [sys.executable, "-P", "-m", __name__, str(folder.resolve())]
    roots = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, env={**os.environ, **roots}, capture_output=True, text=True, errors="replace", timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no outputs within {limit_s:g} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    error, number = json.loads(done.stdout.splitlines()[-1])
    return float(error), int(number)


def _check_hash(path: Path, expected: str) -> Check:
    if not path.is_file():
        return Check(name=f"hash of {path.name}", passed=False, detail="the file is missing")
    found = file_hash(path)
    detail = found[:12] if found == expected else f"{found[:12]}, the manifest says {expected[:12]}"
    return Check(name=f"hash of {path.name}", passed=found == expected, detail=detail)


def _check_description(folder: Path, manifest: dict[str, Any]) -> Check:
    """Compare what the manifest says with what the model file says about itself."""
    inside = {entry.key: entry.value for entry in onnx.load(folder / MODEL).metadata_props}
    pairs = {
        "plan": (manifest["plan"] or "", inside.get("plan", "")),
        "budget": (manifest["budget"] or "", inside.get("budget", "")),
        "classes": (manifest["classes"], json.loads(inside.get("classes", "[]"))),
    }
    wrong = [name for name, (said, found) in pairs.items() if said != found]
    detail = "as in the model file" if not wrong else f"{', '.join(wrong)} not as in the model file"
    return Check(name="description", passed=not wrong, detail=detail)


if __name__ == "__main__":
    end_with_parent()
    artifact = Path(sys.argv[1])
    found_manifest = read_manifest(artifact)
    print(json.dumps(sample_error(artifact, found_manifest, file_precision(found_manifest))))
