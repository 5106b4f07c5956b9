"""Budget-Aware Regularization (Lemaire et al., CVPR 2019), for any training loop."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bar_edge.config import BarConfig, DistillConfig
from bar_edge.methods.bar.barrier import BudgetSchedule, barrier
from bar_edge.methods.bar.gate_optimizer import GATE_OPTIMIZERS, GateOptimizer
from bar_edge.methods.distillation import Distill, distillation_loss, soft_cross_entropy
from bar_edge.methods.filters import filters
from bar_edge.methods.gating import hard_concrete
from bar_edge.methods.gating.gate_cost import gate_cost
from bar_edge.methods.gating.gated_network import GatedNetwork, fold
from bar_edge.methods.gating.layout import GateLayout
from bar_edge.methods.gating.projection import budget_limit, plan_within, protected_gates
from bar_edge.methods.method import Scored
from bar_edge.network import Network, trace
from bar_edge.records import Budget, ChannelPlan
from bar_edge.records.latency_table import LatencyTable
from bar_edge.surgery import slice_network


class BAR:
    """Trains weights and gates together so that the network ends within a budget.

    model: a module or Network, copied. example_input: (N, ...), for tracing. budget: "16x", "25%:flops",
    "194560act", or "8ms" by a latency table. steps: optimiser steps of the pruning phase. teacher: distilled
    from, in eval mode, if given. keep, round_to, table: see GateLayout. Raises InputError for a budget below
    the smallest feasible cost.

    Use `network` as the model, pass the outputs through `loss`, step your own optimiser over `weights()`,
    then call `step()`; `slice()` ends it.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor | None = None,
        *,
        budget: str,
        steps: int,
        teacher: nn.Module | None = None,
        config: BarConfig | None = None,
        distill: DistillConfig | None = None,
        soft_loss: Distill = soft_cross_entropy,
        keep: tuple[str, ...] = (),
        round_to: int = 1,
        table: LatencyTable | None = None,
        seed: int = 0,
    ) -> None:
        self.config, self.distill, self.soft_loss = config or BarConfig(), distill or DistillConfig(), soft_loss
        if isinstance(model, Network):
            dense = copy.deepcopy(model)
        else:
            assert example_input is not None, "a plain module needs an example input"
            dense = trace(model, example_input)
        self.dense = dense
        self.layout = GateLayout(dense, keep=keep, round_to=round_to, table=table)
        self.network = GatedNetwork(self.layout, decision=self.config.gate_decision, seed=seed).train()
        self.budget = Budget.parse(budget)
        limit = budget_limit(self.layout, self.budget)
        self.teacher = teacher.eval() if teacher is not None else None
        self.cost = gate_cost(self.layout, self.budget.metric)
        c = self.config
        self.schedule = BudgetSchedule(
            full=self.cost.full,
            limit=limit,
            steps=steps,
            kind=c.transition,
            steepness=c.steepness,
            slack=c.slack,
            margin=c.margin,
        )
        self.protected = protected_gates(self.layout, self.budget.metric)
        gates = self.network.gates
        with torch.no_grad():
            gates.log_alpha.copy_(_start(self.layout, dense, c, seed))
        self.network.to(next(dense.parameters()).device)
        self.weight = c.lambda_norm / self.cost.full if c.lambda_raw is None else c.lambda_raw
        self.optimizer: GateOptimizer = GATE_OPTIMIZERS[c.gate_optimizer](gates.log_alpha, steps, c)
        self._cost_gradient = torch.zeros_like(gates.log_alpha)
        self._stats: dict[str, Any] = {"flips": 0}

    def weights(self) -> list[nn.Parameter]:
        """Return the weights to train, without the gates."""
        return [p for p in self.network.parameters() if p is not self.network.gates.log_alpha and p.requires_grad]

    def loss(self, data_loss: Tensor, inputs: Tensor, outputs: Any) -> Tensor:
        """Return the training loss: data term, distillation if there is a teacher, and lambda * L_S * f (eq. 6, 8).

        The last term is a plain number here: `step` applies its gradient to the gates.

        data_loss: your criterion, the mean over the batch; inputs, outputs: of this batch.
        """
        gates, total = self.network.gates, data_loss
        if self.cost.always.device != gates.log_alpha.device:
            self._follow(gates.log_alpha.device)
        if self.teacher is not None and self.distill.alpha:
            with torch.no_grad():
                soft = self.teacher(inputs)
            total = distillation_loss(data_loss, outputs, soft, self.distill, self.soft_loss)
        opened = gates.opened()
        volume, upper = self.cost.hard(opened), self.schedule.upper(gates.step)
        f = barrier(volume, self.schedule.lower, upper, self.config.barrier_cap)
        sparsity = self.cost.expected(hard_concrete.probability_open(gates.log_alpha))
        (self._cost_gradient,) = torch.autograd.grad(sparsity, gates.log_alpha)  # kept apart from the data's
        self._stats |= {
            "volume": volume,
            "budget": upper,
            "barrier": f,
            "sparsity": sparsity.detach(),
            "open": opened.sum(),
            "data_loss": data_loss.detach(),
        }
        return total + (self.weight * f * sparsity.detach()).to(total.dtype)

    def _follow(self, device: torch.device) -> None:
        """Move what works beside the gates to where the user has moved the network."""
        self.cost.to(device)
        self.protected = [(ids.to(device), n) for ids, n in self.protected]
        if self.teacher is not None:
            self.teacher.to(device)

    @torch.no_grad()
    def step(self) -> None:
        """Move the gates by their gradient, keep one channel of every protected layer, advance the budget."""
        gates = self.network.gates
        before = gates.opened()
        if gates.log_alpha.grad is not None and bool(gates.log_alpha.grad.isfinite().all()):
            self.optimizer.step(gates.log_alpha.grad, self._cost_gradient, self._stats["barrier"], self.weight)
        for own, n in self.protected:
            best = own[torch.topk(gates.log_alpha[own], n).indices]
            gates.log_alpha[best] = gates.log_alpha[best].clamp(min=self.config.protect_floor)
        gates.log_alpha.grad = None
        gates.step, gates.passes = gates.step + 1, 0
        self._stats["flips"] = (before != gates.opened()).sum()

    def stats(self) -> dict[str, float]:
        """Return volume (hard, in the budget's unit), budget b, barrier f, sparsity L_S, open, flips, data_loss."""
        return {name: float(value) for name, value in self._stats.items()}

    def finish(self) -> tuple[Network, ChannelPlan, dict[str, float]]:
        """Prune hard: fold the open gates into a copy of the dense network, project onto the budget.

        Returns the folded dense-shaped network, the plan, and {"forced": gates that the projection closed}.
        """
        scored = self.scored()
        plan, forced = plan_within(self.layout, scored, self.budget.metric, self.schedule.limit)
        return scored.network, plan, {"forced": forced}

    def scored(self) -> Scored:
        """Return a copy of the dense network with the open gates folded in, and the gates as scores."""
        gates, folded = self.network.gates, copy.deepcopy(self.dense)
        scores, opened = gates.log_alpha.detach().clone(), gates.opened()
        if self.config.kept_gate == "fold":
            with torch.no_grad():
                if self.budget.metric == "ms":  # a channel that comes back starts at half: from 0 it learns nothing
                    gates.log_alpha[~opened] = 0.0
                fold(folded, self.network)
                gates.log_alpha.copy_(scores)
        return Scored(network=folded, scores=scores, opened=opened)

    def slice(self) -> Network:
        """Return the smaller network, within the budget: a plain nn.Module."""
        folded, plan, _ = self.finish()
        return slice_network(folded, plan)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training changes, tensors and numbers only."""
        return {
            "network": {name: tensor.clone() for name, tensor in self.dense.body.state_dict().items()},
            "log_alpha": self.network.gates.log_alpha.detach().clone(),
            "step": self.network.gates.step,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.dense.body.load_state_dict(state["network"])
        with torch.no_grad():
            self.network.gates.log_alpha.copy_(state["log_alpha"])
        self.network.gates.step, self.network.gates.passes = int(state["step"]), 0
        self.optimizer.load_state_dict(state["optimizer"])


def _start(layout: GateLayout, network: Network, config: BarConfig, seed: int) -> Tensor:
    """Return log alpha at the first step (gates,), all open.

    ranked: 0.5 to 3 by the rank in the layer of |weight| of the BatchNorm behind the gate (else of the
    filter's norm), so that gates do not cross the threshold together; uniform: U(0, .01), as printed.
    """
    if config.gate_start == "uniform":
        return torch.rand(layout.size, generator=torch.Generator().manual_seed(seed)) * 0.01
    parts = []
    for name, (_, n) in layout.offsets.items():
        followers = layout.followers(name)
        norm = network.body.get_submodule(followers[0]) if followers else None
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine:
            score = norm.weight.detach().abs()
        else:
            score = filters(network.body.get_submodule(name)).norm(dim=1)
        rank = torch.argsort(torch.argsort(score, stable=True), stable=True)
        parts.append(0.5 + 2.5 * rank.float() / max(1, n - 1))
    return torch.cat(parts)
