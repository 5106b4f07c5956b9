"""Stops within an epoch, by signals and by kills; checkpoints that are damaged: nothing is lost but what was torn."""

import dataclasses
import json
import os
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch

from bar_edge.config import TrainConfig
from bar_edge.errors import InputError, Terminated
from bar_edge.models import load_weights
from bar_edge.progress import NoProgress
from bar_edge.training import Journal, loop, train
from bar_edge.training.journal import read_checkpoint
from tests.training.road import CONFIG, TASK, Stop, StopAt, assert_same, road, small_network, source

#: so that a line is written after each of the three steps of an epoch, and a checkpoint too
OFTEN = {"checkpoint_minutes": 1e-9}


class SignalAt(NoProgress):
    """Sends this process a signal at a step of a phase."""

    def __init__(self, phase, step, number):
        self.at, self.number, self.steps = (phase, step), number, []

    def step(self, record):
        self.steps.append((record["phase"], record["step"]))
        if self.steps[-1] == self.at:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def unwinding():
    """What the command does with signals: SIGTERM and SIGHUP unwind it, as Ctrl-C does."""

    def end(number, _):
        raise Terminated(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    # a shell that starts the tests in the background ignores it
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def every_step(monkeypatch):
    monkeypatch.setattr(loop, "LOG_STRIDE", 1)


@pytest.fixture(scope="module")
def by_steps(tmp_path_factory):
    """A run that was never stopped, with a line for each step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_STRIDE", 1)
        folder = tmp_path_factory.mktemp("by_steps")
        return road(folder), (folder / "metrics.jsonl").read_bytes()


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.mark.parametrize(
    ("phase", "step", "number"),
    [
        *[("dense", 1, TERM), ("dense", 3, TERM), ("dense", 5, INT)],
        *[("prune", 2, TERM), ("prune", 7, HUP), ("tune", 1, INT), ("tune", 6, TERM)],
    ],
)
def test_a_signal_loses_no_step(tmp_path, by_steps, every_step, unwinding, phase, step, number):
    with pytest.raises(KeyboardInterrupt if number == INT else Terminated):
        road(tmp_path, progress=SignalAt(phase, step, number))
    resumed = SignalAt("", 0, 0)
    assert_same(road(tmp_path, resume=True, progress=resumed), tmp_path, by_steps)
    assert (phase, step) not in resumed.steps  # it is not done again


def test_a_stop_between_two_lines_of_metrics(tmp_path, whole, monkeypatch, unwinding):
    """The losses that no line told of yet are told by the line after the resume."""
    done = []

    def step(self, *arguments):
        done.append(step_before(self, *arguments))
        if len(done) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return done[-1]

    step_before = loop._Training._step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Training, "_step", step)
        road(tmp_path)
    assert len(done) == 5
    assert_same(road(tmp_path, resume=True), tmp_path, whole)


@pytest.mark.parametrize("at", [("dense", 2), ("prune", 5), ("tune", 4)])
def test_a_kill_costs_no_more_than_the_minutes_between_checkpoints(tmp_path, by_steps, every_step, at):
    class Kill(NoProgress):
        def step(self, record):
            if (record["phase"], record["step"]) == at:
                raise Stop

    often = dataclasses.replace(CONFIG, **OFTEN)
    with pytest.raises(Stop):
        road(tmp_path, progress=Kill(), config=often)
    resumed = SignalAt("", 0, 0)
    assert_same(road(tmp_path, resume=True, progress=resumed, config=often), tmp_path, by_steps)
    assert resumed.steps[0] == at  # the step that was killed, and none before


def test_ignored_signals_stay_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at = SignalAt("dense", 3, signal.SIGHUP)
        train(small_network(), source(), TASK, TrainConfig(dense=2, batch=16, device="cpu", precision="fp32"), "dense",
              journal=Journal(tmp_path), progress=at)  # fmt: skip
        assert at.steps[-1] == ("dense", 6)
    finally:
        signal.signal(signal.SIGHUP, before)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewritten(**changes):
    def change(path):
        state = torch.load(path, weights_only=True)
        torch.save({**state, **changes}, path)

    return change


def spoil(path):
    state = torch.load(path, weights_only=True)
    next(iter(state["network"].values()))[0] = float("nan")
    torch.save(state, path)


def not_plain(path):
    torch.save({"settings": Path("not plain data")}, path)


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10_000_000))


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-300]),
    "empty": lambda path: path.write_bytes(b""),
    "another file": lambda path: path.write_bytes(b"\x89PNG and more"),
    "nan": spoil,
    "epochs 99": rewritten(epochs_done=99),
    "epochs -1": rewritten(epochs_done=-1),
    "step -1": rewritten(step=-1),
    "text": rewritten(epochs_done="two"),
    "not plain data": not_plain,
    "a bomb": bomb,
}


class Notes(NoProgress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_costs_one_epoch_and_is_told(tmp_path, whole, damage):
    with pytest.raises(Stop):
        road(tmp_path, progress=StopAt("dense", 3))
    DAMAGE[damage](tmp_path / "checkpoints" / "dense.pt")
    told = Notes()
    train(small_network(), source(), TASK, CONFIG, "dense", seed=3,
          journal=Journal(tmp_path, resume=True, note=told.note))  # fmt: skip
    assert len(told.notes) == 1
    assert told.notes[0].startswith("checkpoints/dense.pt is damaged (")
    assert told.notes[0].endswith("the one before is used") and "weights_only" not in told.notes[0]
    first = [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert first == [1, 2, 3]
    assert_same(road(tmp_path, resume=True), tmp_path, whole)


def test_two_damaged_checkpoints_cost_the_phase(tmp_path, whole):
    with pytest.raises(Stop):
        road(tmp_path, progress=StopAt("prune", 3))
    for file in (tmp_path / "checkpoints").glob("prune*.pt"):
        flip(file)
    assert_same(road(tmp_path, resume=True), tmp_path, whole)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_whole_one(tmp_path, monkeypatch):
    """Damage, a resume, and a stop inside the next save: the whole one is still there."""
    journal = Journal(tmp_path)
    whole = {"settings": {"epochs": 3}, "step": 0, "network": {}, "optimizer": {}, "ema": None, "pruner": None}
    for epoch in (1, 2):
        journal.save("dense", {**whole, "epochs_done": epoch})
    DAMAGE["truncated"](tmp_path / "checkpoints" / "dense.pt")
    resumed = Journal(tmp_path, resume=True)
    assert resumed.load("dense", {"epochs": 3})["epochs_done"] == 1
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr("bar_edge.training.journal.write_bytes", lambda *_: (_ for _ in ()).throw(Stop()))
        resumed.save("dense", {**whole, "epochs_done": 2})
    assert Journal(tmp_path, resume=True).load("dense", {"epochs": 3})["epochs_done"] == 1


def test_a_checkpoint_that_unpacks_to_more_than_it_has_is_not_unpacked(tmp_path):
    path = tmp_path / "dense.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("archive/data.pkl", "w") as part:
        for _ in range(300):
            part.write(bytes(1_000_000))
    start = time.process_time()
    with pytest.raises(InputError, match="larger than the file"):
        read_checkpoint(path)
    assert time.process_time() - start < 0.2
    with pytest.raises(InputError, match="larger than the file"):
        load_weights(small_network(), path)


def test_a_checkpoint_that_is_gone(tmp_path, whole):
    with pytest.raises(Stop):
        road(tmp_path, progress=StopAt("prune", 3))
    for file in (tmp_path / "checkpoints").glob("dense*.pt"):
        file.unlink()
    again = road(tmp_path, resume=True)  # what it cost is trained again; the metrics of the later phase are lost
    assert [name for name in again if not torch.equal(again[name], whole[0][name])] == []


@pytest.mark.parametrize("loss", [1, 200, None])
def test_metrics_that_are_gone_block_no_checkpoint(tmp_path, whole, loss):
    with pytest.raises(Stop):
        road(tmp_path, progress=StopAt("dense", 3))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-loss] if loss else b"")
    told = Notes()
    network = small_network()
    journal = Journal(tmp_path, resume=True, note=told.note)
    train(network, source(), TASK, CONFIG, "dense", seed=3, journal=journal)
    assert "metrics.jsonl has lost" in told.notes[0]
    assert read_checkpoint(tmp_path / "checkpoints" / "dense.pt")["epochs_done"] == 3
    assert all(json.loads(line) for line in metrics.read_text().splitlines())


def test_what_a_killed_process_left_is_swept(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".4711.tmp").write_bytes(b"half")
    Journal(tmp_path, resume=True)
    assert list((tmp_path / "checkpoints").iterdir()) == []
