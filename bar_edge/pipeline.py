"""The road on one screen, one function per command: each checks its request, goes its way and returns JSON data."""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from bar_edge.bench import runtimes_here
from bar_edge.data import DataSource, check_data
from bar_edge.data.memory import RANDOM, random_data
from bar_edge.files import make_folder, read_json
from bar_edge.latency_budget.measured_loop import close_loop
from bar_edge.latency_budget.profile_device import plot_table, profile_network
from bar_edge.methods import GateLayout, smallest_cost
from bar_edge.models import load_weights
from bar_edge.network import Network, count, is_network_folder
from bar_edge.network.modes import modes_apart
from bar_edge.progress import NoProgress, Progress
from bar_edge.records import Budget, ChannelPlan
from bar_edge.records.export_result import ExportResult
from bar_edge.records.latency_table import LatencyTable
from bar_edge.records.lowering import Lowering
from bar_edge.records.tolerance import PARITY_LIMIT
from bar_edge.report import write_report
from bar_edge.requests import BenchRequest, DeployRequest, ExportRequest, PruneRequest
from bar_edge.runs import door
from bar_edge.runs.inspection import preflight
from bar_edge.runs.lock import alone_in
from bar_edge.runs.measure import Benched, measure, runtime_of
from bar_edge.runs.run_folder import Pruned, Run, describe_budget, masked_parity, read_result, versions, write_result
from bar_edge.runs.specs import (
    SAMPLE_IMAGES,
    build_module,
    read_data,
    read_material,
    read_network,
    sample_images,
    shape_and_classes,
    trace_module,
)
from bar_edge.surgery import slice_network
from bar_edge.targets.export_run import Exportable, Wanted, export_network, export_source
from bar_edge.targets.onnx.file import Preprocessing
from bar_edge.targets.table import TARGETS
from bar_edge.targets.tensorrt.target import engine_options
from bar_edge.targets.verify import verify_artifact
from bar_edge.training import late_task

PAGE = "report.html"


def prune(
    request: PruneRequest, out: Path, *, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train, prune to the budget, slice and fine-tune; write the RUN folder and return result.json's content.

    Raises InputError before any training if the model, data, weights, budget or folder will not do.
    """
    door.check_prune(request, out, resume=resume)
    with alone_in(out):
        run = _begin(request, out, resume=resume, bench=BenchRequest(), progress=progress)
        return _pruned(run).result.to_json()


def _begin(
    request: PruneRequest,
    out: Path,
    *,
    resume: bool,
    bench: BenchRequest,
    lowering: str = "auto",
    progress: Progress | None,
) -> Run:
    """Read what a run works on, and begin or go on with it; a budget in ms without a table profiles a device first.

    bench: with which runtime, threads and on which device; lowering: of that table.
    """
    material = read_material(request)
    for note in material.data.notes:
        (progress or NoProgress()).note(note)
    if Budget.parse(request.budget).cost.of_device and not request.table:
        file = out / "latency-table.json"
        if not file.is_file():
            _profile(material.network, file, request.model, bench, lowering, progress)
        request = dataclasses.replace(request, table=str(file))
    return Run(request, material, out, resume=resume, progress=progress or NoProgress())


def _pruned(run: Run) -> Pruned:
    """Go the rest of a run's way, and write its page."""
    finished = run.finished()
    if finished is not None:
        if not (run.out / PAGE).is_file():
            write_report(run.out)
        return finished
    run.progress.note(f"budget {describe_budget(run.layout, run.budget)['words']}")
    dense = run.dense()
    teacher = run.teacher(dense)
    sliced, plan, forced = run.pruned(dense, teacher)
    run.tune(sliced, teacher)
    pruned = run.judged(dense, sliced, plan, forced)
    write_report(run.out)
    return pruned


def profile(
    model: str,
    *,
    out: Path,
    model_args: tuple[str, ...] = (),
    data: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    runtime: str = "onnxruntime-cpu",
    threads: int = 1,
    lowering: str = "auto",
    on: str = "local",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what a model's operations take on a device, for budgets in ms; write the table and its plot."""
    door.check_spec(model, model_args)
    door.check_profile(runtime, lowering, on, threads)
    if data is not None:
        check_data(data)
    shape, classes = shape_and_classes(data, input_shape)
    network = read_network(model, model_args, shape, classes)
    bench = BenchRequest(runtime=runtime, threads=threads, on=on)
    table = _profile(network, out, model, bench, lowering, progress)
    layout = GateLayout(network, table=table)
    return {
        "table": out.name,
        "plot": out.with_suffix(".svg").name,
        "lowering": str(table.lowering),
        "step": table.step,
        "full_ms": layout.cost({}, "ms"),
        "smallest_ms": smallest_cost(layout, "ms"),
        "typical_error": table.typical_error,
        "checks": len(table.checks),
        "environment": table.environment,
    }


def _profile(
    network: Network, out: Path, model: str, bench: BenchRequest, lowering: str, progress: Progress | None
) -> LatencyTable:
    make_folder(out.parent)
    table = profile_network(
        network,
        out,
        model=model,
        runtime=bench.runtime or "onnxruntime-cpu",
        threads=bench.threads,
        lowering=Lowering.parse_or_auto(lowering),
        on=bench.on,
        progress=progress,
    )
    plot_table(table, out.with_suffix(".svg"))
    return table


def inspect_model(
    model: str,
    *,
    model_args: tuple[str, ...] = (),
    data: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    budget: str | None = None,
    keep: tuple[str, ...] = (),
    round_to: int = 1,
    table: Path | None = None,
) -> dict[str, Any]:
    """Return layers, costs, what can be pruned and what not and why, and the smallest feasible budgets of a model."""
    door.check_spec(model, model_args)
    if budget is not None:
        door.check_budget_needs(budget, table)
    if data is not None:
        check_data(data)
    priced = LatencyTable.load(table) if table else None
    shape, classes = shape_and_classes(data, input_shape)
    network = read_network(model, model_args, shape, classes)
    layout = GateLayout(network, keep=keep, round_to=round_to, table=priced)
    unsure = [] if Path(model).is_dir() else modes_apart(build_module(model, model_args, shape, classes))
    answer = {"model": model, "input": list(shape), **preflight(layout, unsure)}
    if budget is not None:
        answer["budget"] = describe_budget(layout, Budget.parse(budget))
    return answer


def slice_model(
    model: str,
    *,
    plan: Path,
    out: Path,
    model_args: tuple[str, ...] = (),
    input_shape: tuple[int, ...] | None = None,
    data: str | None = None,
    weights: Path | None = None,
) -> dict[str, Any]:
    """Slice a model by a plan file, check parity on random inputs, and write the network folder."""
    channel_plan = ChannelPlan.from_json(read_json(plan))
    door.check_file(weights, "weights")
    whole = weights is not None and is_network_folder(weights)
    if not whole:
        door.check_spec(model, model_args)
    if data is not None:
        check_data(data)
    shape, classes = shape_and_classes(data, input_shape)
    if whole and weights is not None:
        network = Network.load(weights)
    else:
        module = build_module(model, model_args, shape, classes)
        if weights is not None:
            load_weights(module, weights)
        network = trace_module(module, shape)
    sliced = slice_network(network, channel_plan)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    parity = masked_parity(network, channel_plan, sliced, images)
    sliced.save(out)
    return {
        "verdict": parity <= PARITY_LIMIT,
        "parity": {"masked_vs_sliced": parity},
        "dense": dataclasses.asdict(count(network)),
        "sliced": dataclasses.asdict(count(sliced)),
        "out": out.name,
    }


def export_run(
    run: Path,
    request: ExportRequest,
    *,
    out: Path | None = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export a RUN's network as an artifact folder, compare it with torch on real images, and note both.

    out: its folder, by default RUN/artifacts/TARGET-PRECISION. trust: whether code that RUN/config.toml names as data
    or task may be imported though the request does not name it. The verdict is that of `export_network`.
    """
    door.check_export(request)
    config = door.stored_request(run, request, trust=trust)
    pruned = Pruned.load(run)
    folder = out or artifact_folder(run, request)
    write = TARGETS[request.target].write
    if write is not None:
        return export_source(write, pruned.network, folder)
    source = _images(pruned, config, request.data)
    return _exported(run, pruned, request, folder, source, config.task, progress).to_json()


def artifact_folder(run: Path, request: ExportRequest) -> Path:
    """Return where a RUN keeps the artifact of a target and a precision."""
    return run / "artifacts" / f"{request.target}-{request.precision}"


def _images(pruned: Pruned, config: PruneRequest, data: str | None) -> DataSource:
    """Return the images that a file is compared and calibrated with: the run's own, others, or random ones."""
    if data != RANDOM:
        return read_data(config)
    described = pruned.result.input
    channels, height, width = pruned.network.input_shapes[0]
    return random_data((channels, height, width), described.classes, described.mean, described.std)


def _exported(
    run: Path,
    pruned: Pruned,
    request: ExportRequest,
    folder: Path,
    source: DataSource,
    task: str,
    progress: Progress | None,
) -> ExportResult:
    exported = export_network(_wanted(request), _exportable(pruned, request, source, task), folder, progress)
    write_result(run, pruned.result.with_onnx_parity((exported.parity or {})["sliced_vs_onnx"]))
    return exported


def _wanted(request: ExportRequest) -> Wanted:
    same = ("precision", "recipe", "runtime", "threads", "choice_seconds", "with_preprocessing", "max_drop", "on")
    return Wanted(
        target=TARGETS[request.target],
        lowering=Lowering.parse_or_auto(request.lowering),
        engine=engine_options(request.engine),
        **{name: getattr(request, name) for name in same},
    )


def _exportable(pruned: Pruned, request: ExportRequest, source: DataSource, task: str) -> Exportable:
    described = pruned.result.input
    return Exportable(
        network=pruned.network,
        dense=pruned.dense,
        plan=pruned.plan,
        budget=pruned.result.budget.text,
        classes=described.classes,
        preprocessing=Preprocessing(mean=described.mean, std=described.std),
        task=late_task(task),
        data=source,
        images=sample_images(source, max(TARGETS[request.target].samples, SAMPLE_IMAGES)),
    )


def bench(target: Path, request: BenchRequest) -> dict[str, Any]:
    """Measure an artifact or ONNX file, here or on a device, alone, in turn with another or against a measurement.

    Runtime and precision are an artifact's own by default, else ONNX Runtime and fp32. The verdict is no if the
    outputs are wrong or the median misses a budget in ms.
    """
    door.check_bench(request, runtime_of(target, request))
    return measure(target, request).to_json()


def verify(artifact: Path) -> dict[str, Any]:
    """Check an artifact's hashes, its description and its parity on the samples that it carries."""
    checks = verify_artifact(artifact)
    return {"verdict": all(check.passed for check in checks), "checks": [dataclasses.asdict(check) for check in checks]}


def deploy(
    request: DeployRequest, out: Path, *, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Prune, export and bench; the verdict is yes if each of them says yes.

    A budget in ms to train for is met by the table first, then by measuring and pruning again (measured_loop.py).
    """
    door.check_deploy(request, out, resume=resume)
    with alone_in(out):
        return _deployed(request, out, resume=resume, progress=progress)


def _deployed(request: DeployRequest, out: Path, *, resume: bool, progress: Progress | None) -> dict[str, Any]:
    bench = dataclasses.replace(request.bench, runtime=request.bench.runtime or door.judge(request.export.target))
    wanted = request.export
    run = _begin(request.prune, out, resume=resume, bench=bench, lowering=wanted.lowering, progress=progress)
    if request.in_ms and run.table is not None:
        wanted = dataclasses.replace(wanted, lowering=str(run.table.lowering))
    pruned = _pruned(run)

    def export(made: Pruned) -> ExportResult:
        folder = artifact_folder(out, wanted)
        return _exported(out, made, wanted, folder, run.data, run.config.task, progress)

    def judge(artifact: Path) -> Benched:
        return measure(artifact, bench)

    if request.in_ms:
        closed = close_loop(run, pruned, export, judge)
        exported, answer = closed.export, closed.to_json()
    else:
        exported = export(pruned)
        answer = judge(Path(exported.artifact)).to_json() if exported.bytes else {"verdict": None}
    report, result = write_report(out), read_result(out)
    return {
        "verdict": False not in (result.verdict, exported.verdict, answer["verdict"]),
        "prune": result.to_json(),
        "export": exported.to_json(),
        "bench": answer,
        "report": str(report),
    }


def doctor() -> dict[str, Any]:
    """Return what this machine has of what bar-edge can use, and what is missing with its remedy."""
    extras = {"openvino": "openvino", "tensorrt": "trt", "transformers": "hf", "timm": "timm"}
    found = {name: importlib.util.find_spec(name) is not None for name in extras}
    cuda = torch.cuda.is_available()
    return {
        "versions": versions(),
        "cpu": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if cuda else "none that torch can use",
        "runtimes": runtimes_here(),
        "extras": {
            name: "installed" if found[name] else f'missing: pip install "bar-edge[{extra}]"'
            for name, extra in extras.items()
        },
        "trtexec": shutil.which("trtexec") is not None,
    }
