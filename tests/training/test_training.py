"""Training phases: schedules, averages, precision, and runs that are stopped and go on as if they had not been."""

import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bar_edge.config import DistillConfig, TrainConfig
from bar_edge.errors import EnvironmentLacks, InputError
from bar_edge.progress import NoProgress
from bar_edge.training import (
    Journal,
    choose_device,
    choose_precision,
    evaluate,
    hardware,
    journal,
    loop,
    train,
)
from bar_edge.training.optimizers import MovingAverage, learning_rate, make_optimizer
from tests.training.road import CONFIG, CPU, TASK, Stop, StopAt, assert_same, road, small_network, source

KEYS = ["step", "epoch", "phase", "loss", "data_loss", "barrier", "volume", "budget", "sparsity"]
KEYS += ["open", "flips", "lr", "metric"]


def test_the_metrics_of_a_run(whole):
    lines = [json.loads(line) for line in whole[1].decode().splitlines()]
    assert [(r["phase"], r["epoch"], r["step"]) for r in lines] == [
        ("dense", 1, 3), ("dense", 2, 6), ("dense", 3, 9), ("prune", 1, 3), ("prune", 2, 6), ("prune", 3, 9),
        ("tune", 1, 3), ("tune", 2, 6),
    ]  # fmt: skip
    assert all(list(r) == KEYS and 0 <= r["metric"] <= 1 for r in lines)
    assert lines[0]["volume"] is None and lines[3]["barrier"] == 0.5 and lines[3]["open"] == 1
    assert lines[5]["volume"] < lines[3]["volume"] < 1  # the gate's own step moved it
    assert lines[0]["loss"] == lines[0]["data_loss"] and lines[6]["loss"] != lines[6]["data_loss"]


def test_a_run_repeats_and_its_seed_matters(tmp_path, whole):
    assert_same(road(tmp_path), tmp_path, whole)
    other = small_network()
    train(other, source(), TASK, CONFIG, "dense", seed=4)
    again = small_network()
    train(again, source(), TASK, CONFIG, "dense", seed=3)
    assert not torch.equal(other[0].weight, again[0].weight)


def test_every_epoch_of_every_phase_draws_its_own_order(tmp_path):
    data, drawn = source(), []

    class Watched:
        def __len__(self):
            return len(data.fit)

        def n_batches(self, *args, **options):
            return data.fit.n_batches(*args, **options)

        def batches(self, batch, **options):
            drawn.append((options["seed"], options["epoch"]))
            assert options["train"] and options["augment"] == "auto"
            return data.fit.batches(batch, **options)

    road(tmp_path, data=dataclasses.replace(data, fit=Watched()))
    assert [epoch for _, epoch in drawn] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(set(drawn)) == 8


@pytest.mark.parametrize("at", [("dense", 1), ("dense", 3), ("prune", 1), ("prune", 2), ("tune", 1), ("tune", 2)])
def test_resume_at_every_kind_of_boundary(tmp_path, whole, at):
    with pytest.raises(Stop):
        road(tmp_path, progress=StopAt(*at))
    assert_same(road(tmp_path, resume=True), tmp_path, whole)


def test_resume_of_a_finished_run_changes_nothing(tmp_path, whole):
    road(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").iterdir()}
    assert_same(road(tmp_path, resume=True), tmp_path, whole)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").iterdir()} == before


def half_written(monkeypatch, calls):
    """Let the process end in the middle of writing its `calls`-th checkpoint."""
    whole_save, count = torch.save, iter(range(1, 100))

    def save(state, file):
        if next(count) == calls:
            file.write(b"PK\x03\x04 half a checkpoint")
            file.flush()
            raise Stop
        whole_save(state, file)

    monkeypatch.setattr(journal.torch, "save", save)


@pytest.mark.parametrize("calls", [1, 2, 4, 8])
def test_resume_after_a_stop_inside_a_checkpoint(tmp_path, whole, monkeypatch, calls):
    with monkeypatch.context() as patch:
        half_written(patch, calls)
        with pytest.raises(Stop):
            road(tmp_path)
    assert_same(road(tmp_path, resume=True), tmp_path, whole)


def test_resume_after_a_stop_before_the_rename(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(Stop()))
        road(tmp_path)
    assert_same(road(tmp_path, resume=True), tmp_path, whole)


def test_resume_cuts_a_torn_line(tmp_path, whole):
    with pytest.raises(Stop):
        road(tmp_path, progress=StopAt("prune", 2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "epo')
    assert_same(road(tmp_path, resume=True), tmp_path, whole)


def test_keyboard_interrupt_inside_an_epoch(tmp_path, whole):
    data = source()

    class Interrupted:
        def __len__(self):
            return len(data.fit)

        calls = 0

        def __getattr__(self, name):
            return getattr(data.fit, name)

        def batches(self, *args, **options):
            Interrupted.calls += 1
            for number, batch in enumerate(data.fit.batches(*args, **options)):
                if (Interrupted.calls, number) == (5, 1):
                    raise KeyboardInterrupt
                yield batch

    with pytest.raises(KeyboardInterrupt):
        road(tmp_path, data=dataclasses.replace(data, fit=Interrupted()))
    assert_same(road(tmp_path, resume=True), tmp_path, whole)


CHILD = """
import sys, torch
torch.set_num_threads(1)
import tests.training.test_training as t
from pathlib import Path
class Tell(t.NoProgress):
    def phase(self, *_): print("training", flush=True)
weights = t.road(Path(sys.argv[1]), resume=True, progress=Tell(), config=t.LONG)
torch.save(weights, sys.argv[2])
"""
LONG = TrainConfig(dense=40, prune=40, tune=30, batch=16, lr_dense=0.05, ema=0.9, **CPU)


@pytest.mark.slow
def test_killed_at_five_random_moments(tmp_path):
    roots = os.pathsep.join(str(Path(__file__).parents[2] / name) for name in (".", "cli", "kernels", "calibration"))
    environment = {**os.environ, "PYTHONPATH": roots}

    def start(name):
        arguments = [str(tmp_path / name), str(tmp_path / f"{name}.pt")]
        child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], env=environment, stdout=subprocess.PIPE)
        child.stdout.readline()  # training began, or nothing was left to train
        return child

    with start("whole") as child:
        began = time.monotonic()
        assert child.wait() == 0
    length_s = time.monotonic() - began
    kills = 0
    for moment in torch.rand(5).tolist():
        with start("killed") as child:
            time.sleep(moment * length_s / 5)
            child.kill()
            kills += child.wait() == -signal.SIGKILL
    assert kills >= 3  # a busy machine may let a run end early
    with start("killed") as child:
        assert child.wait() == 0
    whole, killed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    assert [name for name in whole if not torch.equal(whole[name], killed[name])] == []
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_fresh_run_forgets_the_one_before(tmp_path, whole):
    with pytest.raises(Stop):
        road(tmp_path, progress=StopAt("tune", 1))
    assert_same(road(tmp_path), tmp_path, whole)


def test_resume_refuses_other_options_and_other_networks(tmp_path):
    data, config = source(), TrainConfig(dense=2, batch=16, **CPU)
    train(small_network(), data, TASK, config, "dense", journal=Journal(tmp_path))
    resumed = Journal(tmp_path, resume=True)
    with pytest.raises(InputError, match="epochs=3") as caught:
        train(small_network(), data, TASK, TrainConfig(dense=3, batch=16, **CPU), "dense", journal=resumed)
    assert "epochs=2" in caught.value.required
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(InputError, match="this network"):
        train(other, data, TASK, config, "dense", journal=resumed)


def test_lines_at_a_fixed_stride(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_STRIDE", 2)
    told = []

    class Listener(NoProgress):
        def phase(self, name, epochs, steps):
            told.append((name, epochs, steps))

        def step(self, record):
            told.append(record["step"])

        def epoch(self, record):
            told.append(("epoch", record["epoch"]))

        def done(self):
            told.append("done")

    config = TrainConfig(dense=2, batch=10, **CPU)
    train(small_network(), source(), TASK, config, "dense", journal=Journal(tmp_path), progress=Listener())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["metric"] is None) for r in lines] == [
        (2, True), (4, True), (5, False), (7, True), (9, True), (10, False),
    ]  # fmt: skip
    assert told == [("dense", 2, 10), 2, 4, ("epoch", 1), 5, 7, 9, ("epoch", 2), 10, "done"]


def test_training_learns_and_evaluate_agrees(tmp_path):
    data, network = source(noise=20), small_network()
    assert evaluate(network, data.held_out, TASK, batch=7, **CPU) < 0.7
    train(network, data, TASK, TrainConfig(dense=12, batch=16, lr_dense=0.05, augment="none", **CPU), "dense",
          journal=Journal(tmp_path))  # fmt: skip
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["metric"] >= 0.9 and not network.training
    scores = {evaluate(network, data.held_out, TASK, batch=batch, **CPU) for batch in (1, 3, 10, 64)}
    assert scores == {last["metric"]}


def test_evaluate_leaves_weights_and_modes():
    network = small_network().train()
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate(network, source().test, TASK, batch=4, **CPU)
    assert [m.training for m in network] == [True, False, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_zero_epochs_change_nothing(tmp_path):
    network, book = small_network(), Journal(tmp_path)
    before = copy.deepcopy(network.state_dict())
    train(network, source(), TASK, TrainConfig(dense=0, **CPU), "dense", journal=book)
    assert network.training and all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert list((tmp_path / "checkpoints").iterdir()) == [] and not (tmp_path / "metrics.jsonl").exists()


def test_frozen_parameters_are_untouched():
    network = small_network()
    for parameter in network[0].parameters():
        parameter.requires_grad_(False)
    frozen, trained = network[0].weight.clone(), network[5].weight.clone()
    for optimizer in ("sgd", "adamw"):
        config = TrainConfig(dense=1, batch=16, optimizer=optimizer, lr_dense=0.01, ema=0.5, **CPU)
        train(network, source(), TASK, config, "dense")
    assert torch.equal(network[0].weight, frozen) and not torch.equal(network[5].weight, trained)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="trainable weights"):
        train(network, source(), TASK, TrainConfig(dense=1, **CPU), "dense")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, bad):
    network, data, config = small_network(), source(), TrainConfig(dense=3, batch=16, **CPU)

    class Spoiling(NoProgress):
        def epoch(self, record):
            if record["epoch"] == 1:
                network[5].weight.data[0, 0] = bad

    with pytest.raises(InputError, match="epoch 2 of phase dense") as caught:
        train(network, data, TASK, config, "dense", journal=Journal(tmp_path), progress=Spoiling())
    assert "lr_dense" in caught.value.remedy
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_teacher_is_followed_where_the_task_can():
    data, config = source(), TrainConfig(tune=1, batch=16, augment="none", **CPU)
    teacher = small_network()
    teacher[5].weight.data.mul_(3)
    taught = {}
    for name, alpha in {"none": 0.0, "some": 0.5, "all": 1.0}.items():
        network = small_network()
        train(network, data, TASK, config, "tune", teacher=teacher, distill=DistillConfig(alpha=alpha))
        taught[name] = network[5].weight.detach()
    untaught = small_network()
    train(untaught, data, TASK, config, "tune")
    assert torch.equal(taught["none"], untaught[5].weight)
    assert not torch.equal(taught["some"], taught["all"])
    assert not torch.equal(taught["some"], taught["none"])
    assert teacher[0].weight.grad is None

    class Plain:
        metric_name, higher_is_better = TASK.metric_name, True
        loss, metric, value = TASK.loss, TASK.metric, TASK.value

    network = small_network()
    train(network, data, Plain(), config, "tune", teacher=teacher)
    assert torch.equal(network[5].weight, untaught[5].weight)


def test_schedules():
    def rates(schedule, phase="dense", steps=1000):
        config = TrainConfig(schedule=schedule, lr_dense=0.5, lr_tune=0.2)
        return [learning_rate(config, phase, step, steps) for step in range(steps)]

    onecycle = rates("onecycle")
    assert onecycle[0] == pytest.approx(0.5 / 25) and onecycle[300] == 0.5 == max(onecycle)
    assert onecycle[:301] == sorted(onecycle[:301]) and onecycle[300:] == sorted(onecycle[300:], reverse=True)
    assert onecycle[650] == pytest.approx(0.25) and 0 < onecycle[-1] < 1e-5
    cosine = rates("cosine")
    assert cosine[0] == 0.5 and cosine[500] == pytest.approx(0.25) and 0 < cosine[-1] < 1e-5
    assert set(rates("constant")) == {0.5}
    tune = rates("constant", "tune")
    assert tune == [0.2] * 800 + [0.2 / 10] * 200


def test_biases_and_norms_do_not_decay():
    network = small_network()
    optimizer = make_optimizer(network.parameters(), TrainConfig(weight_decay=0.1), 0.01)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in network.named_parameters()} == {
        "0.weight": 0.1, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "5.weight": 0.1, "5.bias": 0.0,
    }  # fmt: skip
    assert optimizer.defaults["nesterov"] and optimizer.defaults["momentum"] == 0.9


def test_moving_average_against_its_formula():
    network = nn.Linear(1, 1, bias=False)
    ema, expected = MovingAverage(network, 0.5), network.weight.item()
    for step in range(20):
        network.weight.data.fill_(float(step))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with ema.in_place():
        assert network.weight.item() == pytest.approx(expected, rel=1e-6)  # float32 against float64
    assert network.weight.item() == 19.0


def test_the_average_is_what_training_returns(tmp_path):
    config = TrainConfig(dense=2, batch=16, ema=0.99, **CPU)
    network, data = small_network(), source()
    train(network, data, TASK, config, "dense", journal=Journal(tmp_path))
    state = torch.load(tmp_path / "checkpoints" / "dense.pt", weights_only=True)
    assert torch.equal(network[0].weight, state["ema"][0]) and not torch.equal(
        network[0].weight, state["network"]["0.weight"]
    )
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["metric"] == evaluate(network, data.held_out, TASK, batch=16, **CPU)


@pytest.mark.parametrize("native", [False, True])
def test_precision_follows_the_processor(monkeypatch, native):
    monkeypatch.setattr(hardware, "_cpu_computes_bf16", lambda: native)
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == ("bf16" if native else "fp32")
    assert choose_precision("fp32", cpu) == "fp32" and choose_precision("bf16", cpu) == "bf16"


def test_bf16_computes_losses_in_float32_and_keeps_weights():
    seen = []

    class Watching(type(TASK)):
        def loss(self, outputs, targets):
            seen.append(outputs.dtype)
            return super().loss(outputs, targets)

    network, products = small_network(), []
    network[0].register_forward_hook(lambda *call: products.append(call[2].dtype))
    config = TrainConfig(dense=1, batch=16, device="cpu", precision="bf16")
    train(network, source(), Watching(), config, "dense", teacher=small_network())
    assert set(seen) == {torch.float32} and set(products) == {torch.bfloat16}
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    with pytest.raises(EnvironmentLacks, match="CUDA"):
        choose_device("cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_training_on_a_gpu(tmp_path):
    network, data = small_network(), source(noise=20)
    config = TrainConfig(dense=12, batch=16, lr_dense=0.05, augment="none", device="cuda")
    train(network, data, TASK, config, "dense", journal=Journal(tmp_path), teacher=small_network())
    assert network[0].weight.is_cuda and evaluate(network, data.test, TASK, batch=16) >= 0.9
    resumed = small_network()
    train(resumed, data, TASK, config, "dense", journal=Journal(tmp_path, resume=True), teacher=small_network())
    assert torch.equal(resumed[0].weight, network[0].weight)
