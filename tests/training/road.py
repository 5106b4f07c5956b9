"""A small road through all phases, for tests of what training leaves and goes on from."""

import copy

import torch
from torch import nn

from bar_edge.config import TrainConfig
from bar_edge.data import DataSource
from bar_edge.data.memory import MemorySplit, Pixels
from bar_edge.progress import NoProgress
from bar_edge.training import Journal, load_task, train

TASK = load_task("classification")
CPU = {"device": "cpu", "precision": "fp32"}


def source(images=70, noise=40):
    """Three classes, told apart by which third of the image is bright."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(images) % 3
    pixels = torch.randint(0, noise, (images, 1, 6, 6), generator=generator)
    for i, target in enumerate(targets):
        pixels[i, 0, 2 * target : 2 * target + 2] += 100
    shared = Pixels(pixels.to(torch.uint8), targets)
    cut = torch.arange(images).split([images - 20, 10, 10])
    splits = [MemorySplit(pixels=shared, indices=i, mean=(0.2,), std=(0.2,), automatic=("crop",)) for i in cut]
    return DataSource(
        name="thirds", input_shape=(1, 6, 6), classes=("a", "b", "c"), mean=(0.2,), std=(0.2,),
        fit=splits[0], held_out=splits[1], test=splits[2],
    )  # fmt: skip


def small_network():
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 3)
    )


class Shrinking(nn.Module):
    """A gated network in miniature: one trained factor on the outputs, noisy in training."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.gate, self.step = inner, nn.Parameter(torch.tensor(1.0)), 0

    def forward(self, x):
        noise = torch.rand((), generator=torch.Generator().manual_seed(self.step)) if self.training else 0.5
        return self.inner(x) * (self.gate + 0.1 * noise)


class ShrinkingPruner:
    """Adds a penalty on the factor, and moves it by a momentum of its own."""

    def __init__(self, inner, teacher):
        self.network, self.teacher, self.momentum = Shrinking(inner), teacher.eval(), torch.tensor(0.0)

    def weights(self):
        return list(self.network.inner.parameters())

    def loss(self, data_loss, inputs, outputs):
        with torch.no_grad():
            soft = self.teacher(inputs)
        return 0.5 * data_loss + 0.5 * TASK.distill(outputs, soft, 2.0) + self.network.gate**2

    def step(self):
        self.momentum = 0.9 * self.momentum + self.network.gate.grad
        self.network.gate.data -= 0.01 * self.momentum
        self.network.gate.grad = None
        self.network.step += 1

    def stats(self):
        return {
            "volume": self.network.gate.item(),
            "budget": 1.0,
            "barrier": 0.5,
            "sparsity": 2.0,
            "open": 1.0,
            "flips": 0.0,
        }

    def state_dict(self):
        return {"momentum": self.momentum, "step": self.network.step}

    def load_state_dict(self, state):
        self.momentum, self.network.step = state["momentum"], state["step"]


CONFIG = TrainConfig(dense=3, prune=3, tune=2, batch=16, lr_dense=0.05, ema=0.9, **CPU)


def road(folder, *, resume=False, data=None, progress=None, config=CONFIG):
    """Dense, prune and tune in one journal, as the pipeline does it; returns the weights at the end."""
    data, book = data or source(), Journal(folder, resume=resume)
    dense = small_network()
    train(dense, data, TASK, config, "dense", seed=3, journal=book, progress=progress)
    pruner = ShrinkingPruner(copy.deepcopy(dense), dense)
    train(pruner.network, data, TASK, config, "prune", seed=3, pruner=pruner, journal=book, progress=progress)
    tuned = copy.deepcopy(pruner.network.inner)
    train(tuned, data, TASK, config, "tune", seed=3, teacher=dense, journal=book, progress=progress)
    return {**tuned.state_dict(), "gate": pruner.network.gate.detach(), "momentum": pruner.momentum}


def assert_same(weights, folder, whole):
    assert weights.keys() == whole[0].keys()
    different = [name for name in weights if not torch.equal(weights[name], whole[0][name])]
    assert different == []
    assert (folder / "metrics.jsonl").read_bytes() == whole[1]


class Stop(BaseException):
    """Stands for a process that ends here."""


class StopAt(NoProgress):
    """Ends the process in the given epoch of the given phase, before its line and checkpoint are written."""

    def __init__(self, phase, epoch):
        self.at = (phase, epoch)

    def epoch(self, record):
        if (record["phase"], record["epoch"]) == self.at:
            raise Stop
