"""The commands: each makes a request of its options, calls one function of the pipeline and returns its answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from bar_edge.requests import BenchRequest, DeployRequest, ExportRequest, PruneRequest, fields
from bar_edge_cli import options
from bar_edge_cli.parameters import Answer, argument, command, option
from bar_edge_cli.parameters import options as options_of

# Heavy imports stand inside the functions: `bar-edge --help` loads no torch.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Prune a convolutional network to a budget, export it, measure it, and prove it.\n\n"
    "Exit codes: 0 done and the verdict is yes; 1 done, the verdict is no; 2 bad input; "
    "3 the environment lacks something; 70 an error of bar-edge's own; 130 interrupted.",
)
_SETTABLE = "For --set and the TOML file (the command line wins over TOML, that over the preset): " + ", ".join(
    options.settable()
)
_MODEL = options_of(PruneRequest, "model", "model_arg")
_SHAPE = option("input_shape", str | None, "Shape of one input.", metavar="CxHxW", default=None, flag="--input")
_DATA = options_of(PruneRequest, "data", unsaid=True)
_OUT_RUN = option("out", Path, "The run's folder.", metavar="RUN")
_TRUST = option(
    "trust_run", bool, "Import the code that a stored run's config.toml names (data, task, model).", default=False
)
_TRAINING = [
    *options_of(PruneRequest, unsaid=True, without=("budget",)),
    option("epochs", str | None, "Epochs per phase; 0: none.", metavar="dense=N,prune=N,tune=N", default=None),
    option("batch", int | None, "Images per training step.", metavar="N", default=None),
    option("device", str | None, "Where to train: auto, cpu or cuda.", metavar="NAME", default=None),
    option("config", Path | None, "Options from a file.", metavar="FILE.toml", default=None),
    option(
        "assignments",
        list[str] | None,
        "Any other option, listed below with its default; repeat.",
        metavar="NAME=VALUE",
        default=None,
        flag="--set",
    ),
    option("resume", bool, "Go on with a run that was stopped.", default=False),
    _TRUST,
]
_BUDGET_TEXT = fields(PruneRequest)["budget"].metadata["help"]
_BENCH_BATCH = fields(BenchRequest)["batch"]  # its own name is training's


@command(
    app,
    _MODEL,
    _DATA,
    _SHAPE,
    options_of(PruneRequest, "budget", "table", "keep", unsaid=True),
    options_of(PruneRequest, "round_to"),
)
def inspect(
    model: str,
    model_arg: Sequence[str] | None,
    data: str | None,
    input_shape: str | None,
    budget: str | None,
    table: str | None,
    keep: Sequence[str] | None,
    round_to: int,
) -> Answer:
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
        round_to=round_to,
        table=Path(table) if table else None,
    )


@command(
    app,
    _MODEL,
    option("out", Path, "The table; its plot lies beside it.", metavar="TABLE.json"),
    _DATA,
    _SHAPE,
    options_of(BenchRequest, "runtime", "threads"),
    options_of(ExportRequest, "lowering", "on"),
)
def profile(
    model: str,
    out: Path,
    model_arg: Sequence[str] | None,
    data: str | None,
    input_shape: str | None,
    runtime: str | None,
    **measuring: Any,
) -> Answer:
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
            runtime=runtime or "onnxruntime-cpu",
            progress=progress,
            **measuring,
        )


@command(app, _OUT_RUN, options_of(PruneRequest, "budget", unsaid=True), _TRAINING, epilog=_SETTABLE)
def prune(out: Path, config: Path | None, assignments: Sequence[str] | None, **said: Any) -> Answer:
    """Train, prune to a budget and fine-tune; writes the run's folder."""
    request = options.resolve(config, options.given(said), assignments or (), trust=said["trust_run"])

    from bar_edge import pipeline
    from bar_edge_cli.progress import Terminal

    with Terminal() as progress:
        result = pipeline.prune(request, out, resume=said["resume"], progress=progress)
    return {**result, "report": str(out / "report.html")}


@command(
    app,
    _MODEL,
    option("plan", Path, "Which channels stay.", metavar="plan.json"),
    option("out", Path, "Folder for the sliced network.", metavar="DIR"),
    option("weights", Path | None, "Weights of the whole network.", metavar="FILE", default=None),
    _DATA,
    _SHAPE,
    name="slice",
)
def slice_(model: str, model_arg: Sequence[str] | None, input_shape: str | None, **said: Any) -> Answer:
    """Cut a network by a plan, without training."""
    shape = options.shape(input_shape)

    from bar_edge import pipeline

    return pipeline.slice_model(model, model_args=tuple(model_arg or ()), input_shape=shape, **said)


@command(
    app,
    argument("run", Path, "Folder that prune wrote.", metavar="RUN"),
    options_of(ExportRequest),
    _TRUST,
    option("out", Path | None, "Default: RUN/artifacts/TARGET-PRECISION.", metavar="DIR", default=None),
)
def export(run: Path, out: Path | None, engine: Sequence[str] | None, trust_run: bool, **said: Any) -> Answer:
    """Write a run's network as a file for a runtime, and check that it computes the same and is faster."""
    request = ExportRequest(**said, engine=tuple(engine or ()))

    from bar_edge import pipeline
    from bar_edge_cli.progress import Terminal

    with Terminal() as progress:
        return pipeline.export_run(run, request, out=out, trust=trust_run, progress=progress)


@command(
    app,
    argument("target", Path, "What export wrote, or an ONNX file.", metavar="ARTIFACT|FILE.onnx"),
    options_of(BenchRequest),
)
def bench(target: Path, **said: Any) -> Answer:
    """Measure latency, here or on a device, in a process of its own; wrong outputs are a verdict of no."""
    request = BenchRequest(**said)

    from bar_edge import pipeline

    return pipeline.bench(target, request)


@command(app, argument("artifact", Path, "Folder that export wrote.", metavar="ARTIFACT"))
def verify(artifact: Path) -> Answer:
    """Check an artifact's hashes, and its answers on the samples that it carries."""
    from bar_edge import pipeline

    return pipeline.verify(artifact)


@command(
    app,
    argument("config_file", Path | None, "The same as --config.", metavar="[CONFIG.toml]", default=None),
    _OUT_RUN,
    option("budget", list[str] | None, _BUDGET_TEXT, metavar="B", default=None),
    _TRAINING,
    options_of(ExportRequest, without=("data", "task", "max_drop", "runtime", "threads", "on")),
    options_of(BenchRequest, without=("precision", "batch", "budget")),
    option("bench_batch", int, _BENCH_BATCH.metadata["help"], metavar="N", default=_BENCH_BATCH.default),
    epilog=_SETTABLE,
)
def deploy(
    config_file: Path | None,
    out: Path,
    config: Path | None,
    budget: Sequence[str] | None,
    assignments: Sequence[str] | None,
    engine: Sequence[str] | None,
    **said: Any,
) -> Answer:
    """Prune, export and bench; meets a --budget in ms, or judges the measured median by it beside another --budget."""
    trained, judged = options.split_budgets(budget or ())
    file = config_file or config
    if trained is None and (said["table"] or not file):  # nothing else to train for
        trained, judged = judged, None
    given = options.given({**said, "budget": trained})
    pruning = options.resolve(file, given, assignments or (), trust=said["trust_run"])
    request = DeployRequest.joined(pruning, {**said, "budget": judged, "engine": tuple(engine or ())})

    from bar_edge import pipeline
    from bar_edge_cli.progress import Terminal

    with Terminal() as progress:
        return pipeline.deploy(request, out, resume=said["resume"], progress=progress)


@command(
    app,
    argument("runs", list[Path], "Folders that prune wrote.", metavar="RUN..."),
    option("out", Path | None, "For several runs: comparison.html.", metavar="FILE.html", default=None),
)
def report(runs: Sequence[Path], out: Path | None) -> Answer:
    """Write a run's page of proof, or one page that compares several runs."""
    from bar_edge.report import write_comparison, write_report

    if len(runs) == 1:
        return {"report": str(write_report(runs[0], out))}
    return {"report": str(write_comparison(runs, out or Path("comparison.html")))}


@command(app)
def doctor() -> Answer:
    """Show what this machine has of what bar-edge can use."""
    from bar_edge import pipeline

    return pipeline.doctor()
