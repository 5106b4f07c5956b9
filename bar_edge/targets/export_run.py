"""One pruned network as an artifact: the recipe and the form chosen, the file written, compared, judged."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bar_edge.data import DataSource
from bar_edge.lowering.lower import lower
from bar_edge.network import Network
from bar_edge.network.counted_cost import count_executed
from bar_edge.progress import Progress
from bar_edge.records import ChannelPlan
from bar_edge.records.export_result import ExportResult
from bar_edge.records.lowering import Lowering
from bar_edge.records.verdict import Verdict, keeps_metric
from bar_edge.targets import target as targets
from bar_edge.targets.artifact import ArtifactSpec, write_artifact
from bar_edge.targets.convert import for_speed
from bar_edge.targets.form_search import Choice, choose_lowering
from bar_edge.targets.onnx.file import Preprocessing, parity_onnx
from bar_edge.targets.onnx.target import ONNX
from bar_edge.targets.row import Conversion, Target
from bar_edge.targets.tensorrt.options import EngineOptions
from bar_edge.training import Task
from bar_edge_calibration.recipe import Recipe, load_recipe

#: how many times as fast as float32 INT8 must be beyond doubt
INT8_GAIN = 1.02


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is to be written, and what it is held to."""

    target: Target = ONNX
    precision: str = "fp32"
    #: of INT8
    recipe: str = "auto"
    #: of the additions; None for what is measured to be faster
    lowering: Lowering | None = None
    #: with which `auto` measures; None for the target's
    runtime: str | None = None
    threads: int = 1
    #: how long `auto` measures
    choice_seconds: float = 60.0
    #: whether the normalisation goes into the file
    with_preprocessing: bool = False
    #: of the metric on held-out training images against float32, in points
    max_drop: float | None = None
    #: where an engine is built, and how
    on: str = "local"
    engine: EngineOptions = EngineOptions()

    @property
    def measured_on(self) -> str:
        """The runtime with which `auto` measures."""
        return self.runtime or self.target.runtime or "onnxruntime-cpu"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exportable:
    """What a RUN knows of a network that is to be exported."""

    network: Network
    dense: Network
    plan: ChannelPlan
    budget: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    task: Task
    data: DataSource
    #: real images, normalised (N, C, H, W), at least as many as the artifact carries
    images: Tensor

    def as_input(self, wanted: Wanted, images: Tensor) -> Tensor:
        """Return normalised images as the file takes them."""
        if not wanted.with_preprocessing:
            return images
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.preprocessing.mean, self.preprocessing.std))
        return ((images * std + mean) * 255).round().to(torch.uint8)


def export_source(write: Callable[[Network, Path], Path], network: Network, folder: Path) -> dict[str, Any]:
    """Write a network itself, and return what `export_network` does of other targets."""
    return {"verdict": True, "artifact": str(folder), "file": write(network, folder).name}


def export_network(wanted: Wanted, pruned: Exportable, folder: Path, progress: Progress | None = None) -> ExportResult:
    """Write a network as an artifact folder, compare it with torch on real images, and return what was found.

    The verdict is no if the file computes something else (an earlier artifact then stays), if its target's runtime
    does, unless `auto` finds it faster than the dense network beyond doubt, if INT8 is not beyond doubt INT8_GAIN times
    as fast as float32, or if the metric drops by more than wanted.max_drop. Raises what
    `write_artifact`, `choose_lowering` and the target's conversion raise.
    """
    inside = pruned.preprocessing if wanted.with_preprocessing else None
    recipe = _recipe(wanted, pruned.network)
    lowering, choice = _lowering(wanted, pruned, recipe, inside, progress)
    spec = ArtifactSpec(
        preprocessing=pruned.preprocessing,
        with_preprocessing=wanted.with_preprocessing,
        classes=pruned.classes,
        budget=pruned.budget,
        plan=pruned.plan,
        lowering=str(lowering),
        choice=choice.to_json() if choice else None,
        target=wanted.target.name,
    )
    written = _written(wanted, pruned, folder, spec, lowering, recipe)
    executed = count_executed(lower(pruned.network, lowering))
    verdict = Verdict(
        right=written.stands,
        kept=written.kept,
        faster=not written.slow and (choice is None or choice.faster),
    )
    return ExportResult(
        verdict=verdict.yes,
        artifact=str(folder),
        lowering=str(lowering),
        choice=written.manifest["choice"],
        parity={
            "sliced_vs_onnx": written.parity,
            "images": len(pruned.images),
            wanted.precision: written.manifest["parity"]["error"],
        },
        held_out=written.manifest.get("held_out"),
        settings=(written.manifest.get("conversion") or {}).get("settings"),
        speedup_over_fp32=written.manifest.get("speedup_over_fp32"),
        latency=written.manifest.get("latency"),
        warnings=tuple(written.warnings()),
        volume_executed=executed.volume,
        flops_executed=executed.flops,
        bytes=(folder / "model.onnx").stat().st_size if written.there else None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Written:
    """What became of an artifact."""

    manifest: dict[str, Any]
    #: between the network and its file in float32, on all images
    parity: float
    #: whether a file was written
    there: bool
    max_drop: float | None

    @property
    def stands(self) -> bool:
        """Whether a file was written that computes what it should."""
        return self.there and self.manifest["parity"]["within"] is not False

    @property
    def kept(self) -> bool | None:
        """Whether the metric drops by no more than allowed; None where it was not computed."""
        scores = self.manifest.get("held_out")
        return None if scores is None else keeps_metric(scores["drop_points"], self.max_drop)

    @property
    def slow(self) -> bool:
        """Whether this is INT8 that is not beyond doubt faster than float32."""
        speed = self.manifest.get("speedup_over_fp32")
        return self.manifest["precision"] == "int8" and speed is not None and bool(speed["low"] < INT8_GAIN)

    def warnings(self) -> list[str]:
        """Name what speaks against the file."""
        found = [*(self.manifest.get("conversion") or {}).get("warnings", ())]
        found += self.manifest.get("tensorrt", {}).get("slow", ())
        parity = self.manifest["parity"]
        if parity["within"] is False:
            off = "not finite, or of another shape" if parity["error"] is None else f"off by {parity['error']:.1e}"
            found.append(f"the outputs are wrong ({off} of the largest, at most {parity['tolerance']:g})")
        if self.kept is False:
            drop = self.manifest["held_out"]["drop_points"]
            found.append(f"the metric dropped by {drop:.2f} points, by more than {self.max_drop:g}")
        speed = self.manifest.get("speedup_over_fp32")
        if speed is not None and self.slow:
            times = "{speedup:.2f} times as fast as fp32 in the same form (95 %: {low:.2f} to {high:.2f})"
            told = times.format(**speed)
            found.append(f"INT8 is {told}, not beyond doubt {INT8_GAIN} times: ship --precision fp32")
        elif speed is not None and speed["high"] < 1:
            slower = 1 / speed["speedup"]
            found.append(f"{slower:.2f} times slower than fp32 in the same form: ship --precision fp32")
        return found


def _recipe(wanted: Wanted, network: Network) -> Recipe | None:
    """Return how INT8 is laid out: as asked for, or as is measured to be faster here."""
    if wanted.precision != "int8":
        return None
    if wanted.recipe != "auto":
        return load_recipe(wanted.recipe)
    form = wanted.lowering or targets.MEASURED_IN
    return targets.faster_recipe(
        wanted.target, network, runtime=wanted.measured_on, lowering=form, threads=wanted.threads
    )


def _lowering(
    wanted: Wanted, pruned: Exportable, recipe: Recipe | None, inside: Preprocessing | None, progress: Progress | None
) -> tuple[Lowering, Choice | None]:
    """Return the form of the additions: as asked for, as measured, or the target's where nothing can be measured."""
    if wanted.lowering is not None:
        return wanted.lowering, None
    if wanted.target.runtime is None:
        return wanted.target.unmeasured[wanted.precision], None
    choice = choose_lowering(
        pruned.network,
        pruned.dense,
        runtime=wanted.measured_on,
        precision=wanted.precision,
        threads=wanted.threads,
        seconds=wanted.choice_seconds,
        preprocessing=inside,
        convert=for_speed(wanted.precision, recipe),
        progress=progress,
    )
    return choice.lowering, choice


def _held_out(wanted: Wanted, pruned: Exportable) -> targets.HeldOut:
    """Return what scores files: ONNX Runtime, but for a precision that the target's runtime is told by a hint."""
    as_written = wanted.precision == "int8" and wanted.target.runtime is None
    in_onnxruntime = partial(targets.in_onnxruntime, as_written=as_written)
    hinted = wanted.precision in wanted.target.hinted
    return targets.HeldOut(
        data=pruned.data,
        task=pruned.task,
        structure=pruned.network.out_spec,
        as_input=lambda images: pruned.as_input(wanted, images),
        source_in=in_onnxruntime,
        made_in=partial(targets.in_openvino, precision=wanted.precision) if hinted else in_onnxruntime,
    )


def _written(
    wanted: Wanted, pruned: Exportable, folder: Path, spec: ArtifactSpec, lowering: Lowering, recipe: Recipe | None
) -> _Written:
    """Write the file in float32, convert it, and prove what was written."""
    network, inside = pruned.network, pruned.preprocessing if wanted.with_preprocessing else None
    images = pruned.as_input(wanted, pruned.images)
    held_out = _held_out(wanted, pruned)
    final = wanted.precision == "fp32" and wanted.target.runtime is not None
    with tempfile.TemporaryDirectory() as scratch:
        first = folder if final else Path(scratch) / "fp32"
        lowered = lower(network, lowering)
        manifest = write_artifact(lowered, first, samples=images[: wanted.target.samples], spec=spec, reference=network)
        within, parity = bool(manifest["parity"]["within"]), manifest["parity"]["error"]
        if within:
            parity = parity_onnx(network, first / "model.onnx", images, preprocessing=inside)
            within = parity <= manifest["parity"]["tolerance"]
        if within and not final:
            assert wanted.target.convert is not None, "what writes the network itself comes not here"
            asked = Conversion(
                source=first,
                folder=folder,
                precision=wanted.precision,
                recipe=recipe,
                held_out=held_out,
                max_drop=wanted.max_drop,
                tuned=targets.finetuned(network, lowering, pruned.data, inside, recipe),
                on=wanted.on,
                engine=wanted.engine,
            )
            manifest = wanted.target.convert(asked)
        there = within and manifest["parity"]["within"] is not False
        if there:
            manifest = targets.prove(manifest, folder, first, held_out=held_out, threads=wanted.threads)
    return _Written(manifest=manifest, parity=parity, there=there, max_drop=wanted.max_drop)
