"""Training on Lightning Fabric: tasks, phases, distillation and resume."""

from bar_edge.training.hardware import choose_device, choose_precision
from bar_edge.training.journal import Journal
from bar_edge.training.loop import evaluate, train
from bar_edge.training.optimizers import Phase
from bar_edge.training.tasks import TASKS, Distills, Task, check_task, late_task, load_task

__all__ = [
    "TASKS",
    "Distills",
    "Journal",
    "Phase",
    "Task",
    "check_task",
    "choose_device",
    "choose_precision",
    "evaluate",
    "late_task",
    "load_task",
    "train",
]
