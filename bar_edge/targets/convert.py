"""An artifact of ONNX in another precision, from one in float32."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import Tensor

from bar_edge.data import Split
from bar_edge.data.memory import RANDOM
from bar_edge.targets.artifact import convert_artifact
from bar_edge.targets.onnx.precision import to_half
from bar_edge.targets.row import Conversion
from bar_edge.targets.verify import read_manifest
from bar_edge_calibration.collect import random_images
from bar_edge_calibration.quantize import Promise, quantize
from bar_edge_calibration.recipe import Recipe

#: images that ranges are taken of
CALIBRATION_IMAGES = 512
BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """A data set as a file takes it in: batches of arrays that can be read again and again."""

    split: Split
    number: int
    #: from normalised images to what the file's input is
    as_input: Callable[[Tensor], Tensor]

    def __iter__(self) -> Iterator[np.ndarray]:
        left = self.number
        for images, _ in self.split.batches(BATCH, train=False, seed=0, epoch=0, device="cpu", augment="none"):
            yield self.as_input(images[:left]).numpy()
            left -= len(images)
            if left <= 0:
                return


def convert(asked: Conversion) -> dict[str, Any]:
    """Write an ONNX file in a precision, or as it is with a hint for a runtime that rounds by itself.

    Returns the manifest. Raises InputError for too few images.
    """
    target = str(read_manifest(asked.source)["target"])
    if asked.precision == "int8":
        return convert_to_int8(asked, asked.folder, target)
    half = asked.precision == "fp16"
    return convert_artifact(
        asked.source,
        asked.folder,
        target=target,
        precision=asked.precision,
        convert=_to_fp16 if half else _copy,
        hint=None if half else asked.precision,
    )


def convert_to_int8(asked: Conversion, folder: Path, target: str) -> dict[str, Any]:
    """Write an artifact whose file is in INT8, and return its manifest."""
    recipe, data = asked.recipe, asked.held_out.data
    assert recipe is not None, "INT8 is laid out by a recipe"

    def int8(model: Path, new: Path) -> dict[str, Any]:
        promise = None
        if asked.max_drop is not None:
            promise = Promise(score=asked.held_out.score, max_drop=asked.max_drop, finetune=asked.tuned)
        images = Images(split=data.fit, number=CALIBRATION_IMAGES, as_input=asked.held_out.as_input)
        record = quantize(model, new, images=images, data=data.name, recipe=recipe, promise=promise)
        if data.name == RANDOM:
            warning = "random images: the ranges mean nothing, the file is for measuring speed"
            record["warnings"] = [*record["warnings"], warning]
        return record

    return convert_artifact(asked.source, folder, target=target, precision="int8", convert=int8, own_outputs=True)


def for_speed(precision: str, recipe: Recipe | None) -> Callable[[Path], None] | None:
    """Return what turns a file in float32 into one of the precision, in place, for measuring its speed alone.

    recipe: of INT8.
    """
    if precision == "int8" and recipe is not None:
        return lambda file: to_int8_for_speed(file, file, recipe)
    return (lambda file: to_half(file, file, "fp16")) if precision == "fp16" else None


def to_int8_for_speed(source: Path, new: Path, recipe: Recipe) -> None:
    """Write a file in INT8 with the ranges of random images, for measuring its speed alone."""
    images = random_images(onnx.load(source), BATCH, 0)
    quantize(source, new, images=images, data="random", recipe=recipe)


def _copy(model: Path, new: Path) -> None:
    shutil.copyfile(model, new)


def _to_fp16(model: Path, new: Path) -> None:
    to_half(model, new, "fp16")
