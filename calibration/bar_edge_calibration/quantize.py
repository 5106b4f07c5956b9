"""From a float ONNX file to an INT8 one whose accuracy was measured and is promised."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from bar_edge.errors import InputError
from bar_edge.records.verdict import keeps_metric
from bar_edge_calibration.collect import Calibration, check_file, collect
from bar_edge_calibration.equalise import equalise
from bar_edge_calibration.graph import Graph, prepare
from bar_edge_calibration.islands import float_islands
from bar_edge_calibration.place import place
from bar_edge_calibration.ranges import METHODS, Range
from bar_edge_calibration.recipe import Recipe
from bar_edge_calibration.session import cpu_options

#: images on which the sensitivity of layers is measured
SENSITIVITY_IMAGES = 256
#: at most this share of the layers is left in float
MAX_FLOAT_SHARE = 0.25
#: bits of weights -> where the file computes what it means
RIGHT_ON = {7: "every processor", 8: "processors that add products in 32 bits: x86 with VNNI or AMX, Arm, GPUs"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the ladder may change about a recipe's file."""

    ranges: str
    bias_correction: bool = False
    equalised: bool = False
    finetuned: bool = False
    #: names of layers
    float_layers: tuple[str, ...] = ()

    @property
    def network(self) -> str:
        """Return which of the equal networks is rounded."""
        return "finetuned" if self.finetuned else "equalised" if self.equalised else "given"

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON data."""
        return {**dataclasses.asdict(self), "float_layers": list(self.float_layers)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """How good the file must be."""

    #: metric of an ONNX file on held-out training images; higher is better, a fraction
    score: Callable[[Path], float]
    #: largest drop that is accepted, in points: hundredths of the metric
    max_drop: float
    #: writes the float file anew with weights that learned under rounding (see `finetune`): the last rung
    finetune: Callable[[Path], None] | None = None


def quantize(
    source: Path,
    target: Path,
    *,
    images: Iterable[np.ndarray],
    data: str,
    recipe: Recipe,
    seed: int = 0,
    promise: Promise | None = None,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Write an INT8 Q/DQ file of a float ONNX file, and return what was done as JSON data (schema 1).

    images: batches (N, ...) in shape and dtype of the file's input; with a promise they may be read again
    and must then be the same ones. data: their name, never a path; seed: that drew them. calibration: what
    `collect` found on this file, instead of a pass over the images. With a promise, rungs of a ladder are
    tried until the drop is small enough, each kept only if it helps; `record["score"]["within"]` is the
    verdict. The same inputs give the same bytes. Raises InputError as `collect` does, for images that can be
    read only once where they are needed twice, and for a calibration of another file.
    """
    if calibration is not None:
        check_file(calibration, source)
    if promise is not None and iter(images) is images:
        raise InputError(
            "images that can be read more than once, for a promised accuracy",
            got=type(images).__name__,
            consequence="nothing was quantised",
            remedy="give a list, or an object whose __iter__ starts anew",
        )
    as_convolution = recipe.batchnorm == "convolution"
    model = prepare(_load(source), batchnorm_as_convolution=as_convolution)
    if calibration is None:
        calibration = collect(source, model, images, data=data, seed=seed)
    candidate = target.with_name(f".{target.stem}.{os.getpid()}.candidate.onnx")
    ladder = _Ladder(source, candidate, model, calibration, recipe, images)
    try:
        found = ladder.climb(promise)
        ladder.write(found)
        islands = float_islands(candidate) if recipe.name.startswith("onnxruntime") else None
        candidate.replace(target)
    finally:
        candidate.unlink(missing_ok=True)
    return {
        "schema": 1,
        "recipe": dataclasses.asdict(recipe),
        "calibration": {
            "data": calibration.data,
            "images": calibration.images,
            "seed": calibration.seed,
            "onnx_sha256": calibration.onnx_sha256,
        },
        "right_on": RIGHT_ON[recipe.weight_bits],
        "settings": found.to_json(),
        "score": ladder.verdict(promise),
        "rungs": ladder.rungs,
        "sensitivity": ladder.sensitivity,
        "float_between_int8": islands,
        "warnings": calibration.warnings,
        "versions": {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
    }


class _Ladder:
    def __init__(
        self,
        source: Path,
        candidate: Path,
        model: onnx.ModelProto,
        calibration: Calibration,
        recipe: Recipe,
        images: Iterable[np.ndarray],
    ) -> None:
        self.source, self.candidate, self.recipe, self.images = source, candidate, recipe, images
        self.networks = {"given": (model, calibration)}  # with what was observed in each
        self.found_ranges: dict[tuple[str, str], dict[str, Range]] = {}
        self.best = Settings(ranges=recipe.ranges)
        self.best_score = -math.inf
        self.reference = math.nan
        self.rungs: list[dict[str, Any]] = []
        self.sensitivity: dict[str, float] | None = None

    def climb(self, promise: Promise | None) -> Settings:
        """Return the best settings, once they keep the promise or nothing is left to try."""
        if promise is None:
            return self.best
        self.reference = promise.score(self.source)
        tried = set[Settings]()
        for rung, settings in self._proposals(promise.finetune):
            if settings in tried:
                continue
            tried.add(settings)
            self.write(settings)
            score = promise.score(self.candidate)
            kept = score > self.best_score
            before, after = self.best.to_json(), settings.to_json()
            change = {name: value for name, value in after.items() if value != before[name]}
            self.rungs.append({"rung": rung, "change": change, "score": score, "kept": kept})
            if kept:
                self.best, self.best_score = settings, score
            if keeps_metric(100 * (self.reference - self.best_score), promise.max_drop):
                break
        return self.best

    def verdict(self, promise: Promise | None) -> dict[str, Any] | None:
        if promise is None:
            return None
        drop = 100 * (self.reference - self.best_score)
        return {
            "float": self.reference,
            "int8": self.best_score,
            "drop_points": drop,
            "max_drop": promise.max_drop,
            "within": keeps_metric(drop, promise.max_drop),
        }

    def write(self, settings: Settings) -> None:
        """Write the candidate that these settings give."""
        self.candidate.write_bytes(self._quantised(settings).SerializeToString(deterministic=True))

    def _proposals(self, finetune: Callable[[Path], None] | None) -> Iterator[tuple[str, Settings]]:
        """Yield (rung, settings), each a step from the best so far."""
        yield "recipe", self.best
        for method in METHODS:
            if method != self.recipe.ranges:
                yield "ranges", dataclasses.replace(self.best, ranges=method)
        yield "bias correction", dataclasses.replace(self.best, bias_correction=True)
        if self._equalise():
            yield "equalisation", dataclasses.replace(self.best, equalised=True)
            yield "equalisation", dataclasses.replace(self.best, equalised=True, bias_correction=True)
        self.sensitivity = self._sensitivity()
        by_sensitivity = sorted(self.sensitivity, key=lambda name: -(self.sensitivity or {})[name])
        for name in by_sensitivity[: max(1, int(MAX_FLOAT_SHARE * len(by_sensitivity)))]:
            yield "float layers", dataclasses.replace(self.best, float_layers=(*self.best.float_layers, name))
        if finetune is not None:
            self._finetune(finetune)
            tuned = dataclasses.replace(self.best, finetuned=True, equalised=False, bias_correction=False)
            yield "fine-tuning", dataclasses.replace(tuned, float_layers=())
            yield "fine-tuning", tuned

    def _quantised(self, settings: Settings) -> onnx.ModelProto:
        model, calibration = self.networks[settings.network]
        return place(
            model,
            self._ranges(settings),
            self.recipe,
            float_layers=frozenset(settings.float_layers),
            means=calibration.means if settings.bias_correction else None,
        )

    def _ranges(self, settings: Settings) -> dict[str, Range]:
        key = (settings.network, settings.ranges)
        if key not in self.found_ranges:
            self.found_ranges[key] = self.networks[settings.network][1].ranges(settings.ranges)
        return self.found_ranges[key]

    def _equalise(self) -> bool:
        equal, pairs = equalise(self.networks["given"][0])
        if pairs:
            self.networks["equalised"] = (equal, self._collect(equal))
        return bool(pairs)

    def _finetune(self, finetune: Callable[[Path], None]) -> None:
        finetune(self.candidate)
        tuned = prepare(_load(self.candidate), batchnorm_as_convolution=self.recipe.batchnorm == "convolution")
        self.networks["finetuned"] = (tuned, self._collect(tuned))

    def _collect(self, model: onnx.ModelProto) -> Calibration:
        given = self.networks["given"][1]
        return collect(self.source, model, self.images, data=given.data, seed=given.seed)

    def _sensitivity(self) -> dict[str, float]:
        """Return, per layer, the output's error in squares, relative, if this layer alone runs in INT8."""
        model, _ = self.networks[self.best.network]
        ranges, graph = self._ranges(self.best), Graph(model)
        layers = [node.name for node in graph.nodes if graph.is_layer(node)]
        sample = list(_first(self.images, SENSITIVITY_IMAGES))
        expected = _outputs(model, sample)
        found = {}
        for name in layers:
            others = frozenset(layers) - {name}
            got = _outputs(place(model, ranges, self.recipe, float_layers=others), sample)
            errors = [float(np.square(a - b).sum() / np.square(a).sum()) for a, b in zip(expected, got, strict=True)]
            found[name] = max(errors)
        return found


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's errors share no base class
        got = f"{path.name}: {type(error).__name__}"
        raise InputError("an ONNX file", got=got, consequence="nothing was quantised") from error


def _first(batches: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yield the first batches that hold so many images."""
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch)
        if seen >= count:
            return


def _outputs(model: onnx.ModelProto, batches: list[np.ndarray]) -> list[np.ndarray]:
    """Return what a model means, in float64, over all batches: no integers are multiplied."""
    options = cpu_options(as_written=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    runs = [session.run(None, {name: batch}) for batch in batches]
    return [np.concatenate(parts).astype(np.float64) for parts in zip(*runs, strict=True)]
