"""What a network is trained for: a loss, a metric, and how it learns from a teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from bar_edge.data.source import UNLABELLED, Targets
from bar_edge.errors import InputError
from bar_edge.methods.distillation import soft_cross_entropy
from bar_edge.user_code import load_attribute


class Task(Protocol):
    """A loss and a metric; a task may also have `distill` (see `Distills`), else nothing is distilled.

    outputs: what the network returns, a tensor or tuples, lists and dictionaries of tensors; targets: what the
    data set returns, stacked. Both (N, ...), on one device; classification and segmentation take plain tensors.
    The metric of a split is `value` of the sum of `metric` over its batches, so that it is exact however
    the split is cut into batches.
    """

    metric_name: str
    higher_is_better: bool

    def loss(self, outputs: Any, targets: Targets) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        ...

    def metric(self, outputs: Any, targets: Targets) -> Tensor:
        """Return the batch's counts, a tensor whose shape is the same for every batch."""
        ...

    def value(self, counts: Tensor) -> float:
        """Return the metric, in [0, 1], from the counts summed over a split."""
        ...


@runtime_checkable
class Distills(Protocol):
    """A task whose students learn from a teacher's outputs."""

    def distill(self, student: Any, teacher: Any, temperature: float) -> Tensor:
        """Return the distillation loss of a batch, a scalar; student, teacher: outputs of the same structure."""
        ...


@runtime_checkable
class Checks(Protocol):
    """A task that tells before any training whether outputs and targets are for it."""

    def check(self, outputs: Any, targets: Targets) -> None:
        """Raise InputError if they are not; outputs: of two images, targets: of a whole split."""
        ...


class Classification:
    """Cross-entropy and top-1 accuracy; outputs `(N, C)` logits, targets `(N,)` class indices."""

    metric_name = "accuracy"
    higher_is_better = True

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy, the mean over the batch."""
        return F.cross_entropy(outputs, targets)

    def metric(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return (correct, all) `(2,)`."""
        correct = (outputs.argmax(dim=1) == targets).sum()
        return torch.stack([correct, torch.full_like(correct, targets.numel())])

    def check(self, outputs: Any, targets: Targets) -> None:
        """Raise InputError unless there is one output per class and one class per image."""
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            raise _unfit("classification: outputs (N, classes)", f"outputs {_shape(outputs)}")
        if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
            raise _unfit("classification: one class per image, an integer", f"targets {_shape(targets)}")
        _check_range(targets, outputs.shape[1], "labels")

    def value(self, counts: Tensor) -> float:
        """Return the share of correct predictions."""
        correct, total = counts.tolist()
        return float(correct / max(total, 1))

    def distill(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Return the soft cross-entropy, the mean over the batch."""
        return soft_cross_entropy(student, teacher, temperature)


class Segmentation:
    """Per-pixel cross-entropy and mean IoU; outputs `(N, C, H, W)` logits, targets `(N, H, W)` class indices."""

    metric_name = "mean IoU"
    higher_is_better = True

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy, the mean over the labelled pixels."""
        return F.cross_entropy(outputs, targets, ignore_index=UNLABELLED)

    def metric(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the confusion matrix `(C, C)`, rows by target, columns by prediction."""
        classes = outputs.shape[1]
        labelled = targets != UNLABELLED
        pairs = targets[labelled] * classes + outputs.argmax(dim=1)[labelled]
        return torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    def check(self, outputs: Any, targets: Targets) -> None:
        """Raise InputError unless there is one output per class and pixel, and a mask of classes per image."""
        if not isinstance(outputs, Tensor) or outputs.ndim != 4:
            raise _unfit(
                "segmentation: outputs (N, classes, H, W), one tensor",
                f"outputs {_shape(outputs)}",
                "wrap the model so that it returns that tensor alone, such as outputs['out'], or give a task of your "
                "own: --task package.module:Task",
            )
        masks = isinstance(targets, Tensor) and targets.ndim == 3 and not targets.is_floating_point()
        if not masks or targets.shape[1:] != outputs.shape[2:]:
            size = "x".join(map(str, outputs.shape[2:]))
            raise _unfit(f"segmentation: masks of integers, {size} as the outputs are", f"targets {_shape(targets)}")
        _check_range(targets[targets != UNLABELLED], outputs.shape[1], f"masks ({UNLABELLED} where there is no label)")

    def value(self, counts: Tensor) -> float:
        """Return the mean of intersection over union, over the classes that were seen or predicted."""
        counts = counts.double()
        union = counts.sum(dim=0) + counts.sum(dim=1) - counts.diagonal()
        present = union > 0
        return float((counts.diagonal()[present] / union[present]).mean()) if present.any() else 0.0

    def distill(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Return the soft cross-entropy, the mean over all pixels, unlabelled ones included."""
        return soft_cross_entropy(student, teacher, temperature)


def _check_range(targets: Tensor, classes: int, what: str) -> None:
    if not targets.numel():
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0:
        raise _unfit(
            f"{what} from 0 to {classes - 1}",
            f"{low}",
            f"write {UNLABELLED} where a mask has no label, drop such images",
        )
    if high >= classes:
        raise _unfit(
            f"{what} from 0 to {classes - 1}, for the network's {classes} outputs",
            f"{low} to {high}",
            "give a model with an output for every class (--model-arg), or data without the others",
        )


def _shape(value: Any) -> str:
    """Say what outputs or targets are: their shape and type, or what holds them."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_shape(part)}" for name, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_shape, value))})"
    return f"a {type(value).__name__}"


def _unfit(required: str, got: str, remedy: str = "") -> InputError:
    return InputError(
        required,
        got=got,
        consequence="nothing was started",
        remedy=remedy or "correct model or data, or give a task of your own: --task package.module:Task",
    )


TASKS: dict[str, Callable[[], Task]] = {"classification": Classification, "segmentation": Segmentation}


def check_task(spec: str) -> None:
    """Raise InputError unless `load_task` knows the kind of name; no code is imported."""
    if spec not in TASKS and not all(spec.rpartition(":")[::2]):
        raise InputError(
            f"a task: {', '.join(TASKS)} or package.module:Task",
            got=repr(spec),
            consequence="nothing was started",
            remedy="correct the task's name",
        )


def late_task(spec: str) -> Task:
    """Return the task that a spec names, whose code is imported only when something of it is first asked for."""
    return cast(Task, _LateTask(spec))


class _LateTask:
    def __init__(self, spec: str) -> None:
        self._spec = spec

    @functools.cached_property
    def _task(self) -> Task:
        return load_task(self._spec)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


def load_task(spec: str) -> Task:
    """Return the task that a name or `package.module:Task` (a class without arguments, or an object) names.

    Raises InputError for an unknown name, a module that cannot be imported, or an object that is no task.
    """
    if spec in TASKS:
        return TASKS[spec]()
    check_task(spec)
    found = load_attribute(spec)
    try:
        task = found() if isinstance(found, type) else found
    except Exception as error:  # a user's constructor can raise anything
        raise InputError(f"{spec} can be made without arguments", got=f"{type(error).__name__}: {error}") from error
    missing = [
        part for part in ("metric_name", "higher_is_better", "loss", "metric", "value") if not hasattr(task, part)
    ]
    if missing:
        raise InputError(
            f"a task with metric_name, higher_is_better, loss, metric and value at {spec}",
            got=f"{type(task).__name__} without {', '.join(missing)}",
            remedy="add what is missing: bar_edge.training.tasks.Task describes it",
        )
    return cast(Task, task)
