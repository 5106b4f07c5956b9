"""What a command is asked for: one frozen record each, whose fields are its options on the command line.

What a record alone can tell is checked when it is made; what depends on targets, runtimes and files,
`bar_edge.runs.door` checks before anything is loaded, traced or trained.
"""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bar_edge.config import (
    MOST_THREADS,
    PRESETS,
    BarConfig,
    DistillConfig,
    MagnitudeConfig,
    SlimmingConfig,
    TrainConfig,
    above,
    at_least,
    at_most,
    build,
    overlay,
)
from bar_edge.errors import InputError
from bar_edge.records import Budget


def _option(default: Any, text: str, metavar: str = "NAME") -> Any:
    """Return a field that is an option, with its help text."""
    return dataclasses.field(default=default, metadata={"help": text, "metavar": metavar})


#: help texts of options that several requests have
_THREADS = "Threads of the runtime."
_ON = (
    "local, or ssh://[user@]host[:port]: a device with Python 3.8 and the runtime; "
    "a path behind it names the Python there."
)


def _check_drop(points: float | None) -> None:
    if points is not None and not math.isfinite(points):
        raise InputError("max_drop: a number of percentage points", got=repr(points), consequence="nothing was started")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PruneRequest:
    """One `prune`: model, data, budget, method and all that training needs."""

    model: str = dataclasses.field(
        metadata={
            "metavar": "SPEC",
            "help": "A name of the zoo (resnet20, wrn-28-12, resnet50, vgg16, mobilenetv2 and others), "
            "package.module:factory, file.py:factory, hf:NAME, timm:NAME, or a folder that bar-edge wrote.",
        }
    )
    data: str = _option(
        "digits",
        "digits, a folder (Parquet, class folders, the CIFAR files), hf:NAME, or package.module:factory.",
        "SPEC",
    )
    budget: str = _option(
        "8x",
        "16x or 6.25% (of the activation volume), 16x:flops, 25%:params, 194560act, 50MFLOPs, 1.2Mparams, or 8ms by "
        "--table.",
        "B",
    )
    method: str = _option("bar", "{methods}.")
    preset: Literal["default", "paper"] = _option("default", "default, or paper for the published constants.")
    model_arg: tuple[str, ...] = _option((), "An argument of the model's factory; repeat.", "KEY=VALUE")
    weights: str | None = _option(None, "Trained weights, safetensors or a checkpoint: skips dense.", "FILE")
    teacher: str | None = _option(None, "Weights to learn from; without it, those of the dense network.", "FILE")
    table: str | None = _option(None, "Latency table of `bar-edge profile`, for a budget in ms.", "FILE")
    task: str = _option("classification", "classification, segmentation, or package.module:Task.", "SPEC")
    seed: int = _option(0, "Seed of everything that is drawn.", "N")
    max_drop: float | None = _option(
        None, "The verdict is no if the metric drops by more, in percentage points.", "POINTS"
    )
    keep: tuple[str, ...] = _option(
        (),
        "Layers that are not pruned (head.*), or that keep at least N channels (stages.0.*=8); repeat.",
        "PATTERN[=N]",
    )
    round_to: int = _option(1, "Widths end as multiples of N.", "N")
    train: TrainConfig = TrainConfig()
    distill: DistillConfig = DistillConfig()
    bar: BarConfig = BarConfig()
    magnitude: MagnitudeConfig = MagnitudeConfig()
    slimming: SlimmingConfig = SlimmingConfig()

    def __post_init__(self) -> None:
        """Raise InputError for widths that are multiples of nothing, and for a text that is no budget."""
        at_least(self, 1, "round_to")
        at_least(self, 0, "seed")
        at_most(self, 2**63 - 1, "seed")
        _check_drop(self.max_drop)
        Budget.parse(self.budget)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportRequest:
    """One `export` of a RUN's network."""

    target: str = _option("onnx", "What to write: onnx, openvino, trt (an engine), trt-bundle, torch (model.py).")
    precision: str = _option("fp32", "What the file is computed in: fp32, fp16, bf16 (trt, openvino) or int8.")
    recipe: str = _option(
        "auto",
        "How INT8 is laid out: auto (measured here); for onnx also onnxruntime-cpu, and onnxruntime-amx for CPUs "
        "with AMX.",
    )
    lowering: str = _option(
        "auto",
        "How additions run: auto (measured here), paper, or slices, pad, gather, scatter, pointwise, deferred, "
        "blocks, zero-filled, regular, with widths rounded up as in slices:4 or slices:4-16, and blocks of pixels as "
        "channels as in slices:4@2x2; one for all streams, or one each with commas.",
    )
    runtime: str | None = _option(None, "What --lowering auto measures on; the target's by default.")
    threads: int = _option(1, _THREADS, "N")
    choice_seconds: float = _option(60.0, "How long --lowering auto may measure.", "S")
    with_preprocessing: bool = _option(False, "Put the normalisation into the graph, which then takes uint8.")
    data: str | None = _option(
        None, "Images for samples and INT8 ranges, as for prune: by default the run's own; random for none.", "SPEC"
    )
    task: str | None = _option(None, "The run's own task, where it is code: package.module:Task.", "SPEC")
    max_drop: float | None = _option(
        None, "The verdict is no if the metric drops by more against fp32, in percentage points.", "POINTS"
    )
    on: str = _option("local", _ON, "WHERE")
    engine: tuple[str, ...] = _option(
        (),
        "Of a TensorRT engine: batch=1,4,8 (smallest, best, largest), dla_core, workspace_mib, "
        "optimization_level, tf32, hardware, version_compatible; repeat.",
        "NAME=VALUE",
    )

    def __post_init__(self) -> None:
        """Raise InputError for numbers with which nothing can be measured."""
        at_most(self, MOST_THREADS, "threads")
        at_least(self, 1, "threads")
        at_least(self, 0, "choice_seconds")
        _check_drop(self.max_drop)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BenchRequest:
    """One `bench` of an artifact or ONNX file."""

    runtime: str | None = _option(
        None,
        "What runs the file: onnxruntime-cpu, -cuda or -tensorrt, openvino-cpu, or tensorrt, which takes the "
        "artifact's engine, or builds one. Default: the target's, else onnxruntime-cpu.",
    )
    precision: str | None = _option(
        None,
        "What the runtime computes in: fp32; openvino-cpu also bf16; onnxruntime-tensorrt as the file. "
        "Default: as the artifact was exported for, else fp32.",
    )
    threads: int = _option(1, _THREADS, "N")
    batch: int = _option(1, "Inputs per inference.", "N")
    seconds: float = _option(3.0, "How long to measure.", "S")
    budget: str | None = _option(None, "Judge the median by this, e.g. 8ms.", "MS")
    against: Path | None = _option(
        None,
        "Give the ratio to another artifact or ONNX file, measured in turn with it, or to an older measurement "
        "(its bench-*.json).",
        "OTHER",
    )
    on: str = _option("local", _ON, "WHERE")

    def __post_init__(self) -> None:
        """Raise InputError for numbers with which nothing can be measured, or a budget that is no time."""
        at_most(self, MOST_THREADS, "threads")
        at_least(self, 1, "threads", "batch")
        above(self, 0, "seconds")
        if self.budget is not None and not Budget.parse(self.budget).cost.of_device:
            raise InputError(
                "a budget in milliseconds, such as 8ms", got=self.budget, consequence="nothing was measured"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeployRequest:
    """One `deploy`: prune, export and bench."""

    prune: PruneRequest
    export: ExportRequest = ExportRequest()
    bench: BenchRequest = BenchRequest()

    @property
    def in_ms(self) -> bool:
        """Whether it is trained for a budget in ms, which a measurement then has to meet."""
        return Budget.parse(self.prune.budget).cost.of_device

    @classmethod
    def joined(cls, prune: PruneRequest, options: Mapping[str, Any]) -> DeployRequest:
        """Return the three requests of one set of options.

        options: fields of ExportRequest and BenchRequest; what both have holds for both, but `precision`, which is
        the file's, and `on`, where only an engine is built. The file is held to the run's max_drop, and made with
        its data. `bench_batch` is the batch of BenchRequest, whose own name is training's.
        """
        here = options.get("target", "onnx") != "trt"
        export = {name: options[name] for name in fields(ExportRequest) if name in options}
        export |= {"max_drop": prune.max_drop} | ({"on": "local"} if here else {})
        bench = {name: options[name] for name in fields(BenchRequest) if name in options and name != "precision"}
        if "bench_batch" in options:
            bench["batch"] = options["bench_batch"]
        return cls(prune=prune, export=ExportRequest(**export), bench=BenchRequest(**bench))


def anchored(request: PruneRequest, folder: Path) -> PruneRequest:
    """Return the request as a RUN folder keeps it: files and folders by their way from there."""
    named = {name: getattr(request, name) for name in _PATHS}
    paths: dict[str, Any] = {name: os.path.relpath(value, folder) for name, value in named.items() if _is_path(value)}
    return dataclasses.replace(request, **paths)


def located(stored: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the content of a RUN's config.toml with files and folders by their way from the working directory.

    What is not there stays as it is: older runs kept the way from where they were started.
    """
    named = {name: os.path.join(folder, str(stored[name])) for name in _PATHS if stored.get(name)}
    return {**stored, **{name: os.path.relpath(path) for name, path in named.items() if _is_path(path)}}


def _is_path(value: str | None) -> bool:
    return bool(value) and value != "digits" and Path(str(value)).exists()


#: options that may name a file or folder
_PATHS = ("model", "data", "weights", "teacher", "table")


def names_code(spec: object) -> bool:
    """Tell whether a model, data or task SPEC names code that is imported: package.module:name or file.py:name."""
    return isinstance(spec, str) and ":" in spec and not spec.startswith(("hf:", "timm:")) and not Path(spec).is_dir()


def check_trusted(stored: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Raise InputError if a stored run names code that the command line does not name too.

    stored: content of a RUN's config.toml; said: what stands on the command line.
    """
    for option in ("model", "data", "task"):
        if names_code(stored.get(option)) and option not in said:
            raise _untrusted(option, str(stored[option]))
    remote = [text for text in stored.get("model_arg", ()) if str(text).startswith("trust_remote_code")]
    if remote and "model_arg" not in said:
        raise _untrusted("model-arg", str(remote[0]))


def _untrusted(option: str, value: str) -> InputError:
    return InputError(
        f"--{option} on the command line, or --trust-run: the stored run names code",
        got=f"{option} = {value}",
        consequence="nothing was imported and nothing was started",
        remedy=f"read that code, then give --{option} {value} or --trust-run",
    )


def fields(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of a request that are options, by name."""
    return {field.name: field for field in dataclasses.fields(kind) if "help" in field.metadata}


def prune_request(values: Mapping[str, Any]) -> PruneRequest:
    """Build a PruneRequest from nested TOML data over its preset over the defaults.

    Raises InputError for an unknown key, a wrong type, a value out of range or a missing model.
    """
    if "model" not in values:
        raise InputError("a model: --model SPEC, or `model` in the TOML file", got="none", remedy="name one")
    preset = PRESETS.get(str(values.get("preset", "default")), {})
    return typing.cast(PruneRequest, build(PruneRequest, overlay(preset, values), ""))
