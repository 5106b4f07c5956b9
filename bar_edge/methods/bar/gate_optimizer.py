"""How gates move, for any length of schedule and any network."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bar_edge.config import BarConfig
from bar_edge.methods.gating.hard_concrete import is_open


class GateOptimizer(Protocol):
    """Moves log alpha once per training step."""

    def step(self, data_gradient: Tensor, cost_gradient: Tensor, barrier: float, weight: float) -> None:
        """Move the gates against both gradients.

        data_gradient: of the data loss, (gates,); cost_gradient: of the expected cost L_S, (gates,);
        barrier: f, weight: lambda, so that the gradient of the whole loss is data + weight * f * cost.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


class BalancedSteps:
    """Each of the two gradients divided by its own root mean square over all open gates, then added.

    One common divisor per gradient keeps what Adam throws away: large areas are pushed harder, and the
    data decide which of them resist. The push grows with the barrier f, hence with how late the network is.
    A step of size 1 in this measure, taken `steps` times, moves a gate by `travel`, however long the
    schedule. Scaling the loss or the cost changes nothing. There is no state.
    """

    def __init__(self, log_alpha: nn.Parameter, steps: int, config: BarConfig) -> None:
        self.log_alpha, self.config = log_alpha, config
        self.rate = config.gate_travel / max(1, steps)

    @torch.no_grad()
    def step(self, data_gradient: Tensor, cost_gradient: Tensor, barrier: float, weight: float) -> None:
        """Move the gates; `weight` cancels and is not used."""
        c, opened = self.config, is_open(self.log_alpha, self.config.gate_decision).to(data_gradient)
        count = opened.sum().clamp(min=1)

        def normalised(gradient: Tensor) -> Tensor:
            return gradient / ((gradient.square() * opened).sum() / count).sqrt().clamp(min=1e-30)

        direction = normalised(data_gradient) + c.gate_push * barrier * normalised(cost_gradient)
        self.log_alpha.sub_(direction.clamp(-c.gate_clip, c.gate_clip), alpha=self.rate)
        self.log_alpha.clamp_(-c.gate_limit, c.gate_limit)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: there is no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


class AdamSteps:
    """Adam on the gradient of the whole loss, as the paper has it (section 5.1), without weight decay."""

    def __init__(self, log_alpha: nn.Parameter, steps: int, config: BarConfig) -> None:
        self.log_alpha, self.config = log_alpha, config
        self.adam = torch.optim.Adam([log_alpha], lr=config.gate_lr)

    @torch.no_grad()
    def step(self, data_gradient: Tensor, cost_gradient: Tensor, barrier: float, weight: float) -> None:
        """Move the gates by one step of Adam."""
        self.log_alpha.grad = data_gradient + weight * barrier * cost_gradient
        self.adam.step()
        self.log_alpha.clamp_(-self.config.gate_limit, self.config.gate_limit)

    def state_dict(self) -> dict[str, Any]:
        """Return Adam's moments."""
        return self.adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore Adam's moments."""
        self.adam.load_state_dict(state)


GATE_OPTIMIZERS: dict[str, type[BalancedSteps] | type[AdamSteps]] = {"balanced": BalancedSteps, "adam": AdamSteps}
