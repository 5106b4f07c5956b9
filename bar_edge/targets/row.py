"""What a target is: a row of `targets.table.TARGETS`, and what is handed to it for writing an artifact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bar_edge.records.lowering import Lowering, Packing
from bar_edge.targets.tensorrt.options import EngineOptions
from bar_edge_calibration.recipe import Recipe

if TYPE_CHECKING:
    from bar_edge.network import Network
    from bar_edge.targets.target import HeldOut

#: in which precisions a file can be computed
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Forms:
    """Forms of the additions that are worth a try, the most promising first (docs/mixed_connectivity.md)."""

    candidates: tuple[Lowering, ...]
    #: of pixels; where there is none, few channels cost less than what packing adds
    packings: tuple[Packing, ...] = ()

    @staticmethod
    def of(*texts: str, packings: tuple[Packing, ...] = ()) -> Forms:
        """Read forms as on the command line."""
        return Forms(candidates=tuple(map(Lowering.parse, texts)), packings=packings)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What a target makes its artifact of."""

    #: the artifact in float32, and the folder that is written
    source: Path
    folder: Path
    precision: str
    #: of INT8, which is calibrated on training images, and held to max_drop points on the held-out ones
    recipe: Recipe | None
    held_out: HeldOut
    max_drop: float | None
    #: writes the float file anew for that, see `finetuned`
    tuned: Callable[[Path], None]
    #: where an engine is built, and how
    on: str
    engine: EngineOptions


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One thing that `export` writes."""

    name: str
    #: the model files of its artifact
    files: tuple[str, ...]
    precisions: tuple[str, ...]
    #: writes the artifact from one in float32, and returns its manifest
    convert: Callable[[Conversion], dict[str, Any]] | None = None
    #: writes the network itself instead, and returns the file
    write: Callable[[Network, Path], Path] | None = None
    #: that runs its file here; None where nothing here does
    runtime: str | None = None
    #: precision -> forms that are measured on its runtime
    forms: Mapping[str, Forms] = dataclasses.field(default_factory=dict)
    #: precision -> form where nothing can be measured
    unmeasured: Mapping[str, Lowering] = dataclasses.field(default_factory=dict)
    #: how INT8 can be laid out: what is measured where there is more than one
    recipes: tuple[str, ...] = ()
    #: precisions that the runtime computes in by itself, told by a hint: the file stays in fp32
    hinted: tuple[str, ...] = ()
    #: precisions of files that nothing here computes but ONNX's reference implementation, image by image
    unscored: tuple[str, ...] = ()
    #: images that an artifact carries
    samples: int = 8
    #: raises EnvironmentLacks where what writes it in a precision is not here
    needs: Callable[[str], object] | None = None
    #: whether it can be written on another device (`--on`)
    on_device: bool = False
