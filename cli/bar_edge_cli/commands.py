"""The commands: each gathers its options, calls one function of the pipeline and returns what that returns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bar_edge.methods.method import METHODS
from bar_edge_cli import options

# Heavy imports stand inside the functions: `bar-edge --help` loads no torch.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Prune a convolutional network to a budget, export it, measure it, and prove it.\n\n"
    "Exit codes: 0 done and the verdict is yes; 1 done, the verdict is no; 2 bad input; "
    "3 the environment lacks something; 130 interrupted.",
)


def _option(*names: str, text: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar)


_MODEL = _option(
    "--model",
    metavar="SPEC",
    text="A name of the zoo (resnet20, wrn-28-12, resnet50, vgg16, mobilenetv2 and others), package.module:factory, "
    "file.py:factory, hf:NAME, timm:NAME, or a folder that bar-edge wrote.",
)
_BUDGET = _option(
    "--budget",
    metavar="B",
    text="16x or 6.25% (of the activation volume), 16x:flops, 25%:params, 194560act, 50MFLOPs, 1.2Mparams, or 8ms by "
    "--table.",
)

Model = Annotated[str, _MODEL]
ModelOrFile = Annotated[str | None, _MODEL]
ModelArg = Annotated[
    list[str] | None, _option("--model-arg", metavar="KEY=VALUE", text="An argument of the model's factory; repeat.")
]
Data = Annotated[
    str | None,
    _option(
        "--data",
        metavar="SPEC",
        text="digits, a folder (Parquet, class folders, the CIFAR files), hf:NAME, or package.module:factory.",
    ),
]
Input = Annotated[str | None, _option("--input", metavar="CxHxW", text="Shape of one input, such as 3x32x32.")]
BudgetText = Annotated[str | None, _BUDGET]
BudgetTexts = Annotated[list[str] | None, _BUDGET]
Method = Annotated[
    str | None,
    _option("--method", metavar="NAME", text="; ".join(f"{name}: {m.says}" for name, m in METHODS.items()) + "."),
]
Weights = Annotated[
    str | None, _option("--weights", metavar="FILE", text="Trained weights, safetensors or a checkpoint: skips dense.")
]
Teacher = Annotated[
    str | None,
    _option("--teacher", metavar="FILE", text="Weights to learn from; without it, those of the dense network."),
]
Epochs = Annotated[
    str | None, _option("--epochs", metavar="dense=N,prune=N,tune=N", text="Epochs per phase; 0 trains nothing.")
]
Batch = Annotated[int | None, _option("--batch", metavar="N", text="Images per training step.")]
Device = Annotated[str | None, _option("--device", metavar="NAME", text="Where to train: auto, cpu or cuda.")]
Task = Annotated[
    str | None, _option("--task", metavar="SPEC", text="classification, segmentation, or package.module:Task.")
]
Config = Annotated[Path | None, _option("--config", metavar="FILE.toml", text="Options from a file.")]
Preset = Annotated[
    str | None, _option("--preset", metavar="NAME", text="default, or paper for the published constants.")
]
Seed = Annotated[int | None, _option("--seed", metavar="N", text="Seed of everything that is drawn.")]
MaxDrop = Annotated[
    float | None, _option("--max-drop", metavar="POINTS", text="The verdict is no if the metric drops by more.")
]
Keep = Annotated[
    list[str] | None,
    _option(
        "--keep",
        metavar="PATTERN[=N]",
        text="Layers that are not pruned (head.*), or that keep at least N channels (stages.0.*=8); repeat.",
    ),
]
RoundTo = Annotated[int | None, _option("--round-to", metavar="N", text="Widths end as multiples of N.")]
Set = Annotated[
    list[str] | None,
    _option("--set", metavar="NAME=VALUE", text="Any other option, listed below with its default; repeat."),
]
Resume = Annotated[bool, _option("--resume", text="Go on with a run that was stopped.")]
RunOut = Annotated[Path, _option("--out", metavar="RUN", text="The run's folder.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that prune wrote.")]
Target = Annotated[
    str,
    _option(
        "--target", metavar="NAME", text="What to write: onnx, openvino, trt (an engine), trt-bundle, torch (model.py)."
    ),
]
Precision = Annotated[
    str,
    _option(
        "--precision", metavar="NAME", text="What the file is computed in: fp32, fp16, bf16 (trt, openvino) or int8."
    ),
]
Recipe = Annotated[
    str,
    _option(
        "--recipe",
        metavar="NAME",
        text="How INT8 is laid out: auto (measured here); for onnx also onnxruntime-cpu, and onnxruntime-amx for CPUs "
        "with AMX.",
    ),
]
Lowering = Annotated[
    str,
    _option(
        "--lowering",
        metavar="NAME",
        text="How additions run: auto (measured here), paper, or slices, pad, gather, scatter, pointwise, deferred, "
        "blocks, zero-filled, regular, with widths rounded up as in slices:4 or slices:4-16, and blocks of pixels as "
        "channels as in slices:4@2x2; one for all streams, or one each with commas.",
    ),
]
ChoiceSeconds = Annotated[float, _option("--choice-seconds", metavar="S", text="How long --lowering auto may measure.")]
WithPreprocessing = Annotated[
    bool, _option("--with-preprocessing", text="Put the normalisation into the graph, which then takes uint8.")
]
_RUNTIME = _option(
    "--runtime",
    metavar="NAME",
    text="What runs the file: onnxruntime-cpu, -cuda or -tensorrt, openvino-cpu, or tensorrt, which takes the "
    "artifact's engine, or builds one. Default: the target's, else onnxruntime-cpu.",
)
Runtime = Annotated[str, _RUNTIME]
TargetsRuntime = Annotated[str | None, _RUNTIME]
Threads = Annotated[int, _option("--threads", metavar="N", text="Threads of the runtime.")]
Seconds = Annotated[float, _option("--seconds", metavar="S", text="How long to measure.")]
Table = Annotated[
    str | None, _option("--table", metavar="FILE", text="Latency table of `bar-edge profile`, for a budget in ms.")
]
On = Annotated[
    str,
    _option(
        "--on",
        metavar="WHERE",
        text="local, or ssh://[user@]host[:port]: a device with Python 3.8 and the runtime; "
        "a path behind it names the Python there.",
    ),
]
Json = Annotated[bool, _option("--json", text="Write exactly one JSON object to stdout, all else to stderr.")]
Debug = Annotated[bool, _option("--debug", text="Show the traceback of an error.")]

_SETTABLE = "For --set and the TOML file (the command line wins over TOML, that over the preset): " + ", ".join(
    options.settable()
)


@app.command()
def inspect(
    model: Model,
    model_arg: ModelArg = None,
    data: Data = None,
    input_shape: Input = None,
    budget: BudgetText = None,
    table: Table = None,
    keep: Keep = None,
    round_to: RoundTo = None,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Show a network's layers, its costs, and what can be pruned in it and what not."""
    shape = options.shape(input_shape)

    from bar_edge import pipeline

    return pipeline.inspect_model(
        model,
        model_args=tuple(model_arg or ()),
        data=data,
        input_shape=shape,
        budget=budget,
        keep=tuple(keep or ()),
        round_to=round_to or 1,
        table=Path(table) if table else None,
    )


@app.command()
def profile(
    model: Model,
    out: Annotated[Path, _option("--out", metavar="TABLE.json", text="The table; its plot lies beside it.")],
    model_arg: ModelArg = None,
    data: Data = None,
    input_shape: Input = None,
    runtime: Runtime = "onnxruntime-cpu",
    threads: Threads = 1,
    lowering: Lowering = "auto",
    on: On = "local",
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Measure what a model's operations take on a device, for budgets in ms; goes on where it was stopped."""
    shape = options.shape(input_shape)

    from bar_edge import pipeline
    from bar_edge_cli.progress import Terminal

    with Terminal() as progress:
        return pipeline.profile(
            model,
            out=out,
            model_args=tuple(model_arg or ()),
            data=data,
            input_shape=shape,
            runtime=runtime,
            threads=threads,
            lowering=lowering,
            on=on,
            progress=progress,
        )


@app.command(epilog=_SETTABLE)
def prune(
    out: RunOut,
    model: ModelOrFile = None,
    model_arg: ModelArg = None,
    data: Data = None,
    budget: BudgetText = None,
    method: Method = None,
    weights: Weights = None,
    teacher: Teacher = None,
    table: Table = None,
    epochs: Epochs = None,
    batch: Batch = None,
    device: Device = None,
    task: Task = None,
    config: Config = None,
    preset: Preset = None,
    seed: Seed = None,
    max_drop: MaxDrop = None,
    keep: Keep = None,
    round_to: RoundTo = None,
    assignments: Set = None,
    resume: Resume = False,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Train, prune to a budget and fine-tune; writes the run's folder."""
    resolved = options.resolve(config, options.given(locals()), assignments or ())

    from bar_edge import pipeline
    from bar_edge_cli.progress import Terminal

    with Terminal() as progress:
        result = pipeline.prune(resolved, out, resume=resume, progress=progress)
    return {**result, "report": str(out / "report.html")}


@app.command("slice")
def slice_(
    model: Model,
    plan: Annotated[Path, _option("--plan", metavar="plan.json", text="Which channels stay.")],
    out: Annotated[Path, _option("--out", metavar="DIR", text="Folder for the sliced network.")],
    weights: Annotated[Path | None, _option("--weights", metavar="FILE", text="Weights of the whole network.")] = None,
    model_arg: ModelArg = None,
    data: Data = None,
    input_shape: Input = None,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Cut a network by a plan, without training."""
    shape = options.shape(input_shape)

    from bar_edge import pipeline

    return pipeline.slice_model(
        model,
        model_args=tuple(model_arg or ()),
        input_shape=shape,
        data=data,
        plan=plan,
        weights=weights,
        out=out,
    )


@app.command()
def export(
    run: Run,
    target: Target = "onnx",
    precision: Precision = "fp32",
    recipe: Recipe = "auto",
    lowering: Lowering = "auto",
    runtime: Annotated[
        str | None,
        _option("--runtime", metavar="NAME", text="What --lowering auto measures on; the target's by default."),
    ] = None,
    threads: Threads = 1,
    choice_seconds: ChoiceSeconds = 60.0,
    with_preprocessing: WithPreprocessing = False,
    data: Data = None,
    max_drop: MaxDrop = None,
    on: On = "local",
    engine: Annotated[
        list[str] | None,
        _option(
            "--engine",
            metavar="NAME=VALUE",
            text="Of a TensorRT engine: batch=1,4,8 (smallest, best, largest), dla_core, workspace_mib, "
            "optimization_level, tf32, hardware, version_compatible; repeat.",
        ),
    ] = None,
    out: Annotated[
        Path | None, _option("--out", metavar="DIR", text="Default: RUN/artifacts/TARGET-PRECISION.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Write a run's network as a file for a runtime, and check that it computes the same and is faster."""
    from bar_edge import pipeline
    from bar_edge_cli.progress import Terminal

    with Terminal() as progress:
        return pipeline.export_run(
            run,
            target=target,
            precision=precision,
            recipe=recipe,
            lowering=lowering,
            runtime=runtime,
            threads=threads,
            choice_seconds=choice_seconds,
            with_preprocessing=with_preprocessing,
            data=data,
            max_drop=max_drop,
            on=on,
            engine=tuple(engine or ()),
            out=out,
            progress=progress,
        )


@app.command()
def bench(
    target: Annotated[Path, typer.Argument(metavar="ARTIFACT|FILE.onnx", help="What export wrote, or an ONNX file.")],
    runtime: TargetsRuntime = None,
    precision: Annotated[
        str | None,
        _option(
            "--precision",
            metavar="NAME",
            text="What the runtime computes in: fp32; openvino-cpu also bf16; onnxruntime-tensorrt as the file. "
            "Default: as the artifact was exported for, else fp32.",
        ),
    ] = None,
    threads: Threads = 1,
    batch: Annotated[int, _option("--batch", metavar="N", text="Inputs per inference.")] = 1,
    seconds: Seconds = 3.0,
    budget: Annotated[str | None, _option("--budget", metavar="MS", text="Judge the median by this, e.g. 8ms.")] = None,
    against: Annotated[
        Path | None,
        _option(
            "--against",
            metavar="OTHER",
            text="Give the ratio to another artifact or ONNX file, measured in turn with it, "
            "or to an older measurement (its bench-*.json).",
        ),
    ] = None,
    on: On = "local",
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Measure latency, here or on a device, in a process of its own; wrong outputs are a verdict of no."""
    from bar_edge import pipeline

    return pipeline.bench(
        target,
        runtime=runtime,
        precision=precision,
        threads=threads,
        batch=batch,
        seconds=seconds,
        budget=budget,
        against=against,
        on=on,
    )


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder that export wrote.")],
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Check an artifact's hashes, and its answers on the samples that it carries."""
    from bar_edge import pipeline

    return pipeline.verify(artifact)


@app.command(epilog=_SETTABLE)
def deploy(
    out: RunOut,
    config_file: Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="The same as --config.")] = None,
    model: ModelOrFile = None,
    model_arg: ModelArg = None,
    data: Data = None,
    budgets: BudgetTexts = None,
    method: Method = None,
    weights: Weights = None,
    teacher: Teacher = None,
    table: Table = None,
    epochs: Epochs = None,
    batch: Batch = None,
    device: Device = None,
    task: Task = None,
    config: Config = None,
    preset: Preset = None,
    seed: Seed = None,
    max_drop: MaxDrop = None,
    keep: Keep = None,
    round_to: RoundTo = None,
    assignments: Set = None,
    resume: Resume = False,
    target: Target = "onnx",
    precision: Precision = "fp32",
    lowering: Lowering = "auto",
    with_preprocessing: WithPreprocessing = False,
    runtime: TargetsRuntime = None,
    threads: Threads = 1,
    seconds: Seconds = 3.0,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Prune, export and bench; meets a --budget in ms, or judges the measured median by it beside another --budget."""
    budget, latency_budget = options.split_budgets(budgets or ())
    if budget is None and (table or not (config_file or config)):  # nothing else to train for
        budget, latency_budget = latency_budget, None
    resolved = options.resolve(config_file or config, options.given(locals()), assignments or ())

    from bar_edge import pipeline
    from bar_edge_cli.progress import Terminal

    with Terminal() as progress:
        return pipeline.deploy(
            resolved,
            out,
            resume=resume,
            progress=progress,
            target=target,
            precision=precision,
            lowering=lowering,
            with_preprocessing=with_preprocessing,
            runtime=runtime,
            threads=threads,
            seconds=seconds,
            latency_budget=latency_budget,
        )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that prune wrote.")],
    out: Annotated[
        Path | None, _option("--out", metavar="FILE.html", text="For several runs: comparison.html.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Write a run's page of proof, or one page that compares several runs."""
    from bar_edge.report import write_comparison, write_report

    if len(runs) == 1:
        return {"report": str(write_report(runs[0], out))}
    return {"report": str(write_comparison(runs, out or Path("comparison.html")))}


@app.command()
def doctor(json: Json = False, debug: Debug = False) -> dict[str, Any]:
    """Show what this machine has of what bar-edge can use."""
    from bar_edge import pipeline

    return pipeline.doctor()
