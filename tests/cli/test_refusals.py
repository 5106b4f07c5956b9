"""Every refusal of a request comes before a model is built and before data is read, in every command."""

import importlib.util
from pathlib import Path

import pytest
import torch

from bar_edge.errors import InputError
from bar_edge.requests import PruneRequest, check_trusted
from bar_edge_cli.main import main

#: a model and a data set that end the test with a bug's exit code when they are asked for
FACTORIES = """
class Called(BaseException):
    pass

def model():
    raise Called("the model was built")

def data():
    raise Called("the data was read")
"""
RUN = "--model factories.py:model --data factories.py:data --out run"
#: options of prune that are refused, with the exit code
OF_PRUNE = {
    "--budget 8": 2,
    "--budget 0.5x": 2,
    "--budget 120%": 2,
    "--method nonsense": 2,
    "--preset nonsense": 2,
    "--task nonsense": 2,
    "--round-to 0": 2,
    "--max-drop nan": 2,
    "--weights nowhere.pt": 2,
    "--teacher nowhere.pt": 2,
    "--table nowhere.json": 2,
    "--epochs dense=-1": 2,
    "--batch 0": 2,
    "--device nonsense": 2,
    "--set train.augment=shear": 2,
    "--set train.nonsense=1": 2,
    "--set bar.steepness=-1": 2,
}
#: options of export and bench that `deploy` has, too
OF_DEPLOY = {
    "--target torch": 2,
    "--target banana": 2,
    "--precision bf16 --target onnx": 2,
    "--precision nonsense": 2,
    "--lowering slcies": 2,
    "--lowering slices,nonsense:4": 2,
    "--recipe banana": 2,
    "--recipe onnxruntime-cpu": 2,
    "--precision int8 --recipe tensorrt": 2,
    "--engine batch=many": 2,
    "--engine nonsense=1": 2,
    "--runtime nonsense": 2,
    "--on ssh:/board": 2,
    "--on board": 2,
    "--threads 0": 2,
    "--seconds 0": 2,
    "--seconds nan": 2,
    "--bench-batch 0": 2,
    "--choice-seconds -1": 2,
    "--against nowhere.onnx": 2,
    "--budget 8ms --budget 9ms": 2,
    "--budget 8x --budget 9x": 2,
    "--target trt-bundle --precision bf16 --max-drop 1 --on ssh://board": 3,
}
OTHERS = {
    "prune --model resnet21 --data factories.py:data --out run": 2,
    "prune --model factories.py:model --data nowhere --out run": 2,
    "prune --model nowhere.py:model --data factories.py:data --out run": 2,
    "prune --data factories.py:data --out run": 2,
    "inspect --model factories.py:model --data factories.py:data --budget nonsense": 2,
    "inspect --model factories.py:model --data factories.py:data --budget 8ms": 2,
    "inspect --model factories.py:model --data factories.py:data --table nowhere.json": 2,
    "inspect --model factories.py:model --input 3x": 2,
    "inspect --model resnet21 --data factories.py:data": 2,
    "profile --model factories.py:model --data factories.py:data --out t.json --runtime nonsense": 2,
    "profile --model factories.py:model --data factories.py:data --out t.json --lowering slcies": 2,
    "profile --model factories.py:model --data factories.py:data --out t.json --threads 0": 2,
    "profile --model factories.py:model --data factories.py:data --out t.json --on nonsense": 2,
    "slice --model factories.py:model --data factories.py:data --plan nowhere.json --out o": 2,
    "slice --model factories.py:model --data factories.py:data --plan plan.json --weights nowhere.pt --out o": 2,
    "export stored --target banana": 2,
    "export stored --precision bf16": 2,
    "export stored --lowering slcies": 2,
    "export stored --runtime nonsense": 2,
    "export stored --data random --max-drop 1": 2,
    "export stored --on ssh://board": 2,
    "export stored": 2,
    "export stored --target openvino --precision int8 --data factories.py:data": 2,
    "export nowhere": 2,
    "bench a.onnx --runtime nonsense": 2,
    "bench a.onnx --budget 8x": 2,
    "bench a.onnx --batch 0": 2,
    "bench a.onnx --precision int8": 2,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the two factories, and a stored run that names them."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "a.onnx").write_bytes(b"")
    (tmp_path / "plan.json").write_text('{"schema": 1, "network": "0", "kept": {}}')
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "result.json").write_text("{}")
    toml = 'model = "factories.py:model"\ndata = "factories.py:data"\ntask = "factories.py:task"\n'
    (tmp_path / "stored" / "config.toml").write_text(toml)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines() -> list[tuple[str, int]]:
    found = [(f"{command} {RUN} {text}", code) for command in ("prune", "deploy") for text, code in OF_PRUNE.items()]
    found += [(f"deploy {RUN} {text}", code) for text, code in OF_DEPLOY.items()]
    found += list(OTHERS.items())
    lacking = 2 if importlib.util.find_spec("tensorrt") else 3
    if lacking == 3:
        found += [(f"deploy {RUN} --target {target}", 3) for target in ("trt", "trt-bundle")]
        found += [(f"bench a.onnx --runtime {runtime}", 3) for runtime in ("tensorrt", "onnxruntime-tensorrt")]
        found += [("export stored --target trt", 3)]
    if not torch.cuda.is_available():
        found += [(f"prune {RUN} --device cuda", 3), (f"deploy {RUN} --runtime onnxruntime-cuda", 3)]
    return found


@pytest.mark.parametrize(("line", "code"), lines())
def test_a_refusal_comes_first(place: Path, capfd: pytest.CaptureFixture[str], line: str, code: int) -> None:
    assert main(line.split()) == code, capfd.readouterr().err
    assert "required: " in capfd.readouterr().err
    assert not (place / "run").exists()


def test_the_factories_would_be_called(place: Path) -> None:
    """Without a fault both are reached: the tests above fail for a refusal that comes late."""
    for line in (f"prune {RUN}", f"deploy {RUN}", "inspect --model factories.py:model"):
        with pytest.raises(BaseException, match="was (built|read)"):
            main(line.split())


@pytest.mark.parametrize("option", ["--data factories.py:data --task factories.py:task", "--trust-run"])
def test_code_of_a_stored_run_is_imported_only_if_the_command_line_says_so(place: Path, option: str) -> None:
    """With the option the run is read on, and found to be no result."""
    command = "export stored --precision int8 " + option
    assert main(command.split()) == 2


@pytest.mark.parametrize("command", ["prune", "deploy"])
def test_a_stored_configuration_is_data_too(place: Path, capfd: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--config", "stored/config.toml", "--out", "run"]) == 2
    assert "--trust-run" in capfd.readouterr().err
    with pytest.raises(BaseException, match="was read"):
        (place / "stored" / "config.toml").write_text('model = "factories.py:model"\ndata = "factories.py:data"\n')
        main([command, "--config", "stored/config.toml", "--trust-run", "--out", "run"])


@pytest.mark.parametrize(
    "stored",
    [
        {"data": "a.b:c"},
        {"task": "file.py:Task"},
        {"model": "file.py:model"},
        {"model_arg": ["trust_remote_code=true"], "model": "hf:somebody/model"},
    ],
)
def test_what_names_code(stored: dict[str, object]) -> None:
    with pytest.raises(InputError, match="--trust-run"):
        check_trusted(stored, {})
    check_trusted(stored, stored)
    check_trusted({"model": "hf:somebody/model", "data": "digits", "task": "segmentation"}, {})


def test_a_file_of_ones_own_is_no_stored_run(place: Path) -> None:
    (place / "mine.toml").write_text('model = "factories.py:model"\ndata = "factories.py:data"\n')
    with pytest.raises(BaseException, match="was read"):
        main(["prune", "--config", "mine.toml", "--out", "run"])


def test_a_request_is_frozen() -> None:
    with pytest.raises(AttributeError):
        PruneRequest(model="m").model = "n"  # type: ignore[misc]
