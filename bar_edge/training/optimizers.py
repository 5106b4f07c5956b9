"""The weights' optimiser, learning-rate schedules and the moving average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from bar_edge.config import TrainConfig
from bar_edge.errors import InputError

Phase = Literal["dense", "prune", "tune"]


def make_optimizer(weights: Iterable[nn.Parameter], config: TrainConfig, lr: float) -> torch.optim.Optimizer:
    """Return SGD (Nesterov .9), AdamW or Adam over the trainable weights; biases and norms (1-D) do not decay.

    Raises InputError if every weight is frozen.
    """
    trainable = [weight for weight in weights if weight.requires_grad]
    groups = [
        {"params": [w for w in trainable if w.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [w for w in trainable if w.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise InputError("a network with trainable weights", got="every parameter has requires_grad=False")
    if config.optimizer != "sgd":
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        return kind(groups, lr=lr, fused=True)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)


def learning_rate(config: TrainConfig, phase: Phase, step: int, steps: int) -> float:
    """Return the learning rate of step `step` (from 0) out of `steps` in a phase.

    onecycle: cosine from a 25th of the peak up to the peak at 30 % of the steps, then down towards 0
    (Smith and Topin 2017, without the momentum cycle); cosine: from the peak towards 0; constant: the peak,
    and a tenth of it in the last fifth of `tune`.
    """
    peak = config.rate(phase)
    done = step / steps
    if config.schedule == "constant":
        return peak / 10 if phase == "tune" and done >= 0.8 else peak
    if config.schedule == "cosine":
        return peak * _falling_cosine(done)
    if done < 0.3:
        return peak * (1 - (1 - 1 / 25) * _falling_cosine(done / 0.3))
    return peak * _falling_cosine((done - 0.3) / 0.7)


class MovingAverage:
    """Exponential moving average of a network's floating-point state, BatchNorm statistics included."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = [t for t in network.state_dict().values() if t.is_floating_point()]
        self.average = [t.clone() for t in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (from 0); early steps weigh more, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.live, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the network hold the average inside the `with` block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def load(self, average: list[Tensor]) -> None:
        """Go on from an average that was saved; raises ValueError if it is of another network."""
        for own, saved in zip(self.average, average, strict=True):
            own.copy_(saved)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the network's values and the average."""
        for average, live in zip(self.average, self.live, strict=True):
            held: Tensor = live.clone()
            live.copy_(average)
            average.copy_(held)


def _falling_cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2
