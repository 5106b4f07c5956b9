"""What training asks of a pruning method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn


class Pruner(Protocol):
    """What a method such as `BAR` adds to the training of its gated network."""

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
        """Return volume, budget, barrier, sparsity, open and flips of the last step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs, tensors and numbers only."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a state."""
        ...
