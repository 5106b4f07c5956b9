"""A pruned network as a file for a runtime: in the faster form, converted, compared, measured and scored."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bar_edge.data import DataSource
from bar_edge.lowering.lower import lower
from bar_edge.network import Network
from bar_edge.network.counted_cost import count_executed
from bar_edge.progress import Progress
from bar_edge.records.export_result import ExportResult
from bar_edge.records.verdict import Verdict, keeps_metric
from bar_edge.requests import ExportRequest
from bar_edge.runs.run_folder import Pruned
from bar_edge.runs.specs import SAMPLE_IMAGES, sample_images
from bar_edge.targets import target as targets
from bar_edge.targets.artifact import ArtifactSpec, write_artifact
from bar_edge.targets.form_search import Choice, choose_lowering
from bar_edge.targets.onnx.file import Preprocessing, parity_onnx
from bar_edge.targets.torch_source.source import write_torch_source
from bar_edge.training import Task
from bar_edge_calibration.recipe import Recipe, load_recipe

#: that an artifact carries
SAMPLES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Form:
    """How the file is laid out, and what was measured to choose that."""

    lowering: str
    recipe: Recipe | None
    choice: Choice | None


def export_network(
    pruned: Pruned,
    request: ExportRequest,
    folder: Path,
    *,
    source: DataSource,
    task: Task,
    progress: Progress | None = None,
) -> ExportResult:
    """Write the network as an artifact folder, compare it with torch on real images, and say whether it will do.

    source, task: for samples, INT8 ranges, and the metric. The verdict is no if the file computes something else (an
    earlier artifact then stays), if its target's runtime does, if `auto` finds the dense network faster, or if the
    metric drops by more than max_drop.
    """
    described = pruned.result.input
    preprocessing = Preprocessing(mean=described.mean, std=described.std)
    inside = preprocessing if request.with_preprocessing else None
    form = _form(pruned, request, inside, progress)
    mean, std = (torch.tensor(values)[:, None, None] for values in (described.mean, described.std))

    def as_input(images: Tensor) -> Tensor:
        return ((images * std + mean) * 255).round().to(torch.uint8) if request.with_preprocessing else images

    number = targets.BUNDLE_SAMPLES if request.target.startswith("trt") else SAMPLES
    images = as_input(sample_images(source, max(number, SAMPLE_IMAGES)))
    held_out = targets.HeldOut(data=source, task=task, structure=pruned.network.out_spec, as_input=as_input)
    spec = ArtifactSpec(
        preprocessing=preprocessing,
        with_preprocessing=request.with_preprocessing,
        classes=described.classes,
        budget=pruned.result.budget.text,
        plan=pruned.plan,
        lowering=form.lowering,
        choice=dataclasses.asdict(form.choice) if form.choice else None,
        target=request.target,
    )
    final = request.precision == "fp32" and request.target in targets.RUNTIMES
    lowered = lower(pruned.network, form.lowering)
    with tempfile.TemporaryDirectory() as scratch:
        first = folder if final else Path(scratch) / "fp32"
        manifest = write_artifact(lowered, first, samples=images[:number], spec=spec, reference=pruned.network)
        within, parity = bool(manifest["parity"]["within"]), manifest["parity"]["error"]
        if within:
            parity = parity_onnx(pruned.network, first / "model.onnx", images, preprocessing=inside)
            within = parity <= manifest["parity"]["tolerance"]
        if within and not final:
            manifest = targets.write_converted(
                first,
                folder,
                target=request.target,
                precision=request.precision,
                recipe=form.recipe,
                held_out=held_out,
                max_drop=request.max_drop,
                tuned=targets.finetuned(pruned.network, form.lowering, source, inside),
                on=request.on,
                engine=targets.engine_options(request.engine),
            )
        written = within and manifest["parity"]["within"] is not False
        if written:
            manifest = targets.prove(manifest, folder, first, held_out=held_out, threads=request.threads)
    verdict = _verdict(request, written, manifest, form.choice)
    executed = count_executed(lowered)
    return ExportResult(
        verdict=verdict.yes,
        artifact=str(folder),
        lowering=form.lowering,
        choice=manifest["choice"],
        parity={"sliced_vs_onnx": parity, "images": len(images), request.precision: manifest["parity"]["error"]},
        held_out=manifest.get("held_out"),
        settings=(manifest.get("conversion") or {}).get("settings"),
        speedup_over_fp32=manifest.get("speedup_over_fp32"),
        latency=manifest.get("latency"),
        warnings=tuple(_warnings(request, manifest, verdict)),
        volume_executed=executed.volume,
        flops_executed=executed.flops,
        bytes=(folder / "model.onnx").stat().st_size if written else None,
    )


def export_source(network: Network, folder: Path) -> dict[str, Any]:
    """Write the network as Python source (`--target torch`), which nothing here measures."""
    return {"verdict": True, "artifact": str(folder), "file": write_torch_source(network, folder).name}


def _form(pruned: Pruned, request: ExportRequest, inside: Preprocessing | None, progress: Progress | None) -> _Form:
    """Choose recipe and lowering: what is asked for, or the faster where that can be measured."""
    target, precision, lowering = request.target, request.precision, request.lowering
    recipe: Recipe | None = None
    if precision == "int8" and request.recipe == "auto":
        recipe = targets.faster_recipe(
            target,
            pruned.network,
            runtime=request.runtime,
            lowering="regular:16" if lowering == "auto" else lowering,
            threads=request.threads,
        )
    elif precision == "int8":
        recipe = load_recipe(request.recipe)
    if lowering == "auto" and target not in targets.RUNTIMES:
        lowering = targets.UNMEASURED[precision]
    if lowering != "auto":
        return _Form(lowering=lowering, recipe=recipe, choice=None)
    convert: Callable[[Path], None] | None = targets.for_speed(precision, recipe)
    choice = choose_lowering(
        pruned.network,
        pruned.dense,
        runtime=request.runtime or targets.RUNTIMES[target],
        precision=precision,
        threads=request.threads,
        seconds=request.choice_seconds,
        preprocessing=inside,
        convert=convert,
        progress=progress,
    )
    return _Form(lowering=choice.lowering, recipe=recipe, choice=choice)


def _verdict(request: ExportRequest, written: bool, manifest: dict[str, Any], choice: Choice | None) -> Verdict:
    scores = manifest.get("held_out")
    return Verdict(
        right=written and manifest["parity"]["within"] is not False,
        kept=keeps_metric(scores["drop_points"], request.max_drop) if scores is not None else None,
        faster=choice.faster if choice is not None else None,
    )


def _warnings(request: ExportRequest, manifest: dict[str, Any], verdict: Verdict) -> list[str]:
    scores, speed = manifest.get("held_out"), manifest.get("speedup_over_fp32")
    conversion = manifest.get("conversion") or {}
    found = [*conversion.get("warnings", ()), *manifest.get("tensorrt", {}).get("slow", ())]
    if scores is not None and verdict.kept is False:
        found.append(f"the metric dropped by {scores['drop_points']:.2f} points, by more than {request.max_drop:g}")
    if speed is not None and speed["high"] < 1:
        found.append(f"{1 / speed['speedup']:.2f} times slower than fp32 in the same form: ship --precision fp32")
    return found
