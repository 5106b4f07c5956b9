"""The road on one screen, one function per command: each reads a folder or a SPEC and returns JSON data."""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from bar_edge.bench import bench_onnx, compare, load_measurement, meets, runtimes_here, save_measurement, summary
from bar_edge.config import RunConfig, read_toml, run_config
from bar_edge.data.memory import RANDOM, random_data
from bar_edge.errors import InputError
from bar_edge.files import read_json, write_json
from bar_edge.latency_budget.measured_loop import close_loop
from bar_edge.latency_budget.profile_device import plot_table, profile_network
from bar_edge.methods import GateLayout, smallest_cost
from bar_edge.methods.method import find_method
from bar_edge.models import load_weights
from bar_edge.network import Network, count, is_network_folder
from bar_edge.network.modes import modes_apart
from bar_edge.progress import NoProgress, Progress
from bar_edge.records import Budget, ChannelPlan
from bar_edge.records.latency_table import LatencyTable
from bar_edge.records.lowering import Lowering
from bar_edge.report import write_report
from bar_edge.runs.inspection import preflight
from bar_edge.runs.run_folder import PARITY_LIMIT, Run, check_folder, describe_budget, masked_parity, versions
from bar_edge.runs.specs import (
    SAMPLE_IMAGES,
    build_module,
    read_data,
    read_network,
    sample_images,
    shape_and_classes,
    trace_module,
)
from bar_edge.surgery import slice_network
from bar_edge.targets.export_run import Pruned, Wanted, export_network, export_source
from bar_edge.targets.onnx.file import Preprocessing
from bar_edge.targets.table import TARGETS, check_target, runtime_of
from bar_edge.targets.tensorrt.target import engine_options
from bar_edge.targets.verify import MANIFEST, overflow_note, verify_artifact
from bar_edge.training import load_task


def prune(config: RunConfig, out: Path, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Train, prune to the budget, slice and fine-tune; write the RUN folder and return result.json's content.

    Raises InputError before any training if the model, data, weights, budget or folder will not do.
    """
    find_method(config.method)
    config = with_table(config, out, resume=resume, progress=progress)
    run = Run(config, out, resume, progress or NoProgress())
    if run.finished():
        result: dict[str, Any] = read_json(out / "result.json")
        return result
    run.progress.note(f"budget {describe_budget(run.layout, run.budget)['words']}")
    dense = run.dense()
    teacher = run.teacher(dense)
    sliced, plan, forced = run.pruned(dense, teacher)
    run.tune(sliced, teacher)
    result = run.result(dense, sliced, plan, forced)
    write_report(out)
    return result


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
    shape, classes = shape_and_classes(data, input_shape)
    network = read_network(model, model_args, shape, classes)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            "a place for the table", got=f"{out.name}: {error.strerror}", remedy="choose another"
        ) from error
    options: dict[str, Any] = {"runtime": runtime, "threads": threads, "on": on}
    chosen = Lowering.parse_or_auto(lowering)
    table = profile_network(network, out, model=model, lowering=chosen, **options, progress=progress)
    plot_table(table, out.with_suffix(".svg"))
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


def with_table(
    config: RunConfig,
    out: Path,
    *,
    resume: bool,
    runtime: str = "onnxruntime-cpu",
    threads: int = 1,
    lowering: str = "auto",
    progress: Progress | None = None,
) -> RunConfig:
    """Return the configuration with a latency table if its budget is in ms: without one, this machine is profiled.

    Raises InputError for a table of another lowering.
    """
    if Budget.parse(config.budget).metric != "ms":
        return config
    if config.table:
        priced = str(LatencyTable.load(Path(config.table)).lowering)
        if lowering not in ("auto", priced):
            raise InputError(
                f"--lowering {priced}, which the table prices",
                got=lowering,
                consequence="nothing was started",
                remedy="leave it away, or `bar-edge profile` with that lowering",
            )
        return config
    check_folder(out, resume)
    file = out / "latency-table.json"
    if not file.is_file():
        source = read_data(config)
        profile(
            config.model,
            out=file,
            model_args=config.model_arg,
            input_shape=tuple(source.input_shape),
            runtime=runtime,
            threads=threads,
            lowering=lowering,
            progress=progress,
        )
    return dataclasses.replace(config, table=str(file))


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
    shape, classes = shape_and_classes(data, input_shape)
    network = read_network(model, model_args, shape, classes)
    layout = GateLayout(network, keep=keep, round_to=round_to, table=LatencyTable.load(table) if table else None)
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
    shape, classes = shape_and_classes(data, input_shape)
    if weights is not None and is_network_folder(weights):
        network = Network.load(weights)
    else:
        module = build_module(model, model_args, shape, classes)
        if weights is not None:
            load_weights(module, weights)
        network = trace_module(module, shape)
    channel_plan = ChannelPlan.from_json(read_json(plan))
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
    *,
    target: str = "onnx",
    precision: str = "fp32",
    recipe: str = "auto",
    lowering: str = "auto",
    runtime: str | None = None,
    threads: int = 1,
    choice_seconds: float = 60.0,
    with_preprocessing: bool = False,
    data: str | None = None,
    max_drop: float | None = None,
    on: str = "local",
    engine: tuple[str, ...] = (),
    out: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export a RUN's network as an artifact folder, compare it with torch on real images, and note both.

    recipe: of INT8. runtime, threads, choice_seconds: with which `auto` measures, and how long. max_drop: of the metric
    on held-out training images against float32, in points. on, engine: where an engine is built, and NAME=VALUE of its
    options.
    The verdict is no if the file computes something else (an earlier artifact then stays), if its target's runtime
    does, unless `auto` finds it faster than the dense network beyond doubt, if INT8 is not beyond doubt 1.02 times as
    fast as float32, or if the metric drops by more than max_drop.
    """
    check_target(target, precision, recipe, on, max_drop)
    wanted = Wanted(
        target=TARGETS[target],
        precision=precision,
        recipe=recipe,
        lowering=Lowering.parse_or_auto(lowering),
        runtime=runtime,
        threads=threads,
        choice_seconds=choice_seconds,
        with_preprocessing=with_preprocessing,
        max_drop=max_drop,
        on=on,
        engine=engine_options(engine),
    )
    if data == RANDOM and max_drop is not None:
        raise InputError("--data with labels for --max-drop", got=RANDOM, consequence="nothing was written")
    result, config = _read_result(run), run_config(read_toml(run / "config.toml"))
    network, folder = Network.load(run / "network"), out or run / "artifacts" / f"{target}-{precision}"
    if wanted.target.write is not None:
        return export_source(wanted.target.write, network, folder)
    preprocessing = Preprocessing(mean=tuple(result["input"]["mean"]), std=tuple(result["input"]["std"]))
    classes = tuple(result["input"]["classes"])
    if data == RANDOM:
        channels, height, width = network.input_shapes[0]
        source = random_data((channels, height, width), classes, preprocessing.mean, preprocessing.std)
    else:
        source = read_data(dataclasses.replace(config, data=data or config.data))
    pruned = Pruned(
        network=network,
        dense=Network.load(run / "dense"),
        plan=ChannelPlan.from_json(read_json(run / "plan.json")),
        budget=config.budget,
        classes=classes,
        preprocessing=preprocessing,
        task=load_task(config.task),
        data=source,
        images=sample_images(source, max(wanted.target.samples, SAMPLE_IMAGES)),
    )
    answer = export_network(wanted, pruned, folder, progress)
    result["parity"]["sliced_vs_onnx"] = answer["parity"]["sliced_vs_onnx"]
    write_json(run / "result.json", result)
    return answer


def bench(
    target: Path,
    *,
    runtime: str | None = None,
    precision: str | None = None,
    threads: int = 1,
    batch: int = 1,
    seconds: float = 3.0,
    budget: str | None = None,
    against: Path | None = None,
    on: str = "local",
) -> dict[str, Any]:
    """Measure an artifact or ONNX file, here or on a device, alone, in turn with another or against a measurement.

    runtime, precision: an artifact's own by default, else ONNX Runtime and fp32. against: a file to measure in turn,
    or the JSON of an older measurement, which must be of the same device, settings and versions. The verdict is no
    if the outputs are wrong or the median misses a budget in ms.
    """
    limit = Budget.parse(budget) if budget else None
    if limit is not None and limit.metric != "ms":
        raise InputError("a budget in milliseconds, such as 8ms", got=limit.text, consequence="nothing was measured")
    older = load_measurement(against) if against is not None and against.suffix == ".json" else None
    files = [target] if against is None or older else [target, against]
    manifest = read_json(target / MANIFEST) if (target / MANIFEST).is_file() else {}
    made_for = manifest.get("target", "")
    found = bench_onnx(
        files,
        runtime=runtime or runtime_of(made_for) or "onnxruntime-cpu",
        precision=precision,
        threads=threads,
        batch=batch,
        seconds=seconds,
        on=on,
        expect=older.environment if older else None,
    )
    comparison = compare(found[0], older or found[1]) if against else None
    file = save_measurement(target, found[0], budget=limit, comparison=comparison)
    answer = summary(found[0], budget=limit, comparison=comparison)
    answer["warnings"] += overflow_note(manifest, found[0].environment)
    run = target.resolve().parent.parent
    if target.is_dir() and (run / "result.json").is_file():
        entry = {key: answer[key] for key in ("name", "on", "runtime", "precision", "threads", "batch")}
        entry |= {"p50_ms": answer["percentiles_ms"]["p50"], "n": answer["runs"], "file": f"{target.name}/{file.name}"}
        result = read_json(run / "result.json")
        result["latency"] = [old for old in result["latency"] if old["file"] != entry["file"]] + [entry]
        write_json(run / "result.json", result)
    right = found[0].parity is None or found[0].parity["within"]
    verdict = (right and meets(found[0], limit)) if limit else (None if right else False)
    return {"verdict": verdict, **answer, "file": file.name}


def verify(artifact: Path) -> dict[str, Any]:
    """Check an artifact's hashes, its description and its parity on the samples that it carries."""
    checks = verify_artifact(artifact)
    return {"verdict": all(check.passed for check in checks), "checks": [dataclasses.asdict(check) for check in checks]}


def deploy(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    target: str = "onnx",
    precision: str = "fp32",
    lowering: str = "auto",
    with_preprocessing: bool = False,
    runtime: str | None = None,
    threads: int = 1,
    seconds: float = 3.0,
    latency_budget: str | None = None,
) -> dict[str, Any]:
    """Prune, export and bench; the verdict is yes if each of them says yes.

    A budget in ms to train for is met by the table first, then by measuring and pruning again (closing.py).
    """
    find_method(config.method)
    in_ms = Budget.parse(config.budget).metric == "ms"
    runtime = runtime or runtime_of(target) or "onnxruntime-cpu"
    if in_ms:
        config = with_table(
            config, out, resume=resume, runtime=runtime, threads=threads, lowering=lowering, progress=progress
        )
        lowering = str(LatencyTable.load(Path(config.table or "")).lowering)
    prune(config, out, resume=resume, progress=progress)

    def export() -> dict[str, Any]:
        return export_run(
            out,
            target=target,
            precision=precision,
            lowering=lowering,
            runtime=runtime,
            threads=threads,
            with_preprocessing=with_preprocessing,
            progress=progress,
        )

    def measure(artifact: str, budget: str | None = None) -> dict[str, Any]:
        return bench(Path(artifact), runtime=runtime, threads=threads, seconds=seconds, budget=budget)

    measured: dict[str, Any] = {"verdict": None}
    if in_ms:
        run = Run(config, out, True, progress or NoProgress())
        exported, measured = close_loop(run, export, measure)
    else:
        exported = export()
        if exported["bytes"]:
            measured = measure(exported["artifact"], latency_budget)
    report = write_report(out)
    pruned = read_json(out / "result.json")
    return {
        "verdict": False not in (pruned["verdict"], exported["verdict"], measured["verdict"]),
        "prune": pruned,
        "export": exported,
        "bench": measured,
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


def _read_result(run: Path) -> dict[str, Any]:
    if not (run / "result.json").is_file() or not is_network_folder(run / "network"):
        raise InputError(
            "a RUN folder that prune has finished",
            got=f"{run.name} without result.json or network",
            remedy="give the folder of `bar-edge prune --out`, or finish it with --resume",
        )
    result: dict[str, Any] = read_json(run / "result.json")
    return result
