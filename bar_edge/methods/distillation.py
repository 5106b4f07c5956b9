"""Knowledge distillation: the student also fits the teacher's softened outputs (Hinton et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bar_edge.config import DistillConfig
from bar_edge.errors import InputError

#: (student's outputs, teacher's outputs, temperature) -> a scalar
Distill = Callable[[Any, Any, float], Tensor]


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 * CE(softmax(teacher / T), softmax(student / T)), the mean over all predictions.

    student, teacher: logits `(N, C, ...)`, classes in dimension 1, one prediction per image (and pixel).
    The cross-entropy form of Lemaire et al. 2019, section 3.5: it exceeds the KL form by T^2 times the
    teacher's entropy and has the same gradient. Raises InputError for outputs of several heads.
    """
    if not isinstance(student, Tensor):
        raise InputError(
            "one tensor of logits, to be distilled as one prediction",
            got=f"outputs that are a {type(student).__name__}",
            remedy="give a distillation loss for these outputs, or no teacher",
        )
    target = F.softmax(_full_precision(teacher) / temperature, dim=1)
    log_student = F.log_softmax(_full_precision(student) / temperature, dim=1)
    return -(target * log_student).sum(dim=1).mean() * temperature**2


def distillation_loss(
    data_loss: Tensor, student: Any, teacher: Any, config: DistillConfig, distill: Distill = soft_cross_entropy
) -> Tensor:
    """Return (1 - alpha) * data_loss + alpha * distill(student, teacher, T) (Lemaire et al. 2019, equation 9)."""
    return (1 - config.alpha) * data_loss + config.alpha * distill(student, teacher, config.temperature)


def _full_precision(logits: Tensor) -> Tensor:
    return logits.float() if logits.element_size() < 4 else logits
