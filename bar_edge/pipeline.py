"""The road on one screen, one function per command: each reads a folder or a SPEC and returns JSON data."""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
import shutil
import tempfile
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
from bar_edge.lowering.lower import lower
from bar_edge.methods import GateLayout, smallest_cost
from bar_edge.models import load_weights
from bar_edge.network import Network, count, is_network_folder
from bar_edge.network.counted_cost import count_executed
from bar_edge.progress import NoProgress, Progress
from bar_edge.records import Budget, ChannelPlan
from bar_edge.records.latency_table import LatencyTable
from bar_edge.report import write_report
from bar_edge.runs.inspection import modes_apart, preflight
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
from bar_edge.targets import target as targets
from bar_edge.targets.artifact import ArtifactSpec, write_artifact
from bar_edge.targets.form_search import choose_lowering
from bar_edge.targets.onnx.file import Preprocessing, parity_onnx
from bar_edge.targets.torch_source.source import write_torch_source
from bar_edge.targets.verify import MANIFEST, overflow_note, verify_artifact
from bar_edge.training import load_task
from bar_edge_calibration.recipe import load_recipe

SAMPLES = 8
#: how many times as fast as float32 INT8 must be beyond doubt
INT8_GAIN = 1.02


def prune(config: RunConfig, out: Path, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Train, prune to the budget, slice and fine-tune; write the RUN folder and return result.json's content.

    Raises InputError before any training if the model, data, weights, budget or folder will not do.
    """
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
    options: dict[str, Any] = {"runtime": runtime, "threads": threads, "lowering": lowering, "on": on}
    table = profile_network(network, out, model=model, **options, progress=progress)
    plot_table(table, out.with_suffix(".svg"))
    layout = GateLayout(network, table=table)
    return {
        "table": out.name,
        "plot": out.with_suffix(".svg").name,
        "lowering": table.lowering,
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
        priced = LatencyTable.load(Path(config.table)).lowering
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
    does, unless `auto` finds it faster than the dense network beyond doubt, if INT8 is not beyond doubt INT8_GAIN times
    as fast as float32, or if the metric drops by more than max_drop.
    """
    targets.check_target(target, precision, recipe, on, max_drop)
    engine_options = targets.engine_options(engine)
    if data == RANDOM and max_drop is not None:
        raise InputError("--data with labels for --max-drop", got=RANDOM, consequence="nothing was written")
    result, config = _read_result(run), run_config(read_toml(run / "config.toml"))
    network, folder = Network.load(run / "network"), out or run / "artifacts" / f"{target}-{precision}"
    if target == "torch":
        return {"verdict": True, "artifact": str(folder), "file": write_torch_source(network, folder).name}
    preprocessing = Preprocessing(mean=tuple(result["input"]["mean"]), std=tuple(result["input"]["std"]))
    inside = preprocessing if with_preprocessing else None
    choice, int8 = None, None
    if precision == "int8" and recipe == "auto":
        form = "regular:16" if lowering == "auto" else lowering
        int8 = targets.faster_recipe(target, network, runtime=runtime, lowering=form, threads=threads)
    elif precision == "int8":
        int8 = load_recipe(recipe)
    if lowering == "auto" and target not in targets.RUNTIMES:
        lowering = targets.UNMEASURED[precision]
    if lowering == "auto":
        choice = choose_lowering(
            network,
            Network.load(run / "dense"),
            runtime=runtime or targets.RUNTIMES[target],
            precision=precision,
            threads=threads,
            seconds=choice_seconds,
            preprocessing=inside,
            convert=targets.for_speed(precision, int8),
            progress=progress,
        )
        lowering = choice.lowering
    spec = ArtifactSpec(
        preprocessing=preprocessing,
        with_preprocessing=with_preprocessing,
        classes=tuple(result["input"]["classes"]),
        budget=config.budget,
        plan=ChannelPlan.from_json(read_json(run / "plan.json")),
        lowering=lowering,
        choice=dataclasses.asdict(choice) if choice else None,
        target=target,
    )
    if data == RANDOM:
        channels, height, width = network.input_shapes[0]
        source = random_data((channels, height, width), spec.classes, preprocessing.mean, preprocessing.std)
    else:
        source = read_data(dataclasses.replace(config, data=data or config.data))
    mean, std = (torch.tensor(result["input"][key])[:, None, None] for key in ("mean", "std"))

    def as_input(images: torch.Tensor) -> torch.Tensor:
        return ((images * std + mean) * 255).round().to(torch.uint8) if with_preprocessing else images

    number = targets.BUNDLE_SAMPLES if target.startswith("trt") else SAMPLES
    images = as_input(sample_images(source, max(number, SAMPLE_IMAGES)))
    final = precision == "fp32" and target in targets.RUNTIMES
    lowered = lower(network, lowering)
    with tempfile.TemporaryDirectory() as scratch:
        first = folder if final else Path(scratch) / "fp32"
        manifest = write_artifact(lowered, first, samples=images[:number], spec=spec, reference=network)
        within, parity = bool(manifest["parity"]["within"]), manifest["parity"]["error"]
        if within:
            parity = parity_onnx(network, first / "model.onnx", images, preprocessing=inside)
            within = parity <= manifest["parity"]["tolerance"]
        result["parity"]["sliced_vs_onnx"] = parity
        write_json(run / "result.json", result)
        held_out = targets.HeldOut(
            data=source,
            task=load_task(config.task),
            structure=network.out_spec,
            as_input=as_input,
            as_written=precision == "int8" and target not in targets.RUNTIMES,
        )
        if within and not final:
            manifest = targets.write_converted(
                first,
                folder,
                target=target,
                precision=precision,
                recipe=int8,
                held_out=held_out,
                max_drop=max_drop,
                tuned=targets.finetuned(network, lowering, source, inside),
                on=on,
                engine=engine_options,
            )
        written = within and manifest["parity"]["within"] is not False
        if written:
            manifest = targets.prove(manifest, folder, first, held_out=held_out, threads=threads)
    executed = count_executed(lowered)
    conversion = manifest.get("conversion") or {}
    scores, speed = manifest.get("held_out"), manifest.get("speedup_over_fp32")
    warnings = [*conversion.get("warnings", ()), *manifest.get("tensorrt", {}).get("slow", ())]
    # a drop of exactly max_drop is within, but for the last bits of shares of images
    dropped = max_drop is not None and scores is not None and scores["drop_points"] > max_drop + 1e-7
    if scores is not None and dropped:
        warnings.append(f"the metric dropped by {scores['drop_points']:.2f} points, by more than {max_drop:g}")
    slow = precision == "int8" and speed is not None and speed["low"] < INT8_GAIN
    if speed is not None and slow:
        times = "{speedup:.2f} times as fast as fp32 in the same form (95 %: {low:.2f} to {high:.2f})".format(**speed)
        warnings.append(f"INT8 is {times}, not beyond doubt {INT8_GAIN} times: ship --precision fp32")
    elif speed is not None and speed["high"] < 1:
        warnings.append(f"{1 / speed['speedup']:.2f} times slower than fp32 in the same form: ship --precision fp32")
    return {
        "verdict": written
        and manifest["parity"]["within"] is not False
        and not dropped
        and not slow
        and (choice is None or choice.faster),
        "artifact": str(folder),
        "lowering": lowering,
        "choice": manifest["choice"],
        "parity": {"sliced_vs_onnx": parity, "images": len(images), precision: manifest["parity"]["error"]},
        "held_out": scores,
        "settings": conversion.get("settings"),
        "speedup_over_fp32": speed,
        "latency": manifest.get("latency"),
        "warnings": warnings,
        "volume_executed": executed.volume,
        "flops_executed": executed.flops,
        "bytes": (folder / "model.onnx").stat().st_size if written else None,
    }


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
        runtime=runtime or targets.RUNTIMES.get(made_for, "onnxruntime-cpu"),
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
    in_ms = Budget.parse(config.budget).metric == "ms"
    runtime = runtime or targets.RUNTIMES.get(target, "onnxruntime-cpu")
    if in_ms:
        config = with_table(
            config, out, resume=resume, runtime=runtime, threads=threads, lowering=lowering, progress=progress
        )
        lowering = LatencyTable.load(Path(config.table or "")).lowering
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
