"""How gates move: by the budget itself, or by Adam as the paper has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bar_edge.config import BarConfig
from bar_edge.methods.bar.closing import Closer
from bar_edge.methods.gating.hard_concrete import is_open

#: how often in a schedule the cost is compared with the budget
CHECKS = 200


class ClosingSteps:
    """Closes the gates of least importance per cost as soon as the cost exceeds b: the barrier as a wall.

    The importance of a gate is a running mean of its squared data gradient (see `closing`), before the first step
    what it starts with. log alpha holds the order: what closed first is lowest.
    """

    def __init__(
        self, log_alpha: nn.Parameter, steps: int, config: BarConfig, closer: Closer, importance: Tensor
    ) -> None:
        self.log_alpha, self.config, self.closer, self.importance = log_alpha, config, closer, importance
        self.decay = 1 - 1 / max(10.0, min(200.0, steps / 10))
        self.every = max(1, steps // CHECKS)
        self.seen, self.cost = 0, closer.full

    @torch.no_grad()
    def step(self, gradient: Tensor, budget: float) -> None:
        """Take in the data's gradient, (gates,), and close gates until the cost is within the budget.

        Only how gradients compare counts: a factor on the loss, of a GradScaler say, changes nothing.
        """
        self.seen += 1
        self.importance, squared = self.importance.to(gradient.device), gradient.square()
        squared = squared / squared.mean().clamp(min=1e-30)
        self.importance.lerp_(squared, 1 - min(self.decay, 1 - 1 / self.seen))
        if self.seen % self.every == 0:
            self.close(budget)

    @torch.no_grad()
    def close(self, budget: float) -> None:
        """Close gates until the cost is within the budget."""
        if self.cost > budget:
            opened = is_open(self.log_alpha, self.config.gate_decision)
            for gates, cost in self.closer.close(opened, self.importance, budget):
                order = 1 - self.config.gate_limit - cost / self.closer.full
                self.log_alpha[gates.to(self.log_alpha.device)] = order
                self.cost = cost

    @torch.no_grad()
    def rank(self) -> None:
        """Order the open gates by log alpha, all as open as before: what would close next is lowest."""
        opened = is_open(self.log_alpha, self.config.gate_decision)
        ranked = list(self.closer.close(opened, self.importance, 0.0))
        self.log_alpha[opened] = self.config.gate_limit
        for i, (gates, _) in enumerate(ranked):
            self.log_alpha[gates.to(opened.device)] = self.config.gate_limit - 1 + i / len(ranked)

    def state_dict(self) -> dict[str, Any]:
        """Return the importances."""
        return {"importance": self.importance.clone(), "seen": self.seen, "cost": self.cost}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the importances."""
        self.importance.copy_(state["importance"])
        self.seen, self.cost = int(state["seen"]), float(state["cost"])


class AdamSteps:
    """Adam on the gradient of the whole loss, as the paper has it (section 5.1), without weight decay."""

    def __init__(self, log_alpha: nn.Parameter, config: BarConfig) -> None:
        self.log_alpha, self.config = log_alpha, config
        self.adam = torch.optim.Adam([log_alpha], lr=config.gate_lr)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Move the gates by one step of Adam; gradient: of the whole loss, (gates,)."""
        self.log_alpha.grad = gradient
        self.adam.step()
        self.log_alpha.clamp_(-self.config.gate_limit, self.config.gate_limit)

    def state_dict(self) -> dict[str, Any]:
        """Return Adam's moments."""
        return self.adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore Adam's moments."""
        self.adam.load_state_dict(state)
