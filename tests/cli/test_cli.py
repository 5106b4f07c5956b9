"""The command line: options reach the pipeline, answers and errors reach the person, exit codes keep the contract."""

import inspect
import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer
from rich.console import Console

import bar_edge
from bar_edge.config import PRESETS, TrainConfig, to_toml
from bar_edge.errors import EnvironmentLacks, InputError, Terminated
from bar_edge.requests import BenchRequest, DeployRequest, ExportRequest, PruneRequest, fields
from bar_edge_cli import options, show
from bar_edge_cli.commands import app
from bar_edge_cli.main import main
from bar_edge_cli.progress import Terminal

RESULT: dict[str, Any] = {
    "schema": 1,
    "verdict": True,
    "method": "bar",
    "model": "resnet20",
    "data": "digits",
    "seed": 0,
    "metric": {"name": "accuracy", "higher_is_better": True},
    "budget": {"text": "8x", "unit": "volume", "limit": 1568.0, "achieved": 1500, "within": True, "basis": "counted"},
    "dense": {"volume": 12544, "flops": 5064704, "params": 272186, "metric": 0.9875},
    "sliced": {"volume": 1500, "flops": 100000, "params": 20000, "metric": 0.98, "volume_regular": 2192},
    "parity": {"masked_vs_sliced": 7.3e-16, "sliced_vs_onnx": None},
}


class Pipeline(types.ModuleType):
    """Stands in for bar_edge.pipeline: remembers how it was called, answers what the test says."""

    def __init__(self) -> None:
        super().__init__("bar_edge.pipeline")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.answer: dict[str, Any] | Callable[[], dict[str, Any]] = {"verdict": True}

    def __getattr__(self, name: str) -> Callable[..., dict[str, Any]]:
        if name.startswith("__"):
            raise AttributeError(name)

        def function(*args: Any, **kwargs: Any) -> dict[str, Any]:
            self.calls.append((name, args, kwargs))
            answer = self.answer() if callable(self.answer) else self.answer
            return dict(answer)

        return function


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    fake = Pipeline()
    monkeypatch.setitem(sys.modules, "bar_edge.pipeline", fake)
    monkeypatch.setattr(bar_edge, "pipeline", fake, raising=False)
    return fake


def configuration(pipeline: Pipeline) -> PruneRequest:
    request = pipeline.calls[-1][1][0]
    asked = request.prune if isinstance(request, DeployRequest) else request
    assert isinstance(asked, PruneRequest)
    return asked


# ------------------------------------------------------------------------------------------- options


def test_every_option_of_prune_arrives(pipeline: Pipeline, tmp_path: Path) -> None:
    given = "--model resnet56 --model-arg a=1 --model-arg b=2 --data d --budget 4x --method random --weights w.pt"
    given += " --teacher t.pt --epochs dense=1,tune=3 --batch 7 --device cpu --task segmentation --seed 5"
    given += " --max-drop 1.5 --set train.lr_prune=0.5 --set distill.alpha=0 --set bar.transition=linear"
    assert main(["prune", *given.split(), "--resume", "--out", str(tmp_path / "run")]) == 0
    name, (config, out), rest = pipeline.calls[0]
    assert (name, out, rest["resume"]) == ("prune", tmp_path / "run", True)
    assert config.model == "resnet56" and config.model_arg == ("a=1", "b=2") and config.data == "d"
    assert config.budget == "4x" and config.method == "random" and config.task == "segmentation"
    assert config.weights == "w.pt" and config.teacher == "t.pt" and config.seed == 5 and config.max_drop == 1.5
    train = config.train
    assert (train.dense, train.prune, train.tune, train.batch, train.device) == (
        1,
        PruneRequest(model="").train.prune,
        3,
        7,
        "cpu",
    )
    assert train.lr_prune == 0.5 and config.distill.alpha == 0.0 and config.bar.transition == "linear"


def test_without_options_the_defaults_hold(pipeline: Pipeline, tmp_path: Path) -> None:
    assert main(["prune", "--model", "resnet20", "--out", str(tmp_path / "run")]) == 0
    assert configuration(pipeline) == PruneRequest(model="resnet20")
    assert pipeline.calls[0][2]["resume"] is False


def test_precedence_command_line_toml_preset_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('model = "vgg16"\nseed = 7\n[train]\nbatch = 32\ndense = 1\n')
    config = options.resolve(
        file, {"preset": "paper", "seed": 9, "train": {"dense": 2, "batch": None}}, ["train.tune=3"]
    )
    assert config.seed == 9 and config.train.dense == 2 and config.train.tune == 3  # command line
    assert config.model == "vgg16" and config.train.batch == 32  # TOML over the preset's 64
    assert config.train.lr_dense == 1e-3 and config.bar.barrier_cap == 1e10  # preset
    assert config.data == "digits"  # default


def test_a_preset_may_stand_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('model = "vgg16"\npreset = "paper"\n')
    assert options.resolve(file, {}).train.batch == 64


def test_set_wins_over_a_named_option() -> None:
    given = {"model": "resnet20", "train": {"batch": 7}}
    assert options.resolve(None, given, ["train.batch=9"]).train.batch == 9


def test_a_resolved_configuration_reads_back(tmp_path: Path) -> None:
    config = options.resolve(None, {"model": "m", "preset": "paper", "model_arg": ["a=1"], "max_drop": 2})
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert options.resolve(file, {}) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset: str) -> None:
    assert options.resolve(None, {"model": "m", "preset": preset}).preset == preset


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=3", {"seed": 3}),
        ("train.lr_tune = 1e-3", {"train": {"lr_tune": 1e-3}}),
        ("train.augment=crop,flip", {"train": {"augment": "crop,flip"}}),
        ('data="a b"', {"data": "a b"}),
        ('model_arg=["a=1"]', {"model_arg": ["a=1"]}),
        ("data=x=y", {"data": "x=y"}),
    ],
)
def test_assignment(text: str, expected: dict[str, Any]) -> None:
    assert options.assignment(text) == expected


@pytest.mark.parametrize("text", ["seed", "=3", "train.=3", ".lr=3", "a b=1"])
def test_bad_assignment(text: str) -> None:
    with pytest.raises(InputError, match="NAME=VALUE"):
        options.assignment(text)


@pytest.mark.parametrize("text", ["dense", "dense=-1", "dense=1.5", "warm=3", "dense=1;tune=2", "dense=1,"])
def test_bad_epochs(text: str) -> None:
    with pytest.raises(InputError, match="--epochs"):
        options.epochs(text)


def test_shape() -> None:
    assert options.shape("3x32x32") == (3, 32, 32) and options.shape(None) is None
    for text in ("3x", "0x3", "3,32", "ax3", ""):
        with pytest.raises(InputError, match="CxHxW"):
            options.shape(text)


def test_two_budgets_are_told_apart(pipeline: Pipeline, tmp_path: Path) -> None:
    command = ["deploy", "--model", "resnet20", "--out", str(tmp_path)]
    assert main([*command, "--budget", "8ms", "--budget", "16x"]) == 0
    assert configuration(pipeline).budget == "16x" and pipeline.calls[0][1][0].bench.budget == "8ms"
    assert main([*command, "--budget", "8x", "--budget", "16x"]) == 2
    assert main([*command, "--budget", "8ms", "--budget", "9ms"]) == 2
    assert len(pipeline.calls) == 1


def test_a_budget_in_ms_alone_is_what_is_trained_for(pipeline: Pipeline, tmp_path: Path) -> None:
    assert main(["deploy", "--model", "resnet20", "--budget", "8ms", "--table", "t.json", "--out", str(tmp_path)]) == 0
    assert (configuration(pipeline).budget, configuration(pipeline).table) == ("8ms", "t.json")
    assert pipeline.calls[0][1][0].bench.budget is None


def test_deploy_reads_a_file_and_hands_on_the_rest(pipeline: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(to_toml(PruneRequest(model="vgg16", budget="4x")))
    out = str(tmp_path / "run")
    assert main(["deploy", str(file), "--lowering", "paper", "--threads", "2", "--seconds", "1", "--out", out]) == 0
    assert configuration(pipeline) == PruneRequest(model="vgg16", budget="4x")
    request = pipeline.calls[0][1][0]
    assert request.export == ExportRequest(lowering="paper", threads=2)
    assert request.bench == BenchRequest(threads=2, seconds=1.0)
    assert pipeline.calls[0][2]["resume"] is False


def test_deploy_has_every_option_of_prune_export_and_bench(pipeline: Pipeline, tmp_path: Path) -> None:
    said = "--model m --target trt --precision int8 --recipe tensorrt --engine batch=4 --on ssh://board --max-drop 1"
    said += " --choice-seconds 5 --bench-batch 4 --batch 32 --runtime tensorrt --against old.json --with-preprocessing"
    assert main(["deploy", *said.split(), "--out", str(tmp_path)]) == 0
    request = pipeline.calls[0][1][0]
    assert request.prune == PruneRequest(model="m", max_drop=1.0, train=TrainConfig(batch=32))
    assert request.export == ExportRequest(
        target="trt",
        precision="int8",
        recipe="tensorrt",
        engine=("batch=4",),
        on="ssh://board",
        max_drop=1.0,
        choice_seconds=5.0,
        runtime="tensorrt",
        with_preprocessing=True,
    )
    assert request.bench == BenchRequest(batch=4, runtime="tensorrt", against=Path("old.json"), on="ssh://board")
    commands = typer.main.get_command(app)
    assert isinstance(commands, typer.core.TyperGroup)
    shown = {parameter.name for parameter in commands.commands["deploy"].params}
    asked = {*fields(PruneRequest), *fields(ExportRequest), *fields(BenchRequest)}
    assert asked <= shown


def test_only_an_engine_is_built_on_the_device(pipeline: Pipeline, tmp_path: Path) -> None:
    assert main(["deploy", "--model", "m", "--on", "ssh://board", "--out", str(tmp_path)]) == 0
    request = pipeline.calls[0][1][0]
    assert (request.export.on, request.bench.on) == ("local", "ssh://board")


@pytest.mark.parametrize(
    ("command", "name", "args", "kwargs"),
    [
        (
            "inspect --model m --model-arg k=v --input 1x8x8 --data digits --budget 8x --keep h.* --keep s=8"
            " --round-to 4",
            "inspect_model",
            ("m",),
            {"model_args": ("k=v",), "data": "digits", "input_shape": (1, 8, 8), "budget": "8x"}
            | {"keep": ("h.*", "s=8"), "round_to": 4, "table": None},
        ),
        (
            "profile --model m --data digits --threads 2 --on ssh://board --out t.json",
            "profile",
            ("m",),
            {"model_args": (), "data": "digits", "input_shape": None, "out": Path("t.json")}
            | {"runtime": "onnxruntime-cpu", "threads": 2, "lowering": "auto", "on": "ssh://board"},
        ),
        (
            "slice --model m --plan p.json --weights w --out o",
            "slice_model",
            ("m",),
            {
                "model_args": (),
                "input_shape": None,
                "data": None,
                "plan": Path("p.json"),
                "weights": Path("w"),
                "out": Path("o"),
            },
        ),
        (
            "export r --with-preprocessing --lowering regular --engine batch=4 --engine dla_core=0 --out o",
            "export_run",
            (Path("r"), ExportRequest(lowering="regular", with_preprocessing=True, engine=("batch=4", "dla_core=0"))),
            {"out": Path("o"), "trust": False},
        ),
        (
            "bench a.onnx --threads 4 --batch 2 --seconds 0.5 --budget 8ms --against b.onnx --on ssh://board",
            "bench",
            (
                Path("a.onnx"),
                BenchRequest(threads=4, batch=2, seconds=0.5, budget="8ms", against=Path("b.onnx"), on="ssh://board"),
            ),
            {},
        ),
        ("verify a", "verify", (Path("a"),), {}),
        ("doctor", "doctor", (), {}),
    ],
)
def test_other_commands_call_their_function(
    pipeline: Pipeline, command: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert main(command.split()) == 0
    called = [(n, a, {k: v for k, v in kw.items() if k != "progress"}) for n, a, kw in pipeline.calls]
    assert called == [(name, args, kwargs)]


def test_options_fit_the_real_pipeline(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fake accepts, the real functions accept: every keyword that a command hands on is theirs."""
    monkeypatch.undo()
    from bar_edge import pipeline as real

    commands = ["inspect --model m", "profile --model m --out t.json", "slice --model m --plan p --out o", "export r"]
    commands += ["bench a", "verify a", "doctor", "prune --model m --out o", "deploy --model m --out o"]
    monkeypatch.setattr(bar_edge, "pipeline", pipeline)
    for command in commands:
        assert main(command.split()) == 0
    assert len(pipeline.calls) == len(commands)
    for name, args, keywords in pipeline.calls:
        inspect.signature(getattr(real, name)).bind(*args, **keywords)


# --------------------------------------------------------------------------- answers and exit codes


@pytest.mark.parametrize(("verdict", "code"), [(True, 0), (None, 0), (False, 1)])
def test_verdict_is_the_exit_code(pipeline: Pipeline, verdict: bool | None, code: int) -> None:
    pipeline.answer = {"verdict": verdict}
    assert main(["verify", "a"]) == code
    pipeline.answer = {} if verdict is None else {"verdict": verdict}
    assert main(["verify", "a", "--json"]) == code


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def function() -> NoReturn:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("a", got="b", consequence="c", remedy="d"), 2, "required: a\ngot: b\nconsequence: c\nremedy: d\n"),
        (EnvironmentLacks("a GPU", got="none"), 3, "required: a GPU\ngot: none\n"),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), 3, "required: the Python package timm"),
        (PermissionError(13, "Permission denied", "x"), 2, "got: [Errno 13] Permission denied: 'x'"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (ZeroDivisionError("division by zero"), 70, "bug in bar-edge: ZeroDivisionError: division by zero"),
        (FileNotFoundError(2, "No such file"), 70, "bug in bar-edge: FileNotFoundError"),
        (OSError(36, "File name too long"), 2, "File name too long"),
        (FileExistsError(17, "File exists", "checkpoints"), 2, "File exists"),
        (MemoryError(), 3, "got: MemoryError\n"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 3, "required: enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), 3, "Tried to allocate 2 GiB\nremedy"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Terminated(143), 143, "terminated\n"),
        (Terminated(129), 129, "terminated\n"),
    ],
)
def test_errors_are_lines_and_exit_codes(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    pipeline.answer = raising(error)
    assert main(["doctor"]) == code
    captured = capfd.readouterr()
    assert said in captured.err and "Traceback" not in captured.err
    assert captured.out == ""


def test_a_signal_unwinds_the_command_and_only_it(pipeline: Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    def stopped() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # never to its end
        return {}

    pipeline.answer = stopped
    assert main(["doctor"]) == 143
    assert capfd.readouterr().err == "terminated\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_torchrun_is_refused_in_words(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["doctor"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 3
    assert "torchrun with 2 processes" in capfd.readouterr().err


@pytest.mark.parametrize("module", ["bar_edge_cli", "bar_edge_cli.main"])
def test_as_a_module(module: str, repository: Path) -> None:
    roots = os.pathsep.join(str(repository / name) for name in (".", "cli", "kernels", "calibration"))
    command = [sys.executable, "-m", module, "no-such-command"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": roots}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no-such-command" in done.stderr


def test_debug_shows_the_traceback(pipeline: Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    pipeline.answer = raising(InputError("a", got="b"))
    assert main(["doctor", "--debug"]) == 2
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("argv", [["doctor", "--bogus"], ["nonsense"], ["prune"], ["bench", "a", "--threads", "x"], []])
def test_wrong_usage(pipeline: Pipeline, capfd: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert main(argv) == 2
    captured = capfd.readouterr()
    assert "required: " in captured.err or "Usage" in captured.err + captured.out
    assert pipeline.calls == []


def test_json_is_one_object_whatever_libraries_print(pipeline: Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    def chatter() -> dict[str, Any]:
        print("from python")
        os.write(1, b"from C\n")
        return {"verdict": True, "number": 0.1}

    pipeline.answer = chatter
    assert main(["doctor", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"verdict": True, "number": 0.1}
    assert captured.out.count("\n") == 1
    assert "from python" in captured.err and "from C" in captured.err
    print("stdout is back")
    assert capfd.readouterr().out == "stdout is back\n"


@pytest.mark.parametrize(
    ("argv", "error", "code"),
    [(["doctor", "--json"], InputError("a", got="b"), 2), (["doctor", "--json"], ValueError("x"), 70)],
)
def test_an_error_with_json_is_one_object_too(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str], argv: list[str], error: BaseException, code: int
) -> None:
    pipeline.answer = raising(error)
    assert main(argv) == code
    answer = json.loads(capfd.readouterr().out)
    assert answer["exit_code"] == code and answer["error"]


def test_wrong_usage_with_json(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--bogus"]) == 2
    assert "--bogus" in json.loads(capfd.readouterr().out)["error"]["got"]


def test_prune_names_the_page(pipeline: Pipeline, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pipeline.answer = RESULT
    assert main(["prune", "--model", "resnet20", "--out", str(tmp_path / "run"), "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer == {**RESULT, "report": str(tmp_path / "run" / "report.html")}


def test_report_of_one_run_and_of_several(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({**RESULT, "latency": [], "versions": {}}))
    assert main(["report", "a", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"report": "a/report.html"}
    assert main(["report", "a", "b", "--out", "both.html"]) == 0
    assert capfd.readouterr().out == "report: both.html\n"
    assert (tmp_path / "a" / "report.html").is_file() and (tmp_path / "both.html").is_file()


# ---------------------------------------------------------------------------------------- for the eye


def shown(answer: dict[str, Any]) -> str:
    out = io.StringIO()
    show.show(answer, Console(file=out, width=120, highlight=False))
    return out.getvalue()


def test_result_is_a_table() -> None:
    text = shown(RESULT)
    for said in ("12,544", "1,500", "8.36x", "98.75 %", "-0.75 points", "5.72x", "verdict: yes"):
        assert said in text
    assert "budget 8x = at most 1,568 activations, achieved 1,500 (8.36x): met" in text
    assert "masked vs sliced 7.3e-16" in text and "onnx" not in text


def test_a_result_without_metrics_still_shows() -> None:
    bare = {**RESULT, "verdict": False, "sliced": {**RESULT["sliced"], "metric": None}}
    text = shown(bare)
    assert "verdict: no" in text and "points" not in text


def test_deploy_shows_the_result_inside() -> None:
    text = shown({"verdict": True, "prune": RESULT, "bench": {"percentiles_ms": {"p50": 0.25}, "schema": 1}})
    assert "8.36x" in text and "p50: 0.25" in text and "schema" not in text


def test_inspect_lists_convolutions() -> None:
    layer = {"name": "conv1", "in_channels": 1, "out_channels": 16, "area": 64, "volume": 1024}
    layer |= {"flops": 18432, "params": 144, "gated": True, "reason": ""}
    frozen = {**layer, "name": "head", "gated": False, "reason": "an output"}
    bn = {**layer, "name": "bn1", "area": 0, "gated": False}
    text = shown({"model": "[bold]m", "layers": [layer, frozen, bn]})
    assert "1 to 16" in text and "no: an output" in text and "bn1" not in text and "1 other layers" in text
    assert "[bold]m" in text  # markup in a name stays text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (1234567, "1,234,567"), (1568.0, "1,568"), (0.12345, "0.1235"), (12345.678, "12,345.68"), ("a", "a")],
)
def test_number(value: object, text: str) -> None:
    assert show.number(value) == text


def test_progress_writes_a_line_per_epoch_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    record = {"step": 10, "epoch": 1, "phase": "prune", "loss": 1.25, "metric": None, "volume": 1500, "budget": 1600.4}
    with Terminal(Console(file=out, width=200)) as progress:
        progress.phase("prune", epochs=2, steps=20)
        progress.step(record)
        progress.epoch({**record, "metric": 0.5, "open": 42})
        progress.done()
    lines = out.getvalue().splitlines()
    assert lines == ["prune 1/2     loss 1.250  metric 50.00%  V 1,500  b 1,600  42 gates open"]


def test_progress_on_a_terminal_shows_the_step_and_the_time_left() -> None:
    out = io.StringIO()
    record = {"step": 10, "epoch": 1, "phase": "prune", "loss": 1.25, "volume": 1500, "budget": 1600.4}
    with Terminal(Console(file=out, width=200, force_terminal=True)) as progress:
        progress.phase("prune", epochs=2, steps=20)
        progress.step(record)
        progress._live.refresh()
    text = out.getvalue()
    assert "prune 1/2" in text and "V 1,500" in text and "b 1,600" in text and "left" in text
