"""How gates move: momentum divided by one RMS over all open gates, so that areas and data decide who closes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bar_edge.config import BarConfig
from bar_edge.methods.hard_concrete import THRESHOLD


class GateOptimizer:
    """One step of all gates per iteration."""

    def __init__(self, log_alpha: Tensor, steps: int, config: BarConfig) -> None:
        self.log_alpha, self.config, self.steps = log_alpha, config, steps
        self.momentum = torch.zeros_like(log_alpha.detach())
        self.mean_square = 0.0
        self.count = 0

    @torch.no_grad()
    def step(self, gradient: Tensor, barrier: float) -> None:
        """Move the gates against the gradient (gates,), faster when the barrier f is high."""
        c = self.config
        opened = self.log_alpha > THRESHOLD[c.gate_decision]
        self.momentum.mul_(0.9).add_(gradient, alpha=0.1)
        square = float(gradient[opened].square().mean()) if bool(opened.any()) else 0.0
        self.count += 1
        self.mean_square += (square - self.mean_square) * max(0.01, 1 / self.count)
        rate = 12.0 / self.steps * (1 + barrier / 4)
        move = (self.momentum / (self.mean_square**0.5 + 1e-12)).clamp(-5, 5)
        self.log_alpha.sub_(move, alpha=rate).clamp_(-4.6, 4.6)

    def state_dict(self) -> dict[str, Any]:
        """Return momentum, mean square and steps done."""
        return {"momentum": self.momentum.clone(), "mean_square": self.mean_square, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.momentum.copy_(state["momentum"])
        self.mean_square, self.count = float(state["mean_square"]), int(state["count"])
