"""What a pruning method is: it scores the channels of a dense network. All that follows is the same for every method.

A method is a module with one function, `score(dense, context) -> Scored`, and one line in METHODS. Projection onto the
budget, slicing, parity, fine-tuning and correction by measurement come after it (`bar_edge.runs.run_folder`).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from bar_edge.errors import InputError

if TYPE_CHECKING:  # `--help` lists the methods and loads no torch
    import torch
    from torch import Tensor, nn

    from bar_edge.methods.distillation import Distill
    from bar_edge.methods.gating.layout import GateLayout
    from bar_edge.network import Network
    from bar_edge.records import Budget
    from bar_edge.requests import PruneRequest


class Pruner(Protocol):
    """What a method that trains adds to each step of the training loop."""

    def weights(self) -> list[nn.Parameter]:
        """Return what the optimiser of the weights trains."""
        ...

    def loss(self, data_loss: Tensor, inputs: Tensor, outputs: Any, /) -> Tensor:
        """Return the training loss: data term, distillation, penalty."""
        ...

    def step(self) -> None:
        """Do what follows each step of the weights."""
        ...

    def stats(self) -> Mapping[str, float]:
        """Return figures of the last step for metrics.jsonl, as many of its keys as the method has."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs, tensors and numbers only."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a state."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What a method may use beside the dense network."""

    #: every option of the run, the method's own among them
    config: PruneRequest
    #: the gates of the dense network: which scores belong to which channels, and what channels cost
    layout: GateLayout
    budget: Budget
    #: of the cost, in the budget's unit
    limit: float
    #: optimiser steps of the prune phase; 0 trains nothing
    steps: int
    #: whom to learn from, None where the task cannot distil
    teacher: nn.Module | None
    soft_loss: Distill
    #: (outputs, targets) -> the task's loss, a mean over the images
    loss: Callable[[Any, Any], Tensor]
    #: trains a network by a pruner for the epochs of the prune phase; a stopped run goes on
    train: Callable[[nn.Module, Pruner], None]
    #: batches of training images and targets on a device, for statistics; not augmented, always the same
    batches: Callable[[torch.device], Iterator[tuple[Tensor, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What a method leaves: a network of the dense shape, and how much it needs each channel."""

    #: the weights from which the plan is cut
    network: Network
    #: (gates,) in the order of the layout; the lowest close first
    scores: Tensor
    #: (gates,) bool: what the method itself left open; None where it only ranks them
    opened: Tensor | None = None
    #: how many gates the method closed at the end for the budget's sake alone
    forced: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One line of METHODS."""

    #: for --help
    says: str
    #: has the function `score(dense, context) -> Scored`; loaded on first use
    module: str
    #: uses the epochs of the prune phase itself (`context.train`); otherwise the sliced network gets them
    trains: bool = False

    def score(self, dense: Network, context: Context) -> Scored:
        """Return the scores of a dense network's channels."""
        score: Callable[[Network, Context], Scored] = importlib.import_module(self.module).score
        return score(dense, context)


METHODS: dict[str, Method] = {
    "bar": Method(
        says="gates trained with the weights under a falling budget", module="bar_edge.methods.bar.method", trains=True
    ),
    "fisher": Method(says="channels that the loss misses least per cost go", module="bar_edge.methods.fisher"),
    "magnitude": Method(says="filters with the smallest weights go", module="bar_edge.methods.magnitude"),
    "slimming": Method(
        says="BatchNorm scales trained towards zero, the smallest go", module="bar_edge.methods.slimming", trains=True
    ),
    "random": Method(says="an equal share of every layer, drawn at random", module="bar_edge.methods.random"),
}


def find_method(name: str) -> Method:
    """Return a method by its name; raises InputError for one that there is not."""
    if name not in METHODS:
        raise InputError(
            f"--method {', '.join(METHODS)}", got=name, consequence="nothing was started", remedy="name one of them"
        )
    return METHODS[name]
