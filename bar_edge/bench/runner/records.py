"""What the parts of the runner hand one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Problem(Exception):
    """What is answered instead of a measurement; kind names a class of bar_edge.errors."""

    def __init__(self, kind: str, required: str, got: str, remedy: str = "") -> None:
        consequence = "nothing was measured"
        self.fields = {"kind": kind, "required": required, "got": got, "consequence": consequence, "remedy": remedy}
        super().__init__(required)


class Settings(NamedTuple):
    """How a file is run."""

    threads: int
    #: inputs per inference
    batch: int
    #: of the arithmetic where the file leaves it open: fp32 or bf16
    precision: str
    #: no other model runs in this process
    alone: bool
    #: where Python finds the modules of bar-edge that build and run an engine, for TensorRT
    modules: str = ""
    #: folder of the timing caches that the building of TensorRT's engines shares; empty for none
    caches: str = ""


class Loaded(NamedTuple):
    """A model file that is ready to run."""

    #: runs once on one array per input and returns the outputs, both in the file's order; the next run may
    #: overwrite what it returned
    run: Callable[[list[Any]], Sequence[Any]]
    #: (numpy dtype, shape) of each input; an axis of free size is a text or None
    inputs: list[tuple[str, list[Any]]]
    version: str
    #: of every run, in order: milliseconds by its parts; None where the runtime does not tell
    parts: list[Any] | None = None
    #: times its layers one by one: inputs -> milliseconds by a layer's name; None where the runtime cannot
    layers: Callable[[list[Any]], dict[str, float]] | None = None


class Runtime(NamedTuple):
    """One thing that runs model files."""

    name: str
    load: Callable[[Path, str, Settings], Loaded]
    #: that it can compute in where the file leaves it open
    precisions: tuple[str, ...]
    #: whether it runs on the GPU, of which the device then tells, too
    gpu: bool
    #: whether it builds an engine before the first run, which takes minutes
    builds: bool = False
    #: that must be here, and what installs it
    package: str = ""
    install: str = ""
    #: of ONNX Runtime, that must be here
    provider: str = ""
