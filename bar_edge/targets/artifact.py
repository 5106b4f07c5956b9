"""The artifact folder: a model file with sample inputs, expected outputs and a manifest that proves them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from bar_edge.errors import InputError
from bar_edge.files import file_hash, write_json
from bar_edge.records import ChannelPlan
from bar_edge.records.tolerance import TOLERANCES
from bar_edge.targets.onnx.file import Preprocessing, export_onnx, torch_outputs
from bar_edge.targets.onnx.parity import cpu_session, difference, relative
from bar_edge.targets.verify import (
    MANIFEST,
    MODEL,
    SAMPLES,
    file_precision,
    read_manifest,
    sample_error,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactSpec:
    """What an artifact says about itself besides its weights."""

    #: what turns an image of values 0..255 into the network's input; None if nobody knows
    preprocessing: Preprocessing | None = None
    #: whether that happens inside the file, whose input is then uint8
    with_preprocessing: bool = False
    classes: tuple[str, ...] = ()
    #: the budget in the user's words, such as 16x
    budget: str | None = None
    plan: ChannelPlan | None = None
    #: form in which mixed additions run, and what was measured to choose it
    lowering: str = "slices"
    choice: dict[str, Any] | None = None
    target: str = "onnx"
    precision: str = "fp32"


def write_artifact(
    network: nn.Module,
    folder: Path,
    *,
    samples: Tensor | tuple[Tensor, ...],
    spec: ArtifactSpec,
    reference: nn.Module | None = None,
) -> dict[str, Any]:
    """Export `network` into `folder` and return the manifest, whose `parity` says whether that worked.

    samples: a few real inputs (N, ...), as the file takes them (uint8 images if spec.with_preprocessing).
    reference: the network whose outputs are the expected ones (the sliced network before lowering);
    default `network`. The folder is replaced whole, and only if the file computes what the reference
    computes (`manifest["parity"]["within"]`): otherwise it keeps what it held. Raises InputError if the
    network cannot be exported, or the folder is not an artifact or cannot be written.
    """
    if spec.with_preprocessing and spec.preprocessing is None:
        raise InputError(
            "the data set's mean and standard deviation", got="none", remedy="export without preprocessing"
        )
    inside = spec.preprocessing if spec.with_preprocessing else None
    inputs = samples if isinstance(samples, tuple) else (samples,)
    with replacing(folder) as temporary:
        shapes = tuple(tuple(x.shape[1:]) for x in inputs)
        export_onnx(network, shapes, temporary / MODEL, preprocessing=inside, metadata=_metadata(spec))
        expected = torch_outputs(reference or network, inputs, preprocessing=inside)
        interface = _interface(temporary / MODEL)
        names = [value["name"] for value in [*interface["inputs"], *interface["outputs"]]]
        arrays = [*(x.detach().cpu().numpy() for x in inputs), *expected]
        save_file(dict(zip(names, map(np.ascontiguousarray, arrays), strict=True)), temporary / SAMPLES)
        error, number = sample_error(temporary, interface, spec.precision)
        manifest = _manifest(temporary, spec, interface, parity_entry(error, spec.precision, number))
        write_json(temporary / MANIFEST, manifest)
        if not manifest["parity"]["within"]:
            shutil.rmtree(temporary)
    return manifest


def convert_artifact(
    source: Path,
    folder: Path,
    *,
    target: str,
    precision: str,
    convert: Callable[[Path, Path], dict[str, Any] | None],
    own_outputs: bool = False,
    hint: str | None = None,
) -> dict[str, Any]:
    """Write an artifact like another one, its model file converted to a precision, and return the manifest.

    convert: from the model file to the new one; what it returns stands in the manifest as `conversion`.
    own_outputs: the expected outputs are what the new file means, computed in float, so that every runtime can be
    compared with it; else they stay those of the network. hint: of the precision, to a runtime that
    rounds by itself what the file holds in float32. The folder is replaced whole, and only if
    the outputs are within tolerance. Raises what `convert` raises, and InputError as `write_artifact` does.
    """
    manifest = read_manifest(source)
    with replacing(folder) as temporary:
        record = convert(source / MODEL, temporary / MODEL)
        manifest |= {"target": target, "precision": precision, "precision_hint": hint, "conversion": record}
        tensors = load_file(source / SAMPLES)
        if own_outputs:
            inputs = {value["name"]: tensors[value["name"]] for value in manifest["inputs"]}
            names = [value["name"] for value in manifest["outputs"]]
            outputs = cpu_session(temporary / MODEL, as_written=True).run(None, inputs)
            off = relative(*difference([tensors[name] for name in names], outputs))
            manifest["difference_from_fp32"] = off if off < float("inf") else None
            tensors |= dict(zip(names, outputs, strict=True))
        save_file(tensors, temporary / SAMPLES)
        error, number = sample_error(temporary, manifest, file_precision(manifest))
        manifest |= {
            "files": {name: {"sha256": file_hash(temporary / name)} for name in (MODEL, SAMPLES)},
            "parity": parity_entry(error, precision, number),
        }
        write_json(temporary / MANIFEST, manifest)
        if not manifest["parity"]["within"]:
            shutil.rmtree(temporary)
    return manifest


def parity_entry(error: float, precision: str, samples: int) -> dict[str, Any]:
    """Return what a manifest says of the outputs on so many samples."""
    tolerance = TOLERANCES[precision]
    finite = error if error < float("inf") else None
    return {"error": finite, "tolerance": tolerance, "within": error <= tolerance, "samples": samples}


def plan_hash(plan: ChannelPlan) -> str:
    """Return the first 16 digits of the SHA-256 of a plan."""
    return hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ inside


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a new folder beside `folder`, which takes its place at the end unless it was removed."""
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            "a new folder, or an artifact to replace",
            got=f"{folder.name}, which holds something else",
            consequence="nothing was written",
            remedy="name another folder with --out",
        )
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    _sweep(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if temporary.exists():
            if folder.exists():
                folder.rename(old)
            try:
                temporary.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
    except OSError as error:
        raise InputError(
            f"a place to write the artifact {folder.name}",
            got=error.strerror or type(error).__name__,
            consequence="what was there is unchanged",
            remedy="name another folder with --out",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left beside a folder; what one of them had moved away comes back first."""
    if not folder.parent.is_dir():
        return
    left = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)\.(tmp|old)")
    for path in sorted(folder.parent.iterdir()):
        found = left.fullmatch(path.name)
        if found is None or _lives(int(found[1])):
            continue
        if found[2] == "old" and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    with contextlib.suppress(PermissionError):  # it lives, and is another user's
        try:
            os.kill(process, 0)
        except (ProcessLookupError, OverflowError):
            return False
    return True


def _metadata(spec: ArtifactSpec) -> dict[str, str]:
    """Return what travels inside the model file, all as text."""
    known = {
        "plan": plan_hash(spec.plan) if spec.plan else "",
        "budget": spec.budget or "",
        "classes": json.dumps(spec.classes) if spec.classes else "",
    }
    if spec.preprocessing is not None:
        known["mean"], known["std"] = json.dumps(spec.preprocessing.mean), json.dumps(spec.preprocessing.std)
        known["normalisation"] = "inside" if spec.with_preprocessing else "outside"
    return {name: text for name, text in known.items() if text}


def _interface(model: Path) -> dict[str, Any]:
    session = cpu_session(model)
    layouts = {4: "NCHW", 3: "NCL", 2: "NC"}

    def describe(value: Any) -> dict[str, Any]:
        return {"name": value.name, "dtype": _dtype(value.type), "shape": list(value.shape)}

    return {
        "inputs": [{**describe(v), "layout": layouts.get(len(v.shape), "N...")} for v in session.get_inputs()],
        "outputs": [describe(v) for v in session.get_outputs()],
    }


def _dtype(text: str) -> str:
    """Name a runtime's `tensor(float)` as numpy does."""
    name = text.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _manifest(folder: Path, spec: ArtifactSpec, interface: dict[str, Any], parity: dict[str, Any]) -> dict[str, Any]:
    normalisation = None
    if spec.preprocessing is not None:
        normalisation = {**dataclasses.asdict(spec.preprocessing), "inside": spec.with_preprocessing}
    return {
        "schema": 1,
        "target": spec.target,
        "precision": spec.precision,
        "precision_hint": None,
        "lowering": spec.lowering,
        "choice": spec.choice,
        "files": {name: {"sha256": file_hash(folder / name)} for name in (MODEL, SAMPLES)},
        **interface,
        "normalisation": normalisation,
        "classes": list(spec.classes),
        "budget": spec.budget,
        "plan": plan_hash(spec.plan) if spec.plan else None,
        "versions": {name: _version(name) for name in ("bar-edge", "torch", "onnx", "onnxruntime", "onnxsim")},
        "parity": parity,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return None
