"""A run that was stopped goes on: nothing that finished phases left is lost, and the page is written in the end."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bar_edge.config import TrainConfig
from bar_edge.errors import InputError
from bar_edge.pipeline import deploy, prune
from bar_edge.progress import NoProgress
from bar_edge.requests import DeployRequest, PruneRequest
from bar_edge.runs.lock import alone_in
from bar_edge_cli.main import main

REQUEST = PruneRequest(
    model="resnet8",
    budget="4x",
    method="random",
    train=TrainConfig(dense=1, prune=1, tune=1, batch=256, precision="fp32", device="cpu"),
)


class Stops(NoProgress):
    """Interrupts a phase at its first step, before its first checkpoint."""

    def __init__(self, phase: str) -> None:
        self.stopped = phase

    def step(self, record: dict[str, Any]) -> None:
        if record["phase"] == self.stopped:
            raise KeyboardInterrupt


def phases(run: Path) -> list[str]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return list(dict.fromkeys(json.loads(line)["phase"] for line in lines))


def test_a_stop_before_the_first_checkpoint_of_a_phase_erases_no_metrics(tmp_path: Path) -> None:
    for phase in ("prune", "tune"):
        with pytest.raises(KeyboardInterrupt):
            prune(REQUEST, tmp_path / "run", resume=True, progress=Stops(phase))
    prune(REQUEST, tmp_path / "run", resume=True)
    assert phases(tmp_path / "run") == ["dense", "prune", "tune"]
    (tmp_path / "run" / "report.html").unlink()
    prune(REQUEST, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "report.html").is_file()


class Notes(NoProgress):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    """Refused while the first lives, with --resume too and for deploy; free as soon as it is dead, however it died."""
    run = tmp_path / "run"
    holds = "import sys, time; from pathlib import Path; from bar_edge.runs.lock import alone_in\n"
    holds += "with alone_in(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    paths = os.pathsep.join(str(Path(__file__).parents[2] / name) for name in (".", "cli", "kernels", "calibration"))
    command = [sys.executable, "-c", holds, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}) as other:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        for resume in (False, True):
            with pytest.raises(InputError, match="no other process"):
                prune(REQUEST, run, resume=resume)
        with pytest.raises(InputError, match="no other process"):
            deploy(DeployRequest(prune=REQUEST), run)
        other.kill()
        other.wait()
    with alone_in(run):
        pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    prune(REQUEST, folder)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "file",
    [
        *("result.json", "network/network.json", "network/weights.safetensors"),
        *("plan.json", "checkpoints/sliced/state.json", "checkpoints/sliced/weights.safetensors"),
        *("checkpoints/gates.safetensors", "checkpoints/folded/network.json", "dense/weights.safetensors"),
    ],
)
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_damaged_stage_is_made_anew(
    finished: Path, tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    """Whatever is whole is used; the run ends as before."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    # the stages behind the damaged one have not been reached yet
    order = ("dense", "checkpoints/gates", "checkpoints/folded", "checkpoints/sliced", "plan", "network", "result")
    place = next(i for i, name in enumerate(order) if file.startswith(name))
    if place < order.index("result"):
        (run / "result.json").unlink()
    if place < order.index("checkpoints/sliced"):
        (run / "plan.json").unlink()
    damage(run / file)
    told = Notes()
    prune(REQUEST, run, resume=True, progress=told)
    for name in ("result.json", "plan.json", "network/weights.safetensors"):
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name
    if damage is cut and file != "checkpoints/folded/network.json" and not file.startswith("network"):
        assert any("damaged" in note for note in told.notes)


def test_a_comment_in_the_config_changes_no_options(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = run / "config.toml"
    config.write_text("# mine\n" + config.read_text().replace("seed = 0", "seed  =  0 # as always"))
    prune(REQUEST, run, resume=True)
    with pytest.raises(InputError, match="options of the run"):
        prune(dataclasses.replace(REQUEST, seed=1), run, resume=True)


def test_files_have_the_mode_that_the_umask_leaves(finished: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    files = [path for path in finished.rglob("*") if path.is_file() and path.name != ".lock"]
    assert {path.name for path in files if path.stat().st_mode & 0o777 != 0o666 & ~mask} == set()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_the_users_error_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: int
) -> None:
    def full(_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", full)
    command = "prune --model resnet8 --budget 4x --method random --epochs dense=1,prune=0,tune=0"
    assert main([*command.split(), "--out", str(tmp_path / "run")]) == 2
    assert os.strerror(error) in capfd.readouterr().err
    assert [path for path in tmp_path.rglob("*.tmp")] == []


def test_places_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file")
    (tmp_path / "file").write_text("")
    for out in ("run", "file", "file/run", "n" * 300):
        assert main(f"prune --budget 4x --model resnet8 --out {tmp_path / out}".split()) == 2
        assert "bug" not in capfd.readouterr().err
