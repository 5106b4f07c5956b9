"""How an artifact is proved: measured in its target's runtime, scored on held-out images, beside float32."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bar_edge.bench import bench_onnx, compare
from bar_edge.bench.runner.on_openvino import load_openvino_cpu
from bar_edge.bench.runner.records import Settings
from bar_edge.data import DataSource
from bar_edge.data.memory import RANDOM
from bar_edge.files import write_json
from bar_edge.lowering.lower import folded, lower
from bar_edge.network import Network
from bar_edge.network.network import unflatten
from bar_edge.records.lowering import Lowering
from bar_edge.targets.convert import BATCH, to_int8_for_speed
from bar_edge.targets.measured import latency_of, parity_of
from bar_edge.targets.onnx.file import Preprocessing, export_onnx
from bar_edge.targets.onnx.parity import cpu_session
from bar_edge.targets.row import Target
from bar_edge.targets.table import TARGETS
from bar_edge.targets.verify import MANIFEST, MODEL
from bar_edge.training import Task, evaluate
from bar_edge_calibration.finetune import finetune
from bar_edge_calibration.recipe import Recipe, load_recipe

#: how long each file is measured to choose a recipe, in seconds
RECIPE_S = 0.5
#: batches of the last rung
FINETUNE_STEPS = 200
#: answers for a batch of what a file takes in
Run = Callable[[np.ndarray], Sequence[np.ndarray]]
#: in which form recipes are measured
MEASURED_IN = Lowering.parse("regular:16")


def faster_recipe(target: Target, network: Network, *, runtime: str, lowering: Lowering, threads: int) -> Recipe:
    """Return the recipe of a target by which a network in INT8 runs faster on a runtime here.

    lowering: of the files that are measured, in turn. The first recipe unless another is faster beyond doubt.
    """
    best, *others = map(load_recipe, target.recipes)
    with tempfile.TemporaryDirectory() as scratch:
        source, file, other = (Path(scratch) / f"{name}.onnx" for name in ("source", "best", "other"))
        if others:
            export_onnx(lower(network, lowering), network.input_shapes, source)
        for recipe in others:
            for path, by in ((file, best), (other, recipe)):
                to_int8_for_speed(source, path, by)
            if file.read_bytes() != other.read_bytes():
                found = bench_onnx([file, other], runtime=runtime, threads=threads, seconds=RECIPE_S)
                best = recipe if compare(found[1], found[0]).low > 1 else best
    return best


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The metric of ONNX files on held-out training images."""

    data: DataSource
    task: Task
    #: of the network's outputs
    structure: Any
    #: from normalised images to what the file's input is
    as_input: Callable[[Tensor], Tensor]
    #: loads a file in float32, and what was made of it
    source_in: Callable[[Path], Run]
    made_in: Callable[[Path], Run]

    def score(self, model: Path) -> float:
        """Return the metric of a file that was made of the one in float32; higher is better."""
        return self._metric(self.made_in(model))

    def compare(self, source: Path, model: Path, precision: str) -> dict[str, float]:
        """Return the metric of a file in float32 and of what was made of it, and the drop in points."""
        before, after = self._metric(self.source_in(source)), self.score(model)
        sign = 1 if self.task.higher_is_better else -1
        return {"fp32": sign * before, precision: sign * after, "drop_points": 100 * (before - after)}

    def _metric(self, run: Run) -> float:
        module = _Session(run, self.structure, self.as_input)
        metric = evaluate(module, self.data.held_out, self.task, batch=256, device="cpu", precision="fp32")
        return metric if self.task.higher_is_better else -metric


def prove(manifest: dict[str, Any], folder: Path, source: Path, *, held_out: HeldOut, threads: int) -> dict[str, Any]:
    """Compare an artifact in its target's runtime, and measure and score it beside the one in float32 it was made of.

    Returns the manifest with `parity`, `latency`, `speedup_over_fp32` and `held_out`, as far as a runtime here runs
    the file and images mean something; it stands in the folder, too.
    """
    target, precision, made = TARGETS[manifest["target"]], manifest["precision"], folder != source
    if target.runtime is not None:
        # a file of another recipe may kill a runtime: that is a process of its own
        found = bench_onnx([folder, source] if made else [folder], runtime=target.runtime, threads=threads, seconds=1.0)
        comparison = compare(found[0], found[1]) if made else None
        manifest |= {"parity": parity_of(found[0]), "latency": latency_of(folder, found[0], comparison)}
        if comparison is not None:
            manifest["speedup_over_fp32"] = {name: getattr(comparison, name) for name in ("speedup", "low", "high")}
    if made and held_out.data.name != RANDOM and precision not in target.unscored:
        manifest["held_out"] = held_out.compare(source / MODEL, folder / MODEL, precision)
    write_json(folder / MANIFEST, manifest)
    return manifest


def finetuned(
    network: Network, lowering: Lowering, data: DataSource, preprocessing: Preprocessing | None, recipe: Recipe | None
) -> Callable[[Path], None]:
    """Return what writes a network's float file anew, with weights that learned under rounding on training images."""

    def write(file: Path) -> None:
        assert recipe is not None, "INT8 is laid out by a recipe"
        batches = data.fit.batches(BATCH, train=True, seed=0, epoch=0, device="cpu", augment="none")
        images = (images for images, _ in itertools.islice(batches, FINETUNE_STEPS))
        learned = finetune(folded(network), images, weight_bits=recipe.weight_bits)
        export_onnx(lower(learned, lowering), network.input_shapes, file, preprocessing=preprocessing)

    return write


def in_onnxruntime(model: Path, *, as_written: bool = False) -> Run:
    """Load a file in ONNX Runtime; as_written: compute what it means, where the runtime that it is for is not here."""
    session = cpu_session(model, as_written=as_written)
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def in_openvino(model: Path, *, precision: str) -> Run:
    """Load a file in OpenVINO with a hint of the precision, to run as it is measured: an image at a time."""
    loaded = load_openvino_cpu(model, model.name, Settings(1, 1, precision, alone=True))

    def run(images: np.ndarray) -> Sequence[np.ndarray]:
        each = [[output.copy() for output in loaded.run([image[None]])] for image in images]
        return [np.concatenate(outputs) for outputs in zip(*each, strict=True)]

    return run


class _Session(nn.Module):
    """A file in a runtime as a module, on the CPU."""

    def __init__(self, run: Run, structure: Any, as_input: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run, self.structure, self.as_input = run, structure, as_input

    def forward(self, images: Tensor) -> Any:
        outputs = self.run(self.as_input(images).numpy())
        return unflatten(tuple(map(torch.from_numpy, outputs)), self.structure)
