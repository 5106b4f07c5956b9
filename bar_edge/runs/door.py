"""The door: what a request asks for is checked here, before a model is built, data is read or anything is trained."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnxruntime

from bar_edge.bench import RUNTIMES
from bar_edge.bench.ssh import Target
from bar_edge.config import read_toml
from bar_edge.data import check_data
from bar_edge.data.augment import parse as parse_augmentation
from bar_edge.data.memory import RANDOM
from bar_edge.errors import EnvironmentLacks, InputError
from bar_edge.methods.method import find_method
from bar_edge.models.zoo import check_model
from bar_edge.network import is_network_folder
from bar_edge.records import Budget
from bar_edge.records.latency_table import LatencyTable
from bar_edge.records.lowering import Lowering
from bar_edge.requests import (
    BenchRequest,
    DeployRequest,
    ExportRequest,
    PruneRequest,
    check_trusted,
    located,
    prune_request,
)
from bar_edge.targets.table import TARGETS, check_target, runtime_of
from bar_edge.targets.tensorrt.bindings import import_tensorrt
from bar_edge.targets.tensorrt.target import engine_options
from bar_edge.training import check_task, choose_device

TENSORRT = "tensorrt"
_NOTHING = "nothing was started"


def check_prune(request: PruneRequest, out: Path, *, resume: bool) -> None:
    """Raise InputError or EnvironmentLacks for what `prune` could not do; the folder must be free, or resumed."""
    find_method(request.method)
    check_spec(request.model, request.model_arg)
    check_data(request.data)
    check_task(request.task)
    parse_augmentation(request.train.augment, ())
    choose_device(request.train.device)
    for option in ("weights", "teacher", "table"):
        named = getattr(request, option)
        check_file(Path(named) if named is not None else None, option)
    if request.table is not None:
        LatencyTable.load(Path(request.table))
    check_folder(out, resume)


def check_export(request: ExportRequest) -> None:
    """Raise InputError or EnvironmentLacks for what `export` could not do, whatever the run."""
    check_target(request.target, request.precision, request.recipe, request.on, request.max_drop)
    engine_options(request.engine)
    check_lowering(request.lowering)
    check_place(request.on)
    if request.runtime is not None:
        # where nothing is measured to choose, it need not be here
        check_runtime(request.runtime, "local" if runtime_of(request.target) else "")
    if request.data == RANDOM and request.max_drop is not None:
        raise InputError("--data with labels for --max-drop", got=RANDOM, consequence="nothing was written")
    if request.data is not None and request.data != RANDOM:
        check_data(request.data)


def stored_request(run: Path, request: ExportRequest, *, trust: bool) -> PruneRequest:
    """Return what a RUN was asked for, with the data and the task of the request where it names them.

    Raises InputError unless the folder is a RUN, and for code that only its config.toml names: a stored run is data.
    The task is looked at only where a metric is computed.
    """
    file = run / "config.toml"
    if not file.is_file():
        raise InputError(
            "a RUN folder that prune has finished",
            got=f"{run.name} without config.toml",
            remedy="give the folder of `bar-edge prune --out`",
        )
    stored = located(read_toml(file), run)
    given = {name: getattr(request, name) for name in ("data", "task") if getattr(request, name) is not None}
    unused = {"model", "model_arg"} | (set() if computes_metric(request) else {"task"})
    if request.target == "torch":
        unused.add("data")
    if not trust:
        check_trusted({name: value for name, value in stored.items() if name not in unused}, given)
    return prune_request({**stored, **given})


def computes_metric(request: ExportRequest) -> bool:
    """Tell whether the file is scored on images: all but those in float32, of random images, and without a runtime."""
    final = request.precision == "fp32" and runtime_of(request.target) is not None
    return not final and request.data != RANDOM and request.precision not in TARGETS[request.target].unscored


def check_bench(request: BenchRequest, runtime: str) -> None:
    """Raise InputError or EnvironmentLacks for what `bench` could not do; runtime: the one that it is to be."""
    check_place(request.on)
    check_runtime(runtime, request.on)
    if request.precision is not None and request.precision not in RUNTIMES[runtime].precisions:
        known = ", ".join(RUNTIMES[runtime].precisions)
        raise InputError(
            f"for {runtime} a precision out of: {known}", got=request.precision, consequence="nothing was measured"
        )
    check_file(request.against, "against")


def check_deploy(request: DeployRequest, out: Path, *, resume: bool) -> None:
    """Raise InputError or EnvironmentLacks for what any part of `deploy` could not do."""
    if request.export.target == "torch":
        raise InputError(
            "a target whose file a runtime measures",
            got="torch",
            consequence=_NOTHING,
            remedy="use `bar-edge prune`, then `bar-edge export --target torch`",
        )
    check_export(request.export)
    check_bench(request.bench, request.bench.runtime or judge(request.export.target))
    check_prune(request.prune, out, resume=resume)
    if request.in_ms and request.bench.budget is not None:
        raise InputError("one budget in ms", got=f"{request.prune.budget} and {request.bench.budget}")
    if request.in_ms and request.prune.table is not None:
        check_priced(request.export.lowering, Path(request.prune.table))


def check_profile(runtime: str, lowering: str, on: str, threads: int) -> None:
    """Raise InputError or EnvironmentLacks for what `profile` could not do."""
    check_lowering(lowering)
    check_place(on)
    check_runtime(runtime, on)
    if threads < 1:
        raise InputError("threads: a number of at least 1", got=str(threads), consequence="nothing was measured")


def judge(target: str) -> str:
    """Return the runtime that measures a target's file: its own, ONNX Runtime for a file of no target."""
    return TENSORRT if target.startswith("trt") else runtime_of(target) or "onnxruntime-cpu"


def check_spec(model: str, model_args: tuple[str, ...]) -> None:
    """Raise InputError unless a model SPEC names something that may exist; the user's own code is not imported."""
    if not any(map(is_network_folder, (Path(model), Path(model) / "network"))):
        check_model(model, model_args)


def check_file(path: Path | None, option: str) -> None:
    """Raise InputError for an option that names a file or folder that is not there."""
    if path is not None and not path.exists():
        raise InputError(f"a file for --{option}", got=f"{path.name}, which is not there", consequence=_NOTHING)


def check_lowering(text: str) -> None:
    """Raise InputError unless a lowering is auto, paper or forms."""
    Lowering.parse_or_auto(text)


def check_place(on: str) -> None:
    """Raise InputError unless `--on` names this machine or a device."""
    if on != "local":
        Target.parse(on)


def check_runtime(runtime: str, on: str) -> None:
    """Raise InputError for an unknown runtime, EnvironmentLacks for one whose package is missing here."""
    if runtime not in RUNTIMES:
        raise InputError(f"a runtime out of: {', '.join(RUNTIMES)}", got=runtime, consequence="nothing was measured")
    if on != "local":
        return
    if runtime == TENSORRT:
        import_tensorrt()
    row = RUNTIMES[runtime]
    if row.package and importlib.util.find_spec(row.package) is None:
        remedy = f"pip install {row.install or row.package}"
        raise EnvironmentLacks(f"the package {row.package}", got="it is not installed", remedy=remedy)
    if row.provider and row.provider not in onnxruntime.get_available_providers():
        raise EnvironmentLacks(
            f"ONNX Runtime with its {row.provider}",
            got=", ".join(onnxruntime.get_available_providers()),
            consequence=_NOTHING,
            remedy="pip install onnxruntime-gpu in place of onnxruntime",
        )


def check_priced(lowering: str, table: Path) -> None:
    """Raise InputError for a lowering that a table of latencies has no prices for."""
    priced = str(LatencyTable.load(table).lowering)
    if lowering not in ("auto", priced):
        raise InputError(
            f"--lowering {priced}, which the table prices",
            got=lowering,
            consequence=_NOTHING,
            remedy="omit it, or `bar-edge profile` with that lowering",
        )


def check_budget_needs(budget: str, table: Path | None) -> None:
    """Raise InputError for a text that is no budget, or one in ms without a table to read it by."""
    if Budget.parse(budget).cost.of_device and table is None:
        raise InputError(
            "a latency table for a budget in ms",
            got=budget,
            consequence=_NOTHING,
            remedy="`bar-edge profile` on the device, then --table",
        )


def check_folder(out: Path, resume: bool) -> None:
    """Raise InputError rather than overwrite another run."""
    if (out / "config.toml").is_file() and not resume:
        raise InputError(
            "a folder without a run in it",
            got=f"{out.name}, which holds one",
            consequence="nothing was started, the earlier run is intact",
            remedy="choose another --out, or go on with --resume",
        )
