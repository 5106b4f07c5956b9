"""The hard-concrete gate (Louizos et al. 2018; Lemaire et al. 2019, supplement 7.1).

A gate z in [0, 1] has one learnable number, log alpha. u ~ U(0, 1) gives a sample; without noise the
deterministic gate decides what stays.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
#: P(z > 0) = sigmoid(log_alpha + OPEN_SHIFT)
OPEN_SHIFT = -BETA * math.log(-GAMMA / ZETA)
#: log alpha at which a deterministic gate opens, by rule
THRESHOLD = {"louizos": -math.log(11.0), "median": -OPEN_SHIFT}
GateDecision = Literal["louizos", "median"]
_EPSILON = 1e-6


def sample(log_alpha: Tensor, u: Tensor) -> Tensor:
    """Return gates for uniform noise u, both of one shape, differentiable in log_alpha (supplement, eq. 4)."""
    u = u.clamp(_EPSILON, 1 - _EPSILON)
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def probability_open(log_alpha: Tensor) -> Tensor:
    """Return P(z > 0) (supplement, eq. 5)."""
    return torch.sigmoid(log_alpha + OPEN_SHIFT)


def deterministic(log_alpha: Tensor, decision: GateDecision = "louizos") -> Tensor:
    """Return the test-time gate; louizos has no temperature, median is the sample at u = 1/2."""
    temperature = BETA if decision == "median" else 1.0
    return (torch.sigmoid(log_alpha / temperature) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def is_open(log_alpha: Tensor, decision: GateDecision = "louizos") -> Tensor:
    """Return where the deterministic gate is above 0."""
    return log_alpha > THRESHOLD[decision]
