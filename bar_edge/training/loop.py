"""Training and evaluating a network, one phase at a time: dense, prune, tune."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from typing import Any, Literal

import torch
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn

from bar_edge.config import DistillConfig, TrainConfig
from bar_edge.data import DataSource, Split
from bar_edge.data.source import Targets
from bar_edge.errors import InputError
from bar_edge.methods.distillation import distillation_loss
from bar_edge.methods.method import Pruner
from bar_edge.progress import NoProgress, Progress, Record
from bar_edge.training.hardware import choose_device, choose_precision, make_fabric
from bar_edge.training.journal import Journal
from bar_edge.training.optimizers import MovingAverage, Phase, learning_rate, make_optimizer
from bar_edge.training.stopping import Stop, generator_states, restore_generators, stop_between_steps
from bar_edge.training.tasks import Distills, Task

#: steps from one line of metrics.jsonl to the next; only there does the host wait for the device
LOG_STRIDE = 20


def evaluate(
    network: nn.Module,
    split: Split,
    task: Task,
    *,
    batch: int,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> float:
    """Return the task's metric of a network in eval mode over a whole split, exact for any batch size.

    Moves the network to the device and leaves it there, in the mode it was in.
    """
    place = choose_device(device)
    fabric = make_fabric(place, choose_precision(precision, place))
    return _evaluate(fabric, fabric.setup_module(network), split, task, batch)


def train(
    network: nn.Module,
    data: DataSource,
    task: Task,
    config: TrainConfig,
    phase: Phase,
    *,
    seed: int = 0,
    teacher: nn.Module | None = None,
    distill: DistillConfig = DistillConfig(),
    pruner: Pruner | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> None:
    """Train a network in place for the phase's epochs, and leave it in eval mode on the training device.

    teacher: distilled from if the task can (progress is told if not); a pruner brings its own instead. pruner:
    `network` is its gated network then, and no moving average is kept, since weights and gates only fit together
    as they are. journal: where metrics and checkpoints go, one per epoch and every `checkpoint_minutes`; a phase
    that it knows goes on where it stopped, a finished one is only loaded. A signal that would end the process does
    so after the step, when the journal has it. 0 epochs change nothing. Raises InputError if the loss stops being
    finite, if nothing is trainable, or if a checkpoint belongs to another run.
    """
    config = config.chosen(len(data.fit))
    if getattr(config, phase):
        _Training(network, data, task, config, phase, seed, teacher, distill, pruner, journal, progress).run()


class _Training:
    """One phase while it runs."""

    def __init__(
        self,
        network: nn.Module,
        data: DataSource,
        task: Task,
        config: TrainConfig,
        phase: Phase,
        seed: int,
        teacher: nn.Module | None,
        distill: DistillConfig,
        pruner: Pruner | None,
        journal: Journal | None,
        progress: Progress | None,
    ) -> None:
        self.network, self.data, self.task, self.config, self.phase = network, data, task, config, phase
        self.seed, self.distill, self.pruner, self.journal = seed, distill, pruner, journal
        self.progress: Progress = progress or NoProgress()
        assert config.batch is not None
        self.epochs, self.batch = int(getattr(config, phase)), config.batch
        self.steps_per_epoch = data.fit.n_batches(self.batch, drop_last=True)
        self.device = choose_device(config.device)
        self.precision = choose_precision(config.precision, self.device)
        self.fabric = make_fabric(self.device, self.precision)
        network.to(self.device)
        weights = network.parameters() if pruner is None else pruner.weights()
        self.raw_optimizer = make_optimizer(weights, config, config.rate(phase))
        self.model, self.optimizer = self.fabric.setup(network, self.raw_optimizer)
        distills = bool(distill.alpha) and pruner is None and isinstance(task, Distills)
        learns = teacher is not None or pruner is not None
        if distill.alpha and learns and not isinstance(task, Distills):
            self.progress.note(f"{phase} without distillation: the task {task.metric_name} has no `distill`")
        self.teacher = self.fabric.setup_module(teacher.eval()) if teacher is not None and distills else None
        self.ema = MovingAverage(network, config.ema) if config.ema and pruner is None else None
        # of the epoch that is on its way: steps done; sums of (loss, data loss) since the last line, over so many steps
        self.step, self.sums, self.since = 0, torch.zeros(2, device=self.device), 0
        self.generators: dict[str, Any] | None = None
        self.kept = time.monotonic()

    def run(self) -> None:
        """Train what the journal does not hold yet."""
        first = self._resume()
        if first < self.epochs:
            self.progress.phase(self.phase, self.epochs, self.epochs * self.steps_per_epoch)
            if self.journal is not None:
                self.journal.rewind()
            with stop_between_steps() as stop:
                for epoch in range(first, self.epochs):
                    self._train_epoch(epoch, stop)
                    if stop.signal is not None:
                        break
            self.progress.done()
        if self.ema is not None:
            self.ema.swap()
        self.network.eval()

    def _train_epoch(self, epoch: int, stop: Stop) -> None:
        # seeding every epoch anew: only one that was stopped within needs the states of the generators
        seed_everything(_derived_seed(self.seed, self.phase, epoch), verbose=False)
        if self.generators is not None:
            restore_generators(self.generators, self.device)
            self.generators = None
        self.model.train()
        order_seed = _derived_seed(self.seed, self.phase)
        batches = self.data.fit.batches(
            self.batch,
            train=True,
            seed=order_seed,
            epoch=epoch,
            device=self.device,
            augment=self.config.augment,
            **({"first": self.step} if self.step else {}),  # a user's own split need not know it
        )
        for images, targets in batches:
            self.step += 1
            self.sums += self._step(epoch * self.steps_per_epoch + self.step - 1, images, targets)
            self.since += 1
            if self.step == self.steps_per_epoch or self.since == LOG_STRIDE:
                self._log(epoch)
            if self.step == self.steps_per_epoch:
                self.step = 0
                self._keep(epoch + 1)
            elif stop.signal is not None or time.monotonic() - self.kept > 60 * self.config.checkpoint_minutes:
                self._keep(epoch)
            if stop.signal is not None:
                return

    def _log(self, epoch: int) -> None:
        """Tell the progress and the journal of the steps since the last time."""
        done = self.step == self.steps_per_epoch
        record = self._record(epoch, epoch * self.steps_per_epoch + self.step, (self.sums / self.since).tolist())
        if done:
            record["metric"] = self._held_out()
            self.progress.epoch(record)
        self.progress.step(record)
        if self.journal is not None:
            self.journal.append(record)
        self.sums, self.since = torch.zeros(2, device=self.device), 0

    def _keep(self, epochs_done: int) -> None:
        """Write a checkpoint."""
        if self.journal is not None:
            self.journal.save(self.phase, self._state(epochs_done))
        self.kept = time.monotonic()

    def _step(self, step: int, images: Tensor, targets: Targets) -> Tensor:
        """Do one step of the weights (and gates); return (loss, data loss) `(2,)`, on the device."""
        for group in self.raw_optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.phase, step, self.epochs * self.steps_per_epoch)
        outputs = self.model(images)
        data_loss = loss = self.task.loss(outputs, targets)
        if self.pruner is not None:
            with self.fabric.autocast():  # for the forward pass of the pruner's own teacher
                loss = self.pruner.loss(data_loss, images, outputs)
        elif self.teacher is not None:
            assert isinstance(self.task, Distills)
            with torch.no_grad():
                soft = self.teacher(images)
            loss = distillation_loss(data_loss, outputs, soft, self.distill, self.task.distill)
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self.optimizer.step()
        if self.pruner is not None:
            self.pruner.step()
        if self.ema is not None:
            self.ema.update(step)
        return torch.stack([loss.detach(), data_loss.detach()]).float()

    def _record(self, epoch: int, step: int, losses: list[float]) -> Record:
        """Return a line of metrics.jsonl; losses: (loss, data loss), means since the last line."""
        if not all(map(math.isfinite, losses)):
            raise InputError(
                "a finite training loss",
                got=f"loss {losses[0]}, data loss {losses[1]} by step {step}, epoch {epoch + 1} of phase {self.phase}",
                consequence="training stopped; the checkpoint of the epoch before is kept",
                remedy=f"lower lr_{self.phase}, or train with precision = fp32",
            )
        stats = {} if self.pruner is None else self.pruner.stats()
        gates = {name: stats.get(name) for name in ("barrier", "volume", "budget", "sparsity")}
        counts = {name: int(stats[name]) if name in stats else None for name in ("open", "flips")}
        return {
            "step": step,
            "epoch": epoch + 1,
            "phase": self.phase,
            "loss": losses[0],
            "data_loss": losses[1],
            **gates,
            **counts,
            "lr": self.raw_optimizer.param_groups[0]["lr"],
            "metric": None,
        }

    def _held_out(self) -> float:
        with self.ema.in_place() if self.ema is not None else contextlib.nullcontext():
            return _evaluate(self.fabric, self.model, self.data.held_out, self.task, self.batch)

    def _settings(self) -> dict[str, Any]:
        """Return what a resumed run must share with the one that was stopped."""
        config, teacher = self.config, self.teacher is not None
        return {
            "epochs": self.epochs,
            "seed": self.seed,
            "steps_per_epoch": self.steps_per_epoch,
            "batch": config.batch,
            "optimizer": config.optimizer,
            "lr": config.rate(self.phase),
            "weight_decay": config.weight_decay,
            "schedule": config.schedule,
            "ema": config.ema,
            "precision": self.precision,
            "augment": config.augment,
            "alpha": self.distill.alpha if teacher else None,
            "temperature": self.distill.temperature if teacher else None,
        }

    def _state(self, epochs_done: int) -> dict[str, Any]:
        return {
            "settings": self._settings(),
            "epochs_done": epochs_done,
            "network": dict(self.network.state_dict()),
            "optimizer": self.raw_optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.average,
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            # of an epoch that was stopped within: how far it is, and the losses that no line tells of yet
            "step": self.step,
            "generators": generator_states(self.device) if self.step else None,
            "sums": self.sums.cpu(),
            "since": self.since,
        }

    def _resume(self) -> int:
        """Load the last checkpoint of this phase, if there is one; return how many epochs it has done."""
        state = None if self.journal is None else self.journal.load(self.phase, self._settings())
        if state is None:
            return 0
        try:
            self.network.load_state_dict(state["network"])
            self.raw_optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.load(state["ema"])
            if self.pruner is not None:
                self.pruner.load_state_dict(state["pruner"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(
                f"a checkpoint of this network in phase {self.phase}",
                got=str(error),
                remedy="give the same model, or start without --resume",
            ) from error
        self.step, self.since, self.generators = int(state["step"]), int(state["since"]), state["generators"]
        self.sums = state["sums"].to(self.device)
        return int(state["epochs_done"])


def _evaluate(fabric: Fabric, model: nn.Module, split: Split, task: Task, batch: int) -> float:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total: Tensor | None = None
    with torch.no_grad():
        for images, targets in split.batches(batch, train=False, seed=0, epoch=0, device=fabric.device):
            counts = task.metric(model(images), targets)
            total = counts if total is None else total + counts
    for module, training in modes:
        module.training = training
    assert total is not None, "a split holds at least one image"
    return task.value(total)


def _derived_seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")
